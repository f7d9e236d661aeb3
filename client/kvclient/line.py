"""A connection for calls over the shm socket that blocks (`kvproto.calls`), for one thread.

Rules:
 1. One call is made at a time: it is sent, and its replies are read. Further ones may be sent along
    with it, which nobody waits for: their replies are kept as they arrive, one for each.
 2. A call that gets no answer is taken back, so are those that were sent along, and the connection
    is closed: the hub ends what it granted to them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress

from kvclient.errors import Unavailable, late
from kvclient.local import read_reply
from kvclient.lookout import Lookout
from kvclient.options import Options
from kvclient.session import Link, Message
from kvclient.timing import Deadline
from kvclient.transfer.shm import dial
from kvproto import calls
from kvproto.handshake import Mode, Request, Status

_RECEIVE_BYTES = 1 << 18


class Line:
    """A connection for calls, one at a time, used by one thread. Only `hang_up` is for others."""

    def __init__(self, link: Link, path: str, options: Options) -> None:
        """OSError and ValueError when the hub takes no more of them."""
        self.link = link
        self.usable = True
        self._address = options.address
        self._last = 0  # the latest number that was given to a call
        self._number = 0  # of the call that was sent last
        self._replies = calls.ReplySplitter()
        self._ready: list[calls.Reply] = []
        self._along: dict[int, bytes] = {}  # calls to be sent with the next one
        self._kept: dict[int, calls.Reply | None] = {}  # replies to those that were
        request = Request(Mode.CALLS, link.session, link.client, link.token)
        self._socket, answer = dial(path, request, [], options.deadline_s)
        if answer.status is not Status.OK:
            self._socket.close()
            raise ConnectionRefusedError(answer.text)
        self._lookout = Lookout(self._socket)

    def takes(self, name: str, request: Message) -> bool:
        return (
            self.usable
            and name in calls.BY_RPC
            and request.ByteSize() <= calls.REQUEST_BODY_BYTES_MAX
        )

    def send(self, name: str, request: Message, deadline: Deadline) -> bool:
        """False when the hub had hung up before: then it knows nothing of this call."""
        self._number = self._last = self._last + 1
        left = deadline.left()
        frame = calls.encode_request(
            calls.BY_RPC[name], self._number, int(1000 * left) + 1, request.SerializeToString()
        )
        if self._along:
            frame += b"".join(self._along.values())
            self._kept |= dict.fromkeys(self._along)
            self._along.clear()
        self._socket.settimeout(max(left, 1e-3))
        try:
            self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            return False
        except BaseException as error:
            self.close()
            raise self._failed(name, error, deadline) from None
        return True

    def receive(self, name: str, deadline: Deadline) -> calls.Reply:
        """The next reply to the call that was sent last. Unavailable, DeadlineExceeded."""
        try:
            while not self._ready:
                self._lookout.look()
                self._socket.settimeout(max(deadline.left(), 1e-3))
                self._take_in(self._socket.recv(_RECEIVE_BYTES))
            return self._ready.pop(0)
        except BaseException as error:
            self.give_up()
            raise self._failed(name, error, deadline) from None

    # ---- calls that are sent along ---------------------------------------------------------

    def along(self, name: str, request: Message, deadline_ms: int) -> int:
        """Send this with the next call. Returns its number, under which `take` has the reply."""
        self._last += 1
        self._along[self._last] = calls.encode_request(
            calls.BY_RPC[name], self._last, deadline_ms, request.SerializeToString()
        )
        return self._last

    def take(self, call: int) -> calls.Reply | None:
        """The reply to a call that was sent along, once, if it has arrived."""
        reply = self._kept.get(call)
        if reply is not None:
            del self._kept[call]
        return reply

    def poll(self) -> None:
        """Read what has arrived. A line that is broken is of no use to the next call either."""
        try:
            self._socket.setblocking(False)
            self._take_in(self._socket.recv(_RECEIVE_BYTES))
        except BlockingIOError:
            pass
        except (OSError, calls.FrameError):
            self.give_up()

    def cancel(self, sent_along: Iterable[int]) -> None:
        """Take back calls that were sent along, whether they are answered or not."""
        gone = []
        for call in sent_along:
            if self._along.pop(call, None) is None and self._kept.pop(call, self) is not self:
                gone.append(calls.encode_cancel(call))
        if gone and self.usable:
            try:
                self._socket.setblocking(False)
                self._socket.send(b"".join(gone))
            except OSError:
                self.close()

    # ---- inside, and the end ---------------------------------------------------------------

    def _take_in(self, raw: bytes) -> None:
        if not raw:
            raise ConnectionResetError("the hub hung up")
        for reply in self._replies.feed(raw):
            if reply.call == self._number:
                self._ready.append(reply)
            elif reply.call in self._kept:
                self._kept[reply.call] = reply

    def message(self, name: str, reply: calls.Reply) -> Message:
        return read_reply(name, reply, self._address)

    def hang_up(self) -> None:
        """Whoever waits here is told that the hub hung up."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def give_up(self) -> None:
        """Take back the call that was sent last."""
        with suppress(OSError):
            self._socket.setblocking(False)
            gone = (self._number, *self._kept)
            self._socket.send(b"".join(map(calls.encode_cancel, gone)))
        self.close()

    def close(self) -> None:
        self.usable = False
        self._socket.close()

    def _failed(self, name: str, error: BaseException, deadline: Deadline) -> BaseException:
        if isinstance(error, TimeoutError):
            return late(name, self._address, deadline.seconds)
        if isinstance(error, OSError | calls.FrameError):
            return Unavailable(f"{name} at {self._address}: {error}")
        return error
