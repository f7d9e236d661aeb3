"""The arena of a GPU, on a CUDA runtime that is process memory: addresses, streams and errors.

That real GPUs do the same is what tests/gpu shows, on a machine that has one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from kvproto.errors import FieldError
from kvserver.tiers import cuda
from kvserver.tiers.cuda import CudaDevice
from kvserver.tiers.device import DeviceArena
from kvserver.tiers.errors import TierError
from tests.support.cuda import Runtime, make_cupy

SIZE = 1 << 20
STEP = 64 << 10


def noise(length: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.Generator(np.random.SFC64(seed)).integers(0, 256, length, np.uint8)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setitem(sys.modules, "cupy", make_cupy(runtime))
    monkeypatch.setattr(cuda, "PIN_BYTES", STEP)
    return runtime


@pytest.fixture
def device(runtime: Runtime) -> Iterator[CudaDevice]:
    device = CudaDevice.open(0, SIZE)
    yield device
    runtime.status = 0
    device.close()
    assert runtime.allocated == runtime.registered == {}


def test_what_is_uploaded_is_downloaded_at_any_offset(device: CudaDevice, runtime: Runtime) -> None:
    arena: DeviceArena = device
    assert (arena.name, arena.data_bytes) == ("cuda:0 (Test GPU)", SIZE)
    source = noise(100_001)
    device.upload(4097, source[1:])
    target = np.zeros(100_002, np.uint8)
    device.download(4097, target[2:])
    assert np.array_equal(target[2:], source[1:])
    assert target[:2].tolist() == [0, 0]
    assert runtime.waited == [1, 1]  # each call has waited for its copy


def test_each_thread_has_a_stream(device: CudaDevice, runtime: Runtime) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            data, back = noise(5000, seed), np.empty(5000, np.uint8)
            for _ in range(5):
                device.upload(8192 * seed, data)
                device.download(8192 * seed, back)
                assert np.array_equal(back, data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted({stream for _, stream in runtime.copies}) == [1, 2, 3, 4]


def test_host_memory_is_pinned_in_steps_and_copies_are_cut_there(
    device: CudaDevice, runtime: Runtime
) -> None:
    host = noise(3 * STEP + 5000)
    assert device.pin(host, 0, 0) == 0
    assert device.pin(host, 0, STEP - 1) == 0
    assert device.pin(host, 0, 2 * STEP + 1) == 2 * STEP
    assert sorted(runtime.registered.values()) == [STEP, STEP]
    for start, length in ((STEP - 1, STEP + 2), (2 * STEP - 1, 2), (0, host.nbytes), (STEP, 10)):
        device.upload(0, host[start : start + length])
        back = np.zeros(length, np.uint8)
        device.download(0, back)  # memory of its own, pinned nowhere
        assert np.array_equal(back, host[start : start + length])
    device.download(0, host[STEP - 5 : STEP + 5])
    sizes = [size for size, _ in runtime.copies]
    assert sizes[:4] == [1, STEP, 1, STEP + 2]
    assert sizes[-2:] == [5, 5]
    assert device.pin(host, 2 * STEP, host.nbytes) == host.nbytes
    assert sum(runtime.registered.values()) == host.nbytes


def test_pinning_that_is_refused_leaves_what_is_pinned(
    device: CudaDevice, runtime: Runtime
) -> None:
    host = noise(4 * STEP)
    device.pin(host, 0, 0)
    runtime.register_bytes_max = 2 * STEP
    with pytest.raises(TierError, match="cudaHostRegister of 65536 bytes: cudaErrorMemoryAll"):
        device.pin(host, 0, host.nbytes)
    assert len(runtime.registered) == 2
    device.upload(0, host)
    back = np.zeros(host.nbytes, np.uint8)
    device.download(0, back)
    assert np.array_equal(back, host)


def test_an_error_in_a_copy_names_the_device_and_cudas_error(
    device: CudaDevice, runtime: Runtime
) -> None:
    device.upload(0, noise(10))
    runtime.waited.clear()
    runtime.break_down()
    with pytest.raises(TierError, match=r"upload to cuda:0 \(Test GPU\): cudaErrorIllegalAddress"):
        device.upload(0, noise(10))
    with pytest.raises(TierError, match=r"download from cuda:0 .*cudaErrorIllegalAddress"):
        device.download(0, np.zeros(10, np.uint8))
    assert runtime.waited == [1, 1]  # waited for all the same


def test_the_bounds_are_checked_and_a_closed_device_fails(runtime: Runtime) -> None:
    device = CudaDevice.open(0, SIZE)
    for offset, length in ((-1, 10), (SIZE - 9, 10), (SIZE, 1)):
        with pytest.raises(AssertionError):
            device.upload(offset, noise(length))
        with pytest.raises(AssertionError):
            device.download(offset, noise(length))
    device.close()
    device.close()
    assert runtime.allocated == {}
    with pytest.raises(TierError, match="closed"):
        device.download(0, np.zeros(10, np.uint8))


def test_a_device_that_broke_down_closes_without_a_word(runtime: Runtime) -> None:
    device = CudaDevice.open(0, SIZE)
    device.pin(noise(STEP), 0, STEP)
    runtime.break_down()
    device.close()


def test_a_stop_does_not_wait_for_ever_for_unpinning(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice.open(0, SIZE)
    host = noise(4 * STEP)
    assert device.pin(host, 0, host.nbytes) == host.nbytes
    monkeypatch.setattr(cuda, "UNPIN_S", 0.0)
    device.close()
    assert runtime.allocated == {}
    assert len(runtime.registered) == 4


def test_more_than_the_gpu_has_free_is_refused_by_name(runtime: Runtime) -> None:
    with pytest.raises(FieldError, match="device_bytes is 2147483648, must be what") as has:
        CudaDevice.open(0, 2 << 30)
    assert "cuda:0 (Test GPU) has free (1073741824 of 1073741824 bytes)" in str(has.value)
    assert "cudaErrorMemoryAllocation: out of memory" in str(has.value)


def test_a_gpu_that_is_not_there_is_refused_by_name(runtime: Runtime) -> None:
    runtime.gpus = 2
    CudaDevice.open(1, SIZE).close()
    with pytest.raises(FieldError, match="device is 'cuda:2', must be cuda:0 to cuda:1 here"):
        CudaDevice.open(2, SIZE)
    runtime.gpus = 0
    with pytest.raises(TierError, match="device cuda:0: cudaErrorNoDevice"):
        CudaDevice.open(0, SIZE)
    runtime.driver = 0
    with pytest.raises(TierError, match="device cuda:0: this machine has no driver"):
        CudaDevice.open(0, SIZE)


def test_no_gpu_is_touched_but_the_one_that_was_asked_for(runtime: Runtime) -> None:
    runtime.gpus = 3
    device = CudaDevice.open(2, SIZE)
    host = noise(2 * STEP)

    def work() -> None:
        device.pin(host, 0, host.nbytes)
        device.upload(0, host)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    device.download(0, host)
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join()
    assert len(runtime.copies) == 4
    assert runtime.used == {2}
    assert runtime.allocated == runtime.registered == {}


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TierError, match=r"install kvserver\[cuda13\].* or say device memory \("):
        CudaDevice.open(0, SIZE)


def test_a_cupy_that_cannot_be_loaded_says_why_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "cupy":
                raise ImportError("=====\na page of advice\n=====") from OSError("no libfoo.so")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(TierError, match=r"\(no libfoo.so\)$"):
        CudaDevice.open(0, SIZE)


def test_the_runtime_refuses_as_cuda_does() -> None:
    """The stand-in itself: a copy that is half in registered memory."""
    runtime = Runtime()
    pointer, host = runtime.malloc(100), noise(100)
    runtime.hostRegister(host.ctypes.data, 50, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="InvalidValue"):
        runtime.memcpyAsync(pointer, host.ctypes.data + 40, 20, 1, 0)
    runtime.memcpyAsync(pointer, host.ctypes.data + 40, 10, 1, 0)
    assert isinstance(make_cupy(runtime), SimpleNamespace)
    runtime.free(pointer)
