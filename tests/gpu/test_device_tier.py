"""The device tier in a GPU's memory: the arena's copies, and a whole hub on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from kvproto.errors import FieldError
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.tiers import cuda
from kvserver.tiers.cuda import CudaDevice
from kvserver.tiers.errors import TierError
from tests.support import device_tier as tier
from tests.support.server import ServerProcess

MIB = 1 << 20
SIZE = 256 * MIB
Bytes = npt.NDArray[np.uint8]
Serve = Callable[..., ServerProcess]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice.open(0, SIZE)
    yield device
    device.close()


def noise(length: int, seed: int = 1) -> Bytes:
    random = np.random.Generator(np.random.SFC64(seed))
    return np.frombuffer(random.bytes(length), np.uint8).copy()


def moves(device: CudaDevice, offset: int, source: Bytes, target: Bytes) -> None:
    """Up and down again; what stands beside the target stays."""
    frame = np.full(target.nbytes + 2, 0x5A, np.uint8)
    inner = frame[1:-1]
    device.upload(offset, source)
    device.download(offset, inner)
    assert np.array_equal(inner, source)
    assert (frame[0], frame[-1]) == (0x5A, 0x5A)
    device.download(offset, target)
    assert np.array_equal(target, source)


def test_extents_of_any_size_and_alignment_come_back_byte_for_byte(device: CudaDevice) -> None:
    assert device.name.startswith("cuda:0 (")
    host, back = noise(48 * MIB), np.zeros(48 * MIB, np.uint8)
    random = np.random.Generator(np.random.SFC64(7))
    sizes = [1, 2, 4095, 4096, 4097, 65_535, 65_536, 65_537, MIB - 1, MIB + 1, 40 * MIB + 1]
    sizes += random.integers(1, 2 * MIB, 60).tolist()
    for length in sizes:
        at = int(random.integers(0, host.nbytes - length + 1))
        offset = int(random.integers(0, SIZE - length + 1))
        moves(device, offset, host[at : at + length], back[at : at + length])
    for shift in (0, 1):  # from the first to the last byte of the arena
        device.upload(SIZE - MIB - shift, host[shift : MIB + shift])
        device.download(SIZE - MIB - shift, back[shift : MIB + shift])
        assert np.array_equal(back[shift : MIB + shift], host[shift : MIB + shift])


def test_neighbours_on_the_device_are_left_alone(device: CudaDevice) -> None:
    before = noise(3 * MIB)
    device.upload(0, before)
    device.upload(MIB + 1, noise(MIB - 2, seed=2))
    after = np.zeros(3 * MIB, np.uint8)
    device.download(0, after)
    assert np.array_equal(after[: MIB + 1], before[: MIB + 1])
    assert np.array_equal(after[2 * MIB - 1 :], before[2 * MIB - 1 :])
    assert not np.array_equal(after, before)


def test_many_threads_copy_at_once(device: CudaDevice) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            data, room = noise(3 * MIB + seed, seed), 4 * MIB
            back = np.zeros(data.nbytes, np.uint8)
            for turn in range(8):
                moves(device, seed * room + turn, data, back)
                back[:] = 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_copies_across_pinned_steps_and_beyond(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses a copy that is partly in pinned memory: each is cut where the steps meet."""
    monkeypatch.setattr(cuda, "PIN_BYTES", 4 * MIB)
    pages = np.zeros(14 * MIB + 4096, np.uint8)
    start = -pages.ctypes.data % 4096
    host = pages[start : start + 14 * MIB]
    host[:] = noise(host.nbytes)
    assert device.pin(host, 0, 0) == 0
    assert device.pin(host, 0, 9 * MIB) == 8 * MIB
    expected = host.copy()
    back = np.zeros(host.nbytes, np.uint8)
    spans = [(0, host.nbytes), (4 * MIB - 1, 2), (8 * MIB - 5, 10), (MIB, 12 * MIB), (9 * MIB, MIB)]
    for at, length in spans:
        moves(device, 3, host[at : at + length], back[at : at + length])
        host[at : at + length] = 0
        device.download(3, host[at : at + length])
    assert np.array_equal(host, expected)
    assert device.pin(host, 8 * MIB, host.nbytes) == host.nbytes
    moves(device, 0, host, back)
    with pytest.raises(TierError, match=r"cudaHostRegister of .*cudaErrorHostMemoryAlreadyReg"):
        device.pin(host, 0, 4 * MIB)
    moves(device, 0, host, back)


def test_what_was_pinned_and_allocated_is_given_back() -> None:
    import cupy

    pages = np.zeros(8 * MIB + 4096, np.uint8)
    host = pages[-pages.ctypes.data % 4096 :][: 8 * MIB]
    CudaDevice.open(0, MIB).close()  # what the context itself takes
    free = cupy.cuda.runtime.memGetInfo()[0]
    for _ in range(2):
        device = CudaDevice.open(0, SIZE)
        assert cupy.cuda.runtime.memGetInfo()[0] <= free - SIZE
        assert device.pin(host, 0, host.nbytes) == host.nbytes  # refused if it were pinned still
        device.close()
    assert cupy.cuda.runtime.memGetInfo()[0] >= free


def test_more_than_the_card_has_is_refused_by_name() -> None:
    with pytest.raises(FieldError, match=r"device_bytes is .*, must be what cuda:0 \(.* has free"):
        CudaDevice.open(0, 4 << 40)
    with pytest.raises(FieldError, match="cudaErrorMemoryAllocation"):
        CudaDevice.open(0, 4 << 40)
    CudaDevice.open(0, MIB).close()  # the refusal has left nothing behind


def test_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(FieldError, match="device is 'cuda:99', must be cuda:0 to cuda:"):
        CudaDevice.open(99, MIB)


# ---- a whole hub


def test_hot_blocks_come_back_from_the_gpu(serve: Serve) -> None:
    server = serve(**tier.OPTIONS, device="cuda")
    tier.comes_back_whole(server.address)
    assert tier.tier_of(server.stats()).medium.startswith("cuda:0 (")
    assert server.wait_event("host_pinned")["bytes"] > 0


def test_a_bit_that_flips_on_the_gpu_is_a_miss() -> None:
    with tier.server_thread(device="cuda") as server:
        tier.wrong_bytes_are_dropped(server)


def test_a_killed_server_starts_with_an_empty_gpu(serve: Serve) -> None:
    """What is in memory stays; of what was on the GPU nothing is served, nor known."""
    server = serve(**tier.OPTIONS, device="cuda:0")
    tier.on_the_device(server.address)
    assert tier.tier_of(server.stats()).slots_committed == len(tier.HOT)
    server.kill()
    server.restart()
    assert tier.tier_of(server.stats()).bytes_used == 0
    assert tier.tier_of(server.stats(), pb.TIER_HOST).slots_committed > 0
    assert not tier.pull(server.address, tier.HOT).found.any()
    tier.push(server.address, tier.HOT)
    tier.heat(server.address)
    assert not server.stats().counters["incidents"]


def test_a_gpu_that_fails_ends_its_tier_and_nothing_else(serve: Serve) -> None:
    server = serve(**tier.OPTIONS, device="cuda", failpoints="device.download=errno:EIO@3")
    tier.on_the_device(server.address)
    assert np.count_nonzero(tier.pull(server.address, tier.HOT).found) < len(tier.HOT)
    server.wait_event("device_down")
    tier.push(server.address, tier.HOT)
    assert tier.pull(server.address, tier.HOT).found.all()
    assert server.terminate() == 0
