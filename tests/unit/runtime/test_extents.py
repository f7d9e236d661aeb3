"""The memory of a client that the agent may be sent to."""

from __future__ import annotations

import numpy as np
import pytest

from kvproto.errors import FieldError
from kvproto.nixlib import Memory
from kvserver.runtime.extents import EXTENTS_MAX, Extents

ROWS = [[8192, 100, 0, 0], [100, 50, 0, 0], [1 << 40, 4096, 1, 2], [1 << 41, 4096, 1, 5]]


def kind_of(*pieces: tuple[int, int]) -> tuple[Memory, int]:
    addresses, sizes = np.array(pieces, np.uint64).T
    return Extents(np.array(ROWS, np.uint64)).kind_of(addresses, sizes)


def test_pieces_within_extents_of_one_kind() -> None:
    assert kind_of((100, 50), (8192, 1), (8291, 1)) == (Memory.DRAM, 0)
    assert kind_of((1 << 40, 4096)) == (Memory.VRAM, 2)


@pytest.mark.parametrize(
    "piece",
    [(99, 1), (149, 2), (150, 1), (0, 1), (8191, 2), (100, 8192), ((1 << 64) - 1, 2), (5000, 1)],
)
def test_pieces_outside(piece: tuple[int, int]) -> None:
    with pytest.raises(FieldError, match="within what the client attached"):
        kind_of((8192, 1), piece)


def test_pieces_of_two_kinds() -> None:
    for pair in (((100, 1), (1 << 40, 1)), ((1 << 40, 1), (1 << 41, 1))):
        with pytest.raises(FieldError, match="one kind and device"):
            kind_of(*pair)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[0, 0, 0, 0]],
        [[(1 << 64) - 10, 20, 0, 0]],
        [[100, 50, 2, 0]],
        [[100, 50, 1, 1 << 16]],
        [[100, 50, 0, 0], [149, 50, 0, 0]],
        [[i * 10, 5, 0, 0] for i in range(EXTENTS_MAX + 1)],
    ],
    ids=["none", "empty", "wraps", "kind", "device", "overlap", "many"],
)
def test_extents_that_cannot_be_right(rows: list[list[int]]) -> None:
    with pytest.raises(FieldError) as caught:
        Extents(np.array(rows, np.uint64).reshape(-1, 4))
    assert caught.value.field == "extents"
