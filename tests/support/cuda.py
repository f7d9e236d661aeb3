"""A CUDA runtime that is process memory: as much of CuPy as `kvserver.tiers.cuda` uses.

It moves real bytes by their addresses, and refuses what CUDA refuses: more memory than it has, a
copy that lies partly in registered memory, what was never allocated or registered. `break_down` is
the error after which nothing works any more. Not a GPU: only order, addresses and errors are shown.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

INVALID_VALUE, NO_MEMORY, NO_DEVICE, BROKEN, TAKEN = 1, 2, 100, 700, 712
_NAMES = {
    INVALID_VALUE: "cudaErrorInvalidValue: invalid argument",
    NO_MEMORY: "cudaErrorMemoryAllocation: out of memory",
    NO_DEVICE: "cudaErrorNoDevice: no CUDA-capable device is detected",
    TAKEN: "cudaErrorHostMemoryAlreadyRegistered: part or all of the memory is registered",
    BROKEN: "cudaErrorIllegalAddress: an illegal memory access was encountered",
}


class CudaError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_NAMES[status])


class Runtime:
    """The functions of `cupy.cuda.runtime`, by their names there."""

    CUDARuntimeError = CudaError
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2

    def __init__(self, *, gpus: int = 1, memory_bytes: int = 1 << 30) -> None:
        self.gpus = gpus
        self.driver = 13_000
        self.memory_bytes = memory_bytes
        self.allocated: dict[int, Any] = {}
        self.registered: dict[int, int] = {}
        self.copies: list[tuple[int, int]] = []  # length, stream
        self.register_bytes_max = 1 << 62
        self.status = 0
        self.streams = 0
        self.waited: list[int] = []
        self.used: set[int] = set()  # GPUs that anything was asked of
        self._current = threading.local()

    def break_down(self) -> None:
        self.status = BROKEN

    def check(self, right: bool = True, status: int = INVALID_VALUE) -> None:
        if self.status or not right:
            raise CudaError(self.status or status)

    def driverGetVersion(self) -> int:
        return self.driver

    def getDeviceCount(self) -> int:
        self.check(self.gpus > 0, NO_DEVICE)
        return self.gpus

    def getDeviceProperties(self, index: int) -> dict[str, bytes]:
        self.check(index < self.gpus)
        return {"name": b"Test GPU"}

    def setDevice(self, index: int) -> None:
        self.check(index < self.gpus)
        self._current.index = index

    def getDevice(self) -> int:
        return getattr(self._current, "index", 0)

    def memGetInfo(self) -> tuple[int, int]:
        used = sum(memory.nbytes for memory in self.allocated.values())
        return self.memory_bytes - used, self.memory_bytes

    def malloc(self, size: int) -> int:
        self.used.add(self.getDevice())
        self.check(size <= self.memGetInfo()[0], NO_MEMORY)
        memory = np.empty(size, np.uint8)
        self.allocated[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free(self, pointer: int) -> None:
        self.check(pointer in self.allocated)
        del self.allocated[pointer]

    def hostRegister(self, address: int, size: int, flags: int) -> None:
        self.check(sum(self.registered.values()) + size <= self.register_bytes_max, NO_MEMORY)
        assert flags == 0
        self.used.add(self.getDevice())
        for start, length in self.registered.items():
            self.check(address + size <= start or start + length <= address, TAKEN)
        self.registered[address] = size

    def hostUnregister(self, address: int) -> None:
        self.check(address in self.registered)
        del self.registered[address]

    def memcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.check()
        host, gpu = (source, to) if kind == self.memcpyHostToDevice else (to, source)
        self.check(any(a <= gpu and gpu + size <= a + m.nbytes for a, m in self.allocated.items()))
        for start, length in self.registered.items():
            inside = start <= host and host + size <= start + length
            self.check(inside or host + size <= start or host >= start + length)
        ctypes.memmove(to, source, size)
        self.copies.append((size, stream))


class _Stream:
    def __init__(self, runtime: Runtime, *, non_blocking: bool) -> None:
        assert non_blocking
        runtime.used.add(runtime.getDevice())
        runtime.streams += 1
        self.ptr = runtime.streams
        self._runtime = runtime

    def synchronize(self) -> None:
        self._runtime.waited.append(self.ptr)
        self._runtime.check()


def make_cupy(runtime: Runtime) -> Any:
    """What stands for the module `cupy`."""

    def stream(*, non_blocking: bool) -> _Stream:
        return _Stream(runtime, non_blocking=non_blocking)

    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Stream=stream))
