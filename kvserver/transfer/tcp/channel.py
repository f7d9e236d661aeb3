"""What the server and a data worker say to each other: small messages over a Unix socket.

    server -> worker   setup (with the arena's and the listener's descriptors), verdict (with the
                       client's liveness descriptor), drop
    worker -> server   hello, closed, counted

Rule 1: SOCK_SEQPACKET keeps messages whole; each is one JSON object of at most MESSAGE_BYTES_MAX.
Rule 2: secrets travel here and nowhere else (never in argv or the environment).
Rule 3: `receive` hands every descriptor that arrived to its caller, who closes it.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MESSAGE_BYTES_MAX = 16 * 1024
_FDS_MAX = 4


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end. Blocking or not is the socket's matter; `BlockingIOError` comes through."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """ChannelClosed when nobody is there any more. A message goes whole or not at all."""
        raw = json.dumps(message).encode()
        assert len(raw) <= MESSAGE_BYTES_MAX, len(raw)
        try:
            socket.send_fds(self.end, [raw], fds)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and what descriptors came with it."""
        try:
            raw, fds, _, _ = socket.recv_fds(
                self.end, MESSAGE_BYTES_MAX, _FDS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not raw:
            for fd in fds:
                os.close(fd)
            raise ChannelClosed("the other side closed")
        return json.loads(raw), fds

    def close(self) -> None:
        self.end.close()


def pair() -> tuple[Channel, Channel]:
    """Two ends: the server's and a worker's."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(one), Channel(other)
