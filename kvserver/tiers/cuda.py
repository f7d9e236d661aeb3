"""A device arena in the memory of one GPU, by CuPy.

Rule 1: one plain allocation (`cudaMalloc`), made at the start and kept: never managed memory, which
        the driver would page, and never CuPy's pool. A GPU that has not so much free is an error
        then, not later.
Rule 2: each calling thread copies on a non-blocking stream of its own and waits for it: copies of
        several threads overlap, none waits for what other work of the process does on the GPU, and
        the interpreter runs on meanwhile. A copy that fails is waited for all the same: nothing may
        write host memory once the call has returned. So there is no deadline either: that a GPU
        is lost, its driver says.
Rule 3: host memory is pinned in whole steps of PIN_BYTES, counted from its begin, the last one as
        long as it is; a copy is cut where the steps meet. CUDA refuses one that is partly in
        pinned memory, and so none ever is, however far the pinning has come.
Rule 4: a thread is put on the GPU before it asks for anything, and left there. Putting it back, as
        `cupy.cuda.Device` does, would make CUDA set up a context on the other GPU as well.
Rule 5: whatever CUDA says is a TierError that holds the error's name. Most errors in a copy leave
        the process without a usable CUDA context, so nothing here tries again.

Nothing here is imported before a GPU is asked for. CuPy brings its own CUDA runtime: the machine
needs a driver, no toolkit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError
from kvserver.tiers.errors import TierError

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, for which CuPy has no name
UNPIN_S = 5.0  # of a stop, at 20 ms a GiB: what is left then, the process's end unpins
PIN_BYTES = 1 << 30  # so much at once: a stop waits for one step at most
Bytes = npt.NDArray[np.uint8]


class CudaDevice:
    """See the module. `open` makes one."""

    def __init__(self, cuda: Any, index: int, name: str, pointer: int, data_bytes: int) -> None:
        self.name = name
        self.data_bytes = data_bytes
        self._cuda = cuda
        self._runtime = cuda.runtime
        self._index = index
        self._pointer = pointer  # 0: closed
        self._streams = threading.local()
        self._host: tuple[int, int] = (0, 0)  # address and end of what is pinned in steps
        self._pinned: list[int] = []  # addresses of pinned steps

    @classmethod
    def open(cls, index: int, data_bytes: int) -> CudaDevice:
        """Take `data_bytes` of GPU `index`, of those that CUDA_VISIBLE_DEVICES leaves.

        FieldError `device` when there is no such GPU, `device_bytes` when it has not so much free;
        TierError when CuPy, the driver or the GPU does not work.
        """
        cuda = _load()
        runtime = cuda.runtime
        with _said(runtime, f"device cuda:{index}"):
            if not runtime.driverGetVersion():  # else CUDA would call it too old
                raise TierError(f"device cuda:{index}: this machine has no driver for a GPU")
            count = runtime.getDeviceCount()
        if index >= count:
            raise FieldError("device", f"cuda:{index}", f"cuda:0 to cuda:{count - 1} here")
        with _said(runtime, f"device cuda:{index}"):
            runtime.setDevice(index)
            model = runtime.getDeviceProperties(index)["name"].decode()
            name = f"cuda:{index} ({model})"
            free, total = runtime.memGetInfo()
            try:
                pointer = runtime.malloc(data_bytes)
            except runtime.CUDARuntimeError as error:
                if error.status != OUT_OF_MEMORY:
                    raise
                has = f"what {name} has free ({free} of {total} bytes): {error}"
                raise FieldError("device_bytes", data_bytes, has) from error
        return cls(cuda, index, name, pointer, data_bytes)

    def upload(self, offset: int, source: Bytes) -> None:
        self._copy(offset, source, self._runtime.memcpyHostToDevice)

    def download(self, offset: int, target: Bytes) -> None:
        self._copy(offset, target, self._runtime.memcpyDeviceToHost)

    def _copy(self, offset: int, host: Bytes, kind: int) -> None:
        if not self._pointer:
            raise TierError("the device is closed")
        assert 0 <= offset <= self.data_bytes - host.nbytes, (offset, host.nbytes)
        assert host.flags.c_contiguous
        up = kind == self._runtime.memcpyHostToDevice
        at = self._pointer + offset
        with _said(self._runtime, f"{'upload to' if up else 'download from'} {self.name}"):
            stream = self._stream()
            try:
                for address, length in self._parts(host.ctypes.data, host.nbytes):
                    target, source = (at, address) if up else (address, at)
                    self._runtime.memcpyAsync(target, source, length, kind, stream.ptr)
                    at += length
            finally:
                stream.synchronize()

    def _parts(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """A piece of host memory, cut where steps of pinning meet."""
        base, end = self._host
        stop = address + length
        while base <= address < end and (edge := _edge(address, base)) < stop:
            yield address, edge - address
            address = edge
        if address < stop:
            yield address, stop - address

    def _stream(self) -> Any:
        """The calling thread's, made when it first copies; it goes with the thread."""
        stream = getattr(self._streams, "stream", None)
        if stream is None:
            self._runtime.setDevice(self._index)
            stream = self._streams.stream = self._cuda.Stream(non_blocking=True)
        return stream

    def pin(self, host: Bytes, start: int, stop: int) -> int:
        address = host.ctypes.data
        self._host = (address, address + host.nbytes)
        while start < stop:
            length = min(PIN_BYTES, host.nbytes - start)
            if start + length > stop:
                break  # not yet
            what = f"cudaHostRegister of {length} bytes"
            with _said(self._runtime, what):
                self._runtime.setDevice(self._index)
                self._runtime.hostRegister(address + start, length, 0)
            self._pinned.append(address + start)
            start += length
        return start

    def close(self) -> None:
        if not self._pointer:
            return
        pointer, self._pointer = self._pointer, 0
        steps, self._pinned = self._pinned, []
        # Where the GPU has failed these fail as well: the process's end does it then.
        with contextlib.suppress(self._runtime.CUDARuntimeError):
            self._runtime.setDevice(self._index)
            self._runtime.free(pointer)
            deadline = time.monotonic() + UNPIN_S
            while steps and time.monotonic() < deadline:
                self._runtime.hostUnregister(steps.pop())


def _edge(address: int, base: int) -> int:
    """Where the step that holds `address` ends."""
    return base + ((address - base) // PIN_BYTES + 1) * PIN_BYTES


def _load() -> Any:
    """CuPy's part that knows CUDA."""
    try:
        import cupy
    except ImportError as error:  # CuPy tells a missing library in a page of text around its cause
        reason = error.__cause__ or error
        raise TierError(
            "device cuda needs CuPy: install kvserver[cuda13], or kvserver[cuda12] where the driver"
            f" is older; or say device memory ({reason})"
        ) from error
    return cupy.cuda


@contextlib.contextmanager
def _said(runtime: Any, what: str) -> Iterator[None]:
    """What CUDA refuses, as a TierError."""
    try:
        yield
    except runtime.CUDARuntimeError as error:
        raise TierError(f"{what}: {error}") from error
