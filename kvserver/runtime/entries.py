"""Carries out the core's directory instructions on the host arena: entries and slot trailers.

Rule 1: a slot's trailer holds the checksums of its committed cells before its entry is VALID.
Rule 2: a cell's checksum is written once per life of its slot: a later Commit of the same cell
with another checksum is a mismatch, the first stays.
Rule 3: what is told of a block's root comes from its entry, which a CRC guards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvproto.checksum import root_of, trailer_of
from kvproto.namespace import NamespaceSpec
from kvserver.core.events import CellsCommitted, Place, Tier
from kvserver.runtime import failpoints
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.host import HostArena

Checksums = npt.NDArray[np.uint64]


class HostEntries:
    """Used on the loop's thread only. `spec_of` gives the spec of a namespace's handle."""

    def __init__(self, host: HostArena, spec_of: Callable[[int], NamespaceSpec]) -> None:
        self._host = host
        self._spec_of = spec_of
        self._masks: dict[int, int] = {}  # offset of a filling slot -> cells with a checksum

    def reserved(self, place: Place, clients: tuple[int, ...]) -> None:
        self._host.write_reserved(place.offset, place.slot_bytes, place.generation, clients)

    def invalid(self, place: Place) -> None:
        self._masks.pop(place.offset, None)
        self._host.write_invalid(place.offset, place.generation)

    def committed(self, instruction: CellsCommitted, checksums: Checksums) -> bool:
        """Store checksums, in the region's cell order; False when earlier ones differ."""
        place, info = instruction.place, instruction.info
        spec = self._spec_of(info.namespace)
        grid = spec.grid
        cell_bytes = grid.cell_bytes(info.tokens)
        slot = self._host.slot(place.offset, place.slot_bytes)
        trailer = trailer_of(slot, grid.cells, cell_bytes)
        failpoints.hit("commit.before_trailer")
        agreed = self._store(place.offset, trailer, instruction, checksums)
        if instruction.complete:
            failpoints.hit("commit.before_valid")
            self._masks.pop(place.offset, None)
            self._host.write_valid(
                place.offset,
                place.slot_bytes,
                place.generation,
                spec.tag,
                info.key,
                info.parent,
                info.tokens,
                root_of(trailer),
            )
        return agreed

    def _store(
        self,
        offset: int,
        trailer: npt.NDArray[np.uint8],
        instruction: CellsCommitted,
        checksums: Checksums,
    ) -> bool:
        grid = self._spec_of(instruction.info.namespace).grid
        stored = trailer.view("<u8")
        cells = grid.cell_indices(instruction.region)
        at: slice | list[int]
        at = slice(cells.start, cells.stop) if isinstance(cells, range) else cells
        mask, new = self._masks.get(offset, 0), grid.mask(instruction.region)
        if not mask & new:
            stored[at] = checksums
            self._masks[offset] = mask | new
            return True
        known = np.fromiter(((mask >> c) & 1 for c in cells), np.bool_, len(cells))
        before = stored[at]
        stored[at] = np.where(known, before, checksums)
        self._masks[offset] = mask | new
        return bool(np.array_equal(before[known], checksums[known]))

    def root(self, place: Place) -> int:
        """The root of a complete block in the host tier; 0 when its entry is not what it was."""
        if place.tier is not Tier.HOST:
            return 0
        entry = self._host.read_entry(place.offset)
        if isinstance(entry, ValidEntry) and entry.generation == place.generation:
            return entry.root
        return 0
