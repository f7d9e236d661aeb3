"""What one call of Move asks for, and which bytes that is on both sides.

Rule 1: pure: nothing here looks at the arena's directory, a session or a clock.
Rule 2: an Order that stands here is consistent in itself (the service checked its fields); whether
it may be carried out is `runtime.moves`' to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvproto.checksum import grid_checksums
from kvproto.frames import Op, Place
from kvproto.grid import Region
from kvserver.transfer.nixl import Post, cut

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Item:
    """A slot of a Move; `pieces` are the client's addresses of the region's pieces."""

    place: Place
    pieces: Numbers


@dataclass(frozen=True, slots=True)
class Order:
    """What one Move asks for. `checksums` [items, cells of the region] of a WRITE."""

    number: int
    op: Op
    region: Region
    items: Sequence[Item]
    checksums: Numbers | None
    deadline_s: float

    @property
    def payload_bytes(self) -> int:
        return sum(self.region.cells * item.place.cell_bytes for item in self.items)

    def posts(self, chosen: Sequence[int], *, base: int, device: int) -> list[Post]:
        """What the agent has to post for these items; the arena's data begins at `base`."""
        local, remote, lengths, whose = [], [], [], []
        for at in chosen:
            ours, theirs, length = pieces_of(self.items[at], self.region)
            local.append(ours + np.uint64(base))
            remote.append(theirs)
            lengths.append(np.full(len(ours), length, np.uint64))
            whose.append(np.full(len(ours), at, np.int64))
        if not local:
            return []
        return cut(
            np.concatenate(local),
            np.concatenate(remote),
            np.concatenate(lengths),
            np.concatenate(whose),
            device=device,
        )

    def corrupt(self, slot: Callable[[int, int], Bytes], chosen: Sequence[int]) -> list[int]:
        """Which of these items of a WRITE do not match their checksums as they stand in the arena.
        `slot(offset, bytes)` gives a view of it."""
        assert self.checksums is not None
        region, wrong = self.region, []
        for at in chosen:
            place = self.items[at].place
            view = slot(place.offset, place.payload_bytes)
            cells = view.reshape(place.layers, place.heads, place.cell_bytes)
            part = cells[
                region.layer_start : region.layer_stop, region.head_start : region.head_stop
            ]
            if not np.array_equal(grid_checksums(part), self.checksums[at]):
                wrong.append(at)
        return wrong


@dataclass(frozen=True, slots=True)
class Moved:
    statuses: Bytes
    trailers: bytes
    terminal: bool


def pieces_of(item: Item, region: Region) -> tuple[Numbers, Numbers, int]:
    """Offsets in the arena, addresses of the client, and bytes of each piece of an item."""
    place, count = item.place, len(item.pieces)
    total = region.cells * place.cell_bytes
    dense = region.heads == place.heads or region.layers == 1
    first = (region.layer_start * place.heads + region.head_start) * place.cell_bytes
    if dense:
        length = total // count
        ours = np.arange(count, dtype=np.uint64) * np.uint64(length)
        return ours + np.uint64(place.offset + first), item.pieces, length
    count = max(count, region.layers)
    length = total // count
    nth = np.arange(count, dtype=np.uint64)
    per_layer, per_piece = np.uint64(count // region.layers), np.uint64(count // len(item.pieces))
    row = np.uint64(place.heads * place.cell_bytes)
    ours = nth // per_layer * row + nth % per_layer * np.uint64(length)
    theirs = item.pieces[(nth // per_piece).astype(np.intp)] + nth % per_piece * np.uint64(length)
    return ours + np.uint64(place.offset + first), theirs, length
