"""What the hub has its nixl worker move: the admitted part of one Move, and which bytes that is.

Rule 1: pure: nothing here looks at the arena's directory or a clock.
Rule 2: the slots of a Work are of one grid, and one region of it moves; an item is the number of a
slot in it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvproto.checksum import grid_checksums
from kvproto.frames import Place
from kvproto.grid import Region
from kvproto.nixlib import Memory
from kvserver.transfer.nixl.posts import Post, cut

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]

# number, client, read, kind of memory, device, layers, heads, region, slots, pieces of a slot
_HEAD = struct.Struct("<QIBBIII4III")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """`addresses` [slots, pieces]: where the client has the pieces of each region: one, one a
    layer, one a cell, or several a cell. `checksums` [slots, cells of the region] where `read`.
    """

    number: int  # never used twice by a hub
    client: int
    read: bool  # from the client into slots
    memory: Memory  # the client's
    device: int
    layers: int
    heads: int
    region: Region
    offsets: Numbers  # [slots], from the start of the arena's data
    generations: Numbers
    cell_bytes: Numbers
    addresses: Numbers
    checksums: Numbers | None

    @property
    def slots(self) -> int:
        return len(self.offsets)

    def places(self) -> list[Place]:
        told = zip(
            self.offsets.tolist(), self.generations.tolist(), self.cell_bytes.tolist(), strict=True
        )
        return [
            Place(0, offset, generation, cell, self.layers, self.heads, self.region)
            for offset, generation, cell in told
        ]

    def pieces(self) -> tuple[Numbers, Numbers, Numbers]:
        """Offsets in the arena and addresses of the client, both [slots, n], and bytes of a piece
        [slots]. n is as small as both sides' gaps allow.
        """
        region, theirs = self.region, self.addresses
        cell = self.cell_bytes[:, None]
        first = np.uint64(region.layer_start * self.heads + region.head_start)
        begin = self.offsets[:, None] + first * cell
        told = theirs.shape[1]
        dense = region.heads == self.heads or region.layers == 1
        count = told if dense else max(told, region.layers)
        length = cell * np.uint64(region.cells) // np.uint64(count)
        nth = np.arange(count, dtype=np.uint64)
        if dense:
            return begin + nth * length, theirs, length[:, 0]
        a_layer, a_piece = np.uint64(count // region.layers), np.uint64(count // told)
        ours = begin + nth // a_layer * (np.uint64(self.heads) * cell) + nth % a_layer * length
        theirs = theirs[:, (nth // a_piece).astype(np.intp)] + nth % a_piece * length
        return ours, theirs, length[:, 0]

    def posts(self, base: int) -> list[Post]:
        """What the agent has to post; the arena's data begins at address `base`."""
        ours, theirs, length = self.pieces()
        count = ours.shape[1]
        return cut(
            ours.reshape(-1) + np.uint64(base),
            theirs.reshape(-1),
            np.repeat(length, count),
            np.repeat(np.arange(self.slots), count),
            device=self.device,
        )

    def wrong(self, data: Bytes, items: list[int]) -> list[int]:
        """Which of these items do not match their checksums as they stand in the arena."""
        assert self.checksums is not None
        layers = slice(self.region.layer_start, self.region.layer_stop)
        heads = slice(self.region.head_start, self.region.head_stop)
        found = []
        for item in items:
            start, cell = int(self.offsets[item]), int(self.cell_bytes[item])
            slot = data[start : start + self.layers * self.heads * cell]
            cells = slot.reshape(self.layers, self.heads, cell)[layers, heads]
            if not np.array_equal(grid_checksums(cells), self.checksums[item]):
                found.append(item)
        return found

    def encode(self) -> bytes:
        region = self.region
        head = _HEAD.pack(
            self.number, self.client, self.read, self.memory.code, self.device, self.layers,
            self.heads, region.layer_start, region.layer_stop, region.head_start, region.head_stop,
            *self.addresses.shape,
        )  # fmt: skip
        arrays = [self.offsets, self.generations, self.cell_bytes, self.addresses]
        if self.checksums is not None:
            arrays.append(self.checksums)
        return b"".join((head, *(np.ascontiguousarray(a, "<u8").tobytes() for a in arrays)))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        number, client, read, memory, device, layers, heads, *rest = _HEAD.unpack_from(raw)
        region, slots, pieces = Region(*rest[:4]), rest[4], rest[5]
        told = np.frombuffer(raw, "<u8", offset=_HEAD.size).astype(np.uint64, copy=False)
        sizes = (slots, slots, slots, slots * pieces, slots * region.cells if read else 0)
        assert len(told) == sum(sizes), (len(told), sizes)
        offsets, generations, cells, addresses, sums, _ = np.split(told, np.cumsum(sizes))
        return cls(
            number, client, bool(read), Memory.of(memory), device, layers, heads, region, offsets,
            generations, cells, addresses.reshape(slots, pieces),
            sums.reshape(slots, region.cells) if read else None,
        )  # fmt: skip
