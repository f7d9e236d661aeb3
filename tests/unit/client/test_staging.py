"""Buffers that blocks pass through: where they lie, and how many are kept."""

from __future__ import annotations

import pytest

from kvclient.staging import ALIGN_BYTES, Buffers, aligned


@pytest.mark.parametrize("size", [1, 63, 4096, (1 << 20) + 1, 8 << 20])
def test_memory_of_ours_is_aligned(size: int) -> None:
    kept = [aligned(size) for _ in range(3)]  # at once: at different addresses
    for buffer in kept:
        assert buffer.shape == (size,)
        assert buffer.ctypes.data % ALIGN_BYTES == 0
        assert buffer.flags.writeable


def test_a_buffer_is_used_again_while_it_fits_the_bound() -> None:
    buffers = Buffers(bytes_max=3 << 20)
    first, second = buffers.take(2 << 20), buffers.take(2 << 20)
    address = first.ctypes.data
    assert address % ALIGN_BYTES == 0
    buffers.give_back(first)
    buffers.give_back(second)  # over the bound: it goes
    assert buffers.kept_bytes == 2 << 20
    assert buffers.take(2 << 20).ctypes.data == address
    assert buffers.kept_bytes == 0
