"""Who may still write: one lock file per client, held through a passed file descriptor.

The server opens `<directory>/live/<client id>`, takes an exclusive `flock` on that open file
description and passes the descriptor to the client. The lock lives as long as any copy of the
descriptor does: it survives the server, follows the client's forked children, and works where pids
do not (other PID namespaces). A free lock means that no process can write through that client's
map any more (the client keeps the descriptor exactly as long as its map).

Rule 1: a file appears under its final name only when it is locked. So a missing file is a dead
        client.
Rule 2: a client id is given once in the life of the directory; ids grow, also across restarts.
Rule 3: a lock is tested through a fresh open; the test's own lock goes when that is closed.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kvserver.tiers.errors import TierError

LIVE_NAME = "live"
CLIENT_ID_MAX = (1 << 32) - 1
ID_BATCH = 256  # ids made durable at once; at most as many are skipped by a restart
_NEXT_NAME = "next"


class Liveness:
    """The lock files of one host directory, under that directory's lock."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the host directory; what dead clients left there is removed."""
        self._live = directory / LIVE_NAME
        self._live.mkdir(parents=True, exist_ok=True)
        for path in self._live.glob("*.new"):
            path.unlink(missing_ok=True)
        self._next = max(self._stored_next(), 1, *(i + 1 for i in self.known()))
        self._stored = self._next
        for client in self.known():
            if self.is_dead(client):
                self.forget(client)

    def new_client_id(self) -> int:
        """An id that no client of this directory ever had. TierError when there are none left."""
        if self._next > CLIENT_ID_MAX:
            raise TierError(f"client ids are used up in {self._live}")
        if self._next >= self._stored:
            self._store_next(self._next + ID_BATCH)
        client = self._next
        self._next += 1
        return client

    def raise_floor(self, client: int) -> None:
        """Give only ids above `client` from now on: one that the arena's directory still names."""
        if client >= self._next:
            self._next = client + 1

    def grant(self, client: int) -> int:
        """A descriptor that holds the client's lock: pass it on, then close it here.

        OSError when the file cannot be made. A client is granted once (FileExistsError).
        """
        path = self._path(client)
        if path.exists():
            raise FileExistsError(f"client {client} already has a liveness lock")
        fresh = path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh.rename(path)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        return fd

    def is_dead(self, client: int) -> bool:
        """True when no process can write for this client any more."""
        try:
            fd = os.open(self._path(client), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def forget(self, client: int) -> None:
        """Remove the file of a client that is dead or has said that it writes no more."""
        self._path(client).unlink(missing_ok=True)

    def known(self) -> list[int]:
        """Ids that have a file, ascending: living clients and dead ones not yet forgotten."""
        return sorted(int(p.name) for p in self._live.iterdir() if p.name.isdecimal())

    def _path(self, client: int) -> Path:
        return self._live / str(client)

    def _stored_next(self) -> int:
        """The first id that was never promised; 1 where that is not known."""
        try:
            return int((self._live / _NEXT_NAME).read_text())
        except (FileNotFoundError, ValueError):
            return 1

    def _store_next(self, value: int) -> None:
        fresh = self._live / "counter.new"
        fresh.write_text(str(value))
        fresh.rename(self._live / _NEXT_NAME)
        self._stored = value
