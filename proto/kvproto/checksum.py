"""Checksums of cells: xxh3-64, computed where the bytes stand.

A slot is payload, then trailer: one checksum a cell, u64 little-endian, in cell order. The root is
the checksum of the trailer's bytes; it stands in the directory entry or journal record. So one u64
vouches for a whole block, and a reader of any region checks its own cells against the trailer and
the trailer against the root.

Rule 1: a checksum is of a contiguous cell; nothing is copied to compute one.
Rule 2: xxh3 guards against accidents (torn writes, bit flips, late writers), not against malice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvproto.cells import Bytes, Checksums, hash_rows
from kvproto.grid import CHECKSUM_BYTES

_digest = cast("Callable[[object], int]", xxh3_64_intdigest)  # takes any contiguous buffer


def checksum(view: Bytes | bytes | memoryview) -> int:
    """xxh3-64 (seed 0) of a contiguous buffer."""
    return _digest(view)


def cell_checksums(
    slot: Bytes, cell_bytes: int, indices: Sequence[int] | npt.NDArray[np.integer] | None = None
) -> Checksums:
    """Checksums of the cells `indices` of a slot (all cells of the view when None), in that order.

    `slot` is one-dimensional and contiguous and begins with the payload.
    """
    whole = slot.size // cell_bytes
    cells = slot[: whole * cell_bytes].reshape(whole, cell_bytes)
    if indices is not None:
        return np.fromiter((_digest(cells[i]) for i in indices), np.uint64, len(indices))
    sums = np.empty(whole, np.uint64)
    hash_rows(cells, sums)
    return sums


def grid_checksums(cells: Bytes) -> Checksums:
    """Checksums of an array [layers, heads, ...], flat and in layer-major order.

    What follows the first two axes is one cell and must be contiguous; layers and heads may be
    strided, as a region of a larger grid is.
    """
    layers, heads = cells.shape[:2]
    sums = np.empty(layers * heads, np.uint64)
    rows = _rows(cells)
    if layers == 1 or rows.strides[0] == heads * rows.strides[1]:
        flat = (layers * heads, rows.shape[2])
        hash_rows(np.lib.stride_tricks.as_strided(rows, flat, rows.strides[1:]), sums)
    else:
        for layer, row in enumerate(rows):
            hash_rows(row, sums[layer * heads : (layer + 1) * heads])
    return sums


def _rows(cells: Bytes) -> Bytes:
    """[layers, heads, bytes], a view."""
    size = 1
    for length, stride in zip(cells.shape[:1:-1], cells.strides[:1:-1], strict=True):
        if length > 1 and stride != size:
            raise ValueError("cells: they are not contiguous")
        size *= length
    shape = (*cells.shape[:2], size)
    return np.lib.stride_tricks.as_strided(cells, shape, (*cells.strides[:2], 1))


def root_of(trailer: Bytes | bytes | memoryview) -> int:
    """The root over a slot's trailer: its bytes, checksums as u64 little-endian in cell order."""
    return checksum(trailer)


def trailer_of(slot: Bytes, cells: int, cell_bytes: int) -> Bytes:
    """The bytes of a slot's trailer, a view."""
    start = cells * cell_bytes
    return slot[start : start + cells * CHECKSUM_BYTES]
