"""A transfer that fails by script: the same faults in the same calls on every run.

Wraps any Transfer. The script maps the number of a call (the first is 0, reads and writes count
together) to a Fault; calls without one go through untouched.

    FAIL   raise at once, nothing moved
    TEAR   move the first `keep_bytes`, then raise
    FLIP   move everything, then flip one bit of what arrived, silently
    DELAY  wait `delay_s` through the given sleep, then move
    HANG   raise a non-terminal error, and move the bytes only at `settle()`: a stopped peer that
           goes on later
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from kvserver.transfer.base import Transfer, TransferError


class FaultKind(Enum):
    FAIL = "fail"
    TEAR = "tear"
    FLIP = "flip"
    DELAY = "delay"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Fault:
    """`keep_bytes` for TEAR, `bit` (position in the extent, modulo its size) for FLIP."""

    kind: FaultKind
    keep_bytes: int = 0
    bit: int = 0
    delay_s: float = 0.0


class FaultyTransfer:
    """See the module. `calls` counts what was asked, `log` keeps (call, fault) as they struck."""

    def __init__(
        self,
        inner: Transfer,
        script: Mapping[int, Fault],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._script = dict(script)
        self._sleep = sleep
        self._hanging: list[Callable[[], None]] = []
        self.calls = 0
        self.log: list[tuple[int, FaultKind]] = []

    @property
    def arena_id(self) -> bytes:
        return self._inner.arena_id

    @property
    def data_bytes(self) -> int:
        return self._inner.data_bytes

    def read(self, offset: int, into: memoryview) -> None:
        fault = self._next()
        if fault is None:
            self._inner.read(offset, into)
            return
        self._strike(fault, lambda part: self._inner.read(offset, into[:part]), into.nbytes)
        if fault.kind is FaultKind.FLIP and into.nbytes:
            at, bit = divmod(fault.bit % (8 * into.nbytes), 8)
            into[at] ^= 1 << bit

    def write(self, offset: int, data: memoryview) -> None:
        fault = self._next()
        if fault is None:
            self._inner.write(offset, data)
            return
        if fault.kind is FaultKind.FLIP and data.nbytes:
            at, bit = divmod(fault.bit % (8 * data.nbytes), 8)
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            data = memoryview(flipped)
        self._strike(fault, lambda part: self._inner.write(offset, data[:part]), data.nbytes)

    def settle(self) -> int:
        """Let every hanging transfer happen now; how many there were."""
        hanging, self._hanging = self._hanging, []
        for move in hanging:
            move()
        return len(hanging)

    def _next(self) -> Fault | None:
        call, self.calls = self.calls, self.calls + 1
        fault = self._script.get(call)
        if fault is not None:
            self.log.append((call, fault.kind))
        return fault

    def _strike(self, fault: Fault, move: Callable[[int], None], length: int) -> None:
        if fault.kind is FaultKind.FAIL:
            raise TransferError("scripted failure")
        if fault.kind is FaultKind.TEAR:
            move(min(fault.keep_bytes, length))
            raise TransferError(f"scripted tear after {min(fault.keep_bytes, length)} bytes")
        if fault.kind is FaultKind.HANG:
            self._hanging.append(lambda: move(length))
            raise TransferError("scripted hang", terminal=False)
        if fault.kind is FaultKind.DELAY:
            self._sleep(fault.delay_s)
        move(length)
