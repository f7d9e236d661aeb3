"""Another process that uses the hub, which a test may stop, continue and kill.

    python -m tests.contract.peer ADDRESS ROLE COUNT TRANSPORT TTL_S

Roles say a word on stdout when they stand at the place that the test waits for, and go on when a
line comes in on stdin:

  write   reserve COUNT blocks for TTL_S, take views of their cells; then scribble over all cells,
          commit, and say the verdicts
  read    acquire COUNT blocks under leases of TTL_S; then copy each, verify, and say per block
          "hit" (verified, and byte-exact), "wrong" (verified, other bytes) or "miss"
  push    push COUNT blocks at once; then say how many were written, or the error
"""

from __future__ import annotations

import subprocess
import sys
import time
from types import TracebackType
from typing import IO, Self

from kvclient import Client, KVError
from tests.support.payload import Blocks

BLOCKS = Blocks(layers=4, heads=2, page_bytes=8192)  # 512 KiB a block
SEED = 4242
TTL_S = 0.4
SCRIBBLE = 0xEE


class Peer:
    """The process, as the test holds it."""

    def __init__(
        self, address: str, role: str, count: int, transport: str = "auto", ttl_s: float = TTL_S
    ) -> None:
        words = [address, role, str(count), transport, str(ttl_s)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.contract.peer", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def says(self) -> str:
        """The next line; empty when the process has ended."""
        return _pipe(self._process.stdout).readline().strip()

    def go(self) -> None:
        stdin = _pipe(self._process.stdin)
        stdin.write("go\n")
        stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(10)
        _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _say(word: str) -> None:
    print(word, flush=True)


def _write(client: Client, count: int, ttl_s: float) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    reservation = namespace.reserve(BLOCKS.chain(SEED, count), ttl_s=ttl_s)
    views = [reservation.cells(i) for i in reservation.writable]
    _say(f"reserved {len(views)}")
    sys.stdin.readline()
    for view in views:
        view[:] = SCRIBBLE
    del view, views  # while one is kept, the slots stay in quarantine
    try:
        verdicts = " ".join(str(verdict) for verdict in reservation.commit())
    except KVError as error:
        verdicts = type(error).__name__
    reservation.abort()
    _say(verdicts)
    sys.stdin.readline()
    client.close()


def _read(client: Client, count: int, ttl_s: float) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(SEED, count)
    with namespace.acquire(keys, lease_s=ttl_s) as stream:
        held = list(stream)
        views = [granted.cells for granted in held]
        _say(f"granted {len(held)}")
        sys.stdin.readline()
        words = []
        for granted, view in zip(held, views, strict=True):
            copy = view.copy().reshape(BLOCKS.shape)
            exact = bool((copy == BLOCKS.payload(keys[granted.index])).all())
            words.append(("hit" if exact else "wrong") if granted.verify() else "miss")
    _say(" ".join(words))


def _push(client: Client, count: int, ttl_s: float) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(SEED, count)
    payloads = BLOCKS.payloads(keys)
    _say("pushing")
    try:
        _say(f"written {namespace.push(keys, payloads).written}")
    except KVError as error:
        _say(type(error).__name__)


def main(address: str, role: str, count: str, transport: str, ttl_s: str) -> None:
    deadline = time.monotonic() + 60
    with Client.connect(address, name=f"peer-{role}", transport=transport) as client:
        {"write": _write, "read": _read, "push": _push}[role](client, int(count), float(ttl_s))
    assert time.monotonic() < deadline, "the test forgot this process"


if __name__ == "__main__":
    main(*sys.argv[1:])
