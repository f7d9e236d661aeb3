"""Carries out the core's directory instructions on the host arena: entries and slot trailers.

Rule 1: a slot's trailer holds the checksums of its committed cells before its entry is VALID.
Rule 2: a cell's checksum is written once per life of its slot: the core tells of new cells only.
Rule 3: what is told of a block's root comes from its entry, which a CRC guards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvproto.namespace import NamespaceSpec
from kvserver.core.events import CellsCommitted, Place, Tier
from kvserver.runtime import failpoints
from kvserver.tiers.checksums import slot_root, store_checksums
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.host import HostArena

Checksums = npt.NDArray[np.uint64]


class HostEntries:
    """Used on the loop's thread only. `spec_of` gives the spec of a namespace's handle."""

    def __init__(self, host: HostArena, spec_of: Callable[[int], NamespaceSpec]) -> None:
        self._host = host
        self._spec_of = spec_of

        self.bytes_committed = 0

    def reserved(self, place: Place, clients: tuple[int, ...]) -> None:
        self._host.write_reserved(place.offset, place.slot_bytes, place.generation, clients)

    def invalid(self, place: Place) -> None:
        self._host.write_invalid(place.offset, place.generation)

    def committed(self, instruction: CellsCommitted, checksums: Checksums) -> None:
        """Store the checksums of new cells, in the region's cell order; VALID with the last."""
        place, info = instruction.place, instruction.info
        spec = self._spec_of(info.namespace)
        grid = spec.grid
        cell_bytes = grid.cell_bytes(info.tokens)
        slot = self._host.slot(place.offset, place.slot_bytes)
        failpoints.hit("commit.before_trailer")
        cells = grid.cell_indices(instruction.region)
        store_checksums(slot, grid.cells, cell_bytes, cells, checksums)
        self.bytes_committed += instruction.region.cells * cell_bytes
        if instruction.complete:
            failpoints.hit("commit.before_valid")
            self._host.write_valid(
                place.offset,
                place.slot_bytes,
                place.generation,
                spec.tag,
                info.key,
                info.parent,
                info.tokens,
                slot_root(slot, grid.cells, cell_bytes),
            )

    def root(self, place: Place) -> int:
        """The root of a complete block in the host tier; 0 when its entry is not what it was."""
        if place.tier is not Tier.HOST:
            return 0
        entry = self._host.read_entry(place.offset)
        if isinstance(entry, ValidEntry) and entry.generation == place.generation:
            return entry.root
        return 0
