"""The contract of a Transfer over each implementation, and the scripted faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvserver.transfer.base import Transfer, TransferError, check_extent
from kvserver.transfer.faulty import Fault, FaultKind, FaultyTransfer
from kvserver.transfer.loopback import LoopbackTransfer

SIZE = 4096
ARENA_ID = bytes(range(16))


def loopback() -> Transfer:
    return LoopbackTransfer(np.zeros(SIZE, np.uint8), arena_id=ARENA_ID)


def faultless() -> Transfer:
    return FaultyTransfer(loopback(), {})


@pytest.fixture(params=[loopback, faultless])
def transfer(request: pytest.FixtureRequest) -> Transfer:
    make: Callable[[], Transfer] = request.param
    return make()


def noise(length: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def read(transfer: Transfer, offset: int, length: int) -> bytes:
    into = bytearray(length)
    transfer.read(offset, memoryview(into))
    return bytes(into)


def test_what_was_written_is_read(transfer: Transfer) -> None:
    transfer.write(100, memoryview(noise(1000)))
    assert read(transfer, 100, 1000) == noise(1000)
    assert read(transfer, 0, 100) == bytes(100)
    assert read(transfer, 1100, 100) == bytes(100)
    assert (transfer.arena_id, transfer.data_bytes) == (ARENA_ID, SIZE)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 4), (SIZE, 1), (SIZE - 3, 4), (2**63, 1), (0, SIZE + 1)]
)
def test_extents_outside_are_refused(transfer: Transfer, offset: int, length: int) -> None:
    with pytest.raises(TransferError, match="outside"):
        transfer.read(offset, memoryview(bytearray(length)))
    with pytest.raises(TransferError, match="outside"):
        transfer.write(offset, memoryview(bytes(length)))


def test_empty_extents_are_fine(transfer: Transfer) -> None:
    transfer.write(SIZE, memoryview(b""))
    assert read(transfer, SIZE, 0) == b""


def test_negative_length_is_refused() -> None:
    with pytest.raises(TransferError):
        check_extent(4, -1, SIZE)


def test_arena_must_be_flat_bytes() -> None:
    with pytest.raises(TransferError, match="must be flat uint8"):
        LoopbackTransfer(np.zeros(4, np.uint16), arena_id=ARENA_ID)  # type: ignore[arg-type]


# ---- faults ------------------------------------------------------------------------------------


def faulty(*faults: Fault | None) -> tuple[FaultyTransfer, LoopbackTransfer, list[float]]:
    inner = LoopbackTransfer(np.zeros(SIZE, np.uint8), arena_id=ARENA_ID)
    slept: list[float] = []
    script = {call: fault for call, fault in enumerate(faults) if fault is not None}
    return FaultyTransfer(inner, script, sleep=slept.append), inner, slept


def test_fail_moves_nothing_and_only_once() -> None:
    transfer, inner, _ = faulty(Fault(FaultKind.FAIL))
    with pytest.raises(TransferError, match="scripted failure"):
        transfer.write(0, memoryview(noise(64)))
    assert read(inner, 0, 64) == bytes(64)
    transfer.write(0, memoryview(noise(64)))
    assert read(inner, 0, 64) == noise(64)
    assert transfer.log == [(0, FaultKind.FAIL)]
    assert transfer.calls == 2


def test_tear_moves_a_part() -> None:
    transfer, inner, _ = faulty(Fault(FaultKind.TEAR, keep_bytes=10))
    with pytest.raises(TransferError, match="tear after 10 bytes"):
        transfer.write(0, memoryview(noise(64)))
    assert read(inner, 0, 64) == noise(64)[:10] + bytes(54)


def test_torn_read_leaves_the_rest_alone() -> None:
    transfer, inner, _ = faulty(Fault(FaultKind.TEAR, keep_bytes=10))
    inner.write(0, memoryview(noise(64)))
    into = bytearray(b"x" * 64)
    with pytest.raises(TransferError):
        transfer.read(0, memoryview(into))
    assert bytes(into) == noise(64)[:10] + b"x" * 54


@pytest.mark.parametrize("bit", [0, 7, 8, 511, 512 + 3])
def test_flip_changes_one_bit_silently(bit: int) -> None:
    transfer, inner, _ = faulty(
        Fault(FaultKind.FLIP, bit=bit), None, Fault(FaultKind.FLIP, bit=bit)
    )
    data = noise(64)
    transfer.write(0, memoryview(data))
    flipped = bytearray(data)
    flipped[bit % 512 // 8] ^= 1 << bit % 8
    assert read(inner, 0, 64) == bytes(flipped)
    assert data == noise(64), "the caller's bytes are untouched"
    transfer.write(0, memoryview(data))
    assert read(transfer, 0, 64) == bytes(flipped)
    assert read(inner, 0, 64) == data


def test_delay_sleeps_then_moves() -> None:
    transfer, inner, slept = faulty(Fault(FaultKind.DELAY, delay_s=0.25))
    transfer.write(0, memoryview(noise(64)))
    assert slept == [0.25]
    assert read(inner, 0, 64) == noise(64)


def test_hang_lands_later() -> None:
    """A stopped peer: its deadline is no fence, its bytes arrive when it goes on."""
    transfer, inner, _ = faulty(Fault(FaultKind.HANG))
    with pytest.raises(TransferError) as caught:
        transfer.write(0, memoryview(noise(64)))
    assert not caught.value.terminal
    assert read(inner, 0, 64) == bytes(64)
    assert transfer.settle() == 1
    assert read(inner, 0, 64) == noise(64)
    assert transfer.settle() == 0
