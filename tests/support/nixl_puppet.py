"""A nixl worker whose library is a puppet: python -m tests.support.nixl_puppet FD

Its backend says what a transfer does: `fill` writes sevens into what it reads into and is done,
`run` never ends, `hang` does not come back from the post, `hang c-5` not with the peer c-5, `pair`
comes back when another agent posts as well (but for the very first), `wire` is done if there was
progress since a peer was added, `none` cannot be made, `closed` dawdles and fails
where it is used after `close`. With `second` the second agent adds no peer.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.nixl.worker import Setup, serve

_pair, _first = threading.Barrier(2), threading.Lock()


class Puppet:
    def __init__(self, setup: Setup, number: int) -> None:
        if setup.backend == "none":
            raise NixlError("NIXL has no backend 'none'")
        self.name = setup.name
        self._does, _, self._only = setup.backend.partition(" ")
        self._refuses = self._does == "second" and number == 1
        self._wired = False
        self._closed = False

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...

    def metadata(self) -> bytes:
        return b""

    def add_peer(self, metadata: bytes) -> str:
        if self._refuses:
            raise NixlError("refused")
        self._wired = False
        return metadata.decode()

    def drop_peer(self, name: str) -> None: ...

    def progress(self) -> None:
        self._wired = True
        if self._does == "closed":
            time.sleep(0.01)
            if self._closed:
                raise RuntimeError("the agent is closed")

    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]:
        if self._does == "hang" and self._only in ("", peer):
            time.sleep(600)
        if self._does == "pair":
            if _first.acquire(blocking=False):
                return 1, State.DONE
            _pair.wait(60)
        if self._does == "run":
            return 1, State.RUNNING
        if self._does == "wire" and not self._wired:
            return 1, State.FAILED
        if read:
            for address, size, _ in local.tolist():
                ctypes.memset(address, 7, size)
        return 1, State.DONE

    def state(self, handle: int) -> State:
        return State.RUNNING

    def release(self, handle: int) -> None: ...

    def close(self) -> None:
        self._closed = True
        if self._does == "closed":
            time.sleep(0.1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), before_post=lambda: None, make=Puppet)
