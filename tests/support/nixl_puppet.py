"""A nixl worker whose library is a puppet: python -m tests.support.nixl_puppet FD

Its backend says what a transfer does: `fill` writes sevens into what it reads into and is done,
`run` never ends, `hang` does not come back from the post, `none` cannot be made.
"""

from __future__ import annotations

import ctypes
import sys
import time

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.nixl.worker import Setup, serve


class Puppet:
    def __init__(self, setup: Setup) -> None:
        if setup.backend == "none":
            raise NixlError("NIXL has no backend 'none'")
        self.name = setup.name
        self._does = setup.backend

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...

    def metadata(self) -> bytes:
        return b""

    def add_peer(self, metadata: bytes) -> str:
        return metadata.decode()

    def drop_peer(self, name: str) -> None: ...

    def progress(self) -> None: ...

    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]:
        if self._does == "hang":
            time.sleep(600)
        if self._does == "run":
            return 1, State.RUNNING
        if read:
            for address, size, _ in local.tolist():
                ctypes.memset(address, 7, size)
        return 1, State.DONE

    def state(self, handle: int) -> State:
        return State.RUNNING

    def release(self, handle: int) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    serve(int(sys.argv[1]), before_post=lambda: None, make=Puppet)
