"""Carries out the core's directory instructions on the host arena: entries and slot trailers.

Rule 1: a slot's trailer holds the checksums of its committed cells before its entry is VALID.
Rule 2: a cell's checksum is written once per life of its slot: the core tells of new cells only.
Rule 3: what is told of a block's root comes from its entry, which a CRC guards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvproto.checksum import root_of
from kvproto.grid import CHECKSUM_BYTES, Region
from kvproto.namespace import NamespaceSpec
from kvserver.core.events import (
    Place,
    Tier,
)
from kvserver.core.instructions import CellsCommitted, CellsPresent
from kvserver.runtime import failpoints
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.host import HostArena

LAYOUTS_MAX = 1024
Checksums = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a region's checksums lie in a slot; `run` is their byte range if they are adjacent."""

    tag: bytes
    trailer_offset: int
    trailer_bytes: int
    region_bytes: int
    cells: npt.NDArray[np.intp]
    run: slice | None

    @classmethod
    def of(cls, spec: NamespaceSpec, region: Region, tokens: int) -> _Layout:
        grid = spec.grid
        cells = np.asarray(grid.cell_indices(region), np.intp)
        first, last = int(cells[0]), int(cells[-1])
        run = None
        if last - first + 1 == cells.size:
            run = slice(first * CHECKSUM_BYTES, (last + 1) * CHECKSUM_BYTES)
        return cls(
            spec.tag,
            grid.trailer_offset(tokens),
            grid.trailer_bytes,
            grid.region_bytes(region, tokens),
            cells,
            run,
        )


class HostEntries:
    """Used on the loop's thread only. `spec_of` gives the spec of a namespace's handle."""

    def __init__(self, host: HostArena, spec_of: Callable[[int], NamespaceSpec]) -> None:
        self._host = host
        self._spec_of = spec_of

        self._layouts: dict[tuple[int, Region, int], _Layout] = {}
        self.bytes_committed = 0

    def reserved(self, place: Place, clients: tuple[int, ...]) -> None:
        self._host.write_reserved(place.offset, place.slot_bytes, place.generation, clients)

    def invalid(self, place: Place) -> None:
        self._host.write_invalid(place.offset, place.generation)

    def committed(self, instruction: CellsCommitted, checksums: Checksums) -> None:
        """Store the checksums of new cells, in the region's cell order; VALID with the last."""
        place, info = instruction.place, instruction.info
        layout = self._layout(info.namespace, instruction.region, info.tokens)
        failpoints.hit("commit.before_trailer")
        trailer = self._host.slot(place.offset + layout.trailer_offset, layout.trailer_bytes)
        if layout.run is not None:
            trailer[layout.run] = checksums.view(np.uint8)
        else:
            trailer.view("<u8")[layout.cells] = checksums
        self.bytes_committed += layout.region_bytes
        if instruction.complete:
            failpoints.hit("commit.before_valid")
            self._host.write_valid(
                place.offset,
                place.slot_bytes,
                place.generation,
                layout.tag,
                info.key,
                info.parent,
                info.tokens,
                root_of(trailer),
            )

    def differ(self, instruction: CellsPresent, checksums: Checksums) -> bool:
        """Whether a Commit's checksums are others than those of the cells that are there."""
        place, info = instruction.place, instruction.info
        layout = self._layout(info.namespace, instruction.region, info.tokens)
        trailer = self._host.slot(place.offset + layout.trailer_offset, layout.trailer_bytes)
        if layout.run is not None:
            return not np.array_equal(trailer[layout.run], checksums.view(np.uint8))
        return not np.array_equal(trailer.view("<u8")[layout.cells], checksums)

    def _layout(self, namespace: int, region: Region, tokens: int) -> _Layout:
        """Found once per region, for a Commit names thousands of blocks of the same one."""
        found = self._layouts.get((namespace, region, tokens))
        if found is None:
            if len(self._layouts) >= LAYOUTS_MAX:
                self._layouts.clear()
            found = _Layout.of(self._spec_of(namespace), region, tokens)
            self._layouts[namespace, region, tokens] = found
        return found

    def root(self, place: Place) -> int:
        """The root of a complete block in the host tier; 0 when its entry is not what it was."""
        if place.tier is not Tier.HOST:
            return 0
        entry = self._host.read_entry(place.offset)
        if isinstance(entry, ValidEntry) and entry.generation == place.generation:
            return entry.root
        return 0
