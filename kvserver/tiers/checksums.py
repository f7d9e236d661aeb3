"""Checksums of slots: cells against the trailer, the trailer against the root.

The arithmetic is `kvproto.checksum`, which clients share; here stands what only the server does:
it stores checksums that writers sent, and verifies whole slots before it trusts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvproto.checksum import cell_checksums, root_of, trailer_of

__all__ = ["cell_checksums", "root_of", "slot_root", "store_checksums", "verify_slot"]

Bytes = npt.NDArray[np.uint8]


def store_checksums(
    slot: Bytes,
    cells: int,
    cell_bytes: int,
    indices: Sequence[int] | npt.NDArray[np.integer],
    checksums: npt.NDArray[np.uint64],
) -> None:
    """Write the checksums of the cells `indices` into the slot's trailer."""
    trailer = trailer_of(slot, cells, cell_bytes).view("<u8")
    trailer[np.asarray(indices, np.intp)] = checksums


def slot_root(slot: Bytes, cells: int, cell_bytes: int) -> int:
    """The root of the slot's trailer as it stands."""
    return root_of(trailer_of(slot, cells, cell_bytes))


def verify_slot(slot: Bytes, cells: int, cell_bytes: int, root: int) -> bool:
    """True if the trailer has this root and every cell the checksum that the trailer says."""
    trailer = trailer_of(slot, cells, cell_bytes)
    if root_of(trailer) != root:
        return False
    payload = slot[: cells * cell_bytes]
    return bool(np.array_equal(cell_checksums(payload, cell_bytes), trailer.view("<u8")))
