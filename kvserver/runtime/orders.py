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

from kvproto.frames import Op, Place
from kvproto.grid import Region
from kvproto.nixlib import Memory
from kvserver.runtime.extents import Extents
from kvserver.transfer.posts import Post, cut

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Order:
    """What one Move asks for: a region of granted slots.

    `addresses` [places, pieces]: where the client has the pieces of each region: one, one a layer,
    one a cell, or several a cell. `checksums` [places, cells of the region] of a WRITE.
    """

    number: int
    op: Op
    region: Region
    places: Sequence[Place]
    addresses: Numbers
    checksums: Numbers | None
    deadline_s: float

    @property
    def payload_bytes(self) -> int:
        return sum(self.region.cells * place.cell_bytes for place in self.places)

    def memory(self, extents: Extents) -> tuple[Memory, int]:
        """The kind of memory and the device that every piece lies in. FieldError where it is not
        all within the client's extents."""
        pieces = self.addresses.shape[1]
        sizes = [self.region.cells * place.cell_bytes // pieces for place in self.places]
        return extents.kind_of(self.addresses, np.array(sizes, np.uint64)[:, None])

    def pieces(self, chosen: Sequence[int]) -> tuple[Numbers, Numbers, Numbers]:
        """Of these places: offsets in the arena and addresses of the client, both [chosen, n], and
        bytes of a piece [chosen]. n is as small as both sides' gaps allow.
        """
        region, places = self.region, [self.places[at] for at in chosen]
        theirs = self.addresses[list(chosen)]
        grid = places[0]  # layers and heads are those of the whole call
        cell = np.array([place.cell_bytes for place in places], np.uint64)[:, None]
        first = np.uint64(region.layer_start * grid.heads + region.head_start)
        begin = np.array([place.offset for place in places], np.uint64)[:, None] + first * cell
        told = theirs.shape[1]
        dense = region.heads == grid.heads or region.layers == 1
        count = told if dense else max(told, region.layers)
        length = cell * np.uint64(region.cells) // np.uint64(count)
        nth = np.arange(count, dtype=np.uint64)
        if dense:
            return begin + nth * length, theirs, length[:, 0]
        a_layer, a_piece = np.uint64(count // region.layers), np.uint64(count // told)
        ours = begin + nth // a_layer * (np.uint64(grid.heads) * cell) + nth % a_layer * length
        theirs = theirs[:, (nth // a_piece).astype(np.intp)] + nth % a_piece * length
        return ours, theirs, length[:, 0]

    def posts(self, chosen: Sequence[int], *, base: int, device: int) -> list[Post]:
        """What the agent has to post for these places; the arena's data begins at `base`."""
        if not chosen:
            return []
        ours, theirs, length = self.pieces(chosen)
        count = ours.shape[1]
        return cut(
            ours.reshape(-1) + np.uint64(base),
            theirs.reshape(-1),
            np.repeat(length, count),
            np.repeat(np.array(chosen, np.int64), count),
            device=device,
        )

    def corrupt(
        self, sums: Callable[[Region, Sequence[Place]], Numbers], chosen: Sequence[int]
    ) -> list[int]:
        """Which of these places of a WRITE do not match their checksums as they stand in the arena.
        `sums` finds those (`kvserver.transfer.hashing`)."""
        assert self.checksums is not None
        found = sums(self.region, [self.places[at] for at in chosen])
        wrong = (found != self.checksums[list(chosen)]).any(axis=1)
        return [at for at, bad in zip(chosen, wrong.tolist(), strict=True) if bad]


@dataclass(frozen=True, slots=True)
class Moved:
    statuses: Bytes
    trailers: bytes
    terminal: bool
