"""How a put or get of the `nixl` transport is cut into moves, and where the bytes of a move lie.

Rule 1: pure arithmetic on regions and addresses; nothing here copies, waits or talks to the hub.
Rule 2: a part's blocks have cells of one size, so that their addresses are a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from kvclient.copying import Copier, Piece, Reading, Writing
from kvclient.errors import Unsupported
from kvclient.transfer.base import Bytes
from kvclient.transfer.direct import Addresses, Scattered
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb

MOVES_AHEAD = 3
PIECES_MAX = 1 << 15  # addresses of one move; the hub takes twice as many


@dataclass(frozen=True, slots=True)
class Part:
    """Layers [start, stop) of the region of these blocks: what one Move carries.

    `places` says where each block lies in registered memory; None for what is staged.
    """

    indices: list[int]
    start: int
    stop: int
    region: Region
    cell_bytes: int
    places: Mapping[int, Scattered] | None = None

    @property
    def block_bytes(self) -> int:
        return self.region.cells * self.cell_bytes


def parts(
    work: Writing | Reading, indices: Sequence[int], limit_bytes: int,
    places: Mapping[int, Scattered] | None = None,
) -> Iterator[Part]:  # fmt: skip
    """Whole regions of as many blocks as `limit_bytes` hold, or layers of one block.

    Unsupported where one layer alone is staged and does not fit.
    """
    grid = work.grid
    for cell_bytes, group in groupby(indices, lambda i: grid.cell_bytes(work.slots[i].tokens)):
        chosen = list(group)
        layer_bytes = work.region.heads * cell_bytes
        if layer_bytes > limit_bytes and places is None:
            raise Unsupported(
                f"one layer of the region has {layer_bytes} bytes, a staging extent {limit_bytes}:"
                " raise staging_bytes",
                field="staging_bytes",
            )
        room = limit_bytes
        if places is not None:
            pieces = work.region.heads * max(places[i].addresses.shape[2] for i in chosen)
            room = min(limit_bytes, max(1, PIECES_MAX // pieces) * layer_bytes)
        for at, start, stop in _cuts(chosen, work.region.layers, layer_bytes, room):
            first, region = work.region.layer_start, work.region
            part = Region(first + start, first + stop, region.head_start, region.head_stop)
            yield Part(at, start, stop, part, cell_bytes, places)


def _cuts(
    chosen: list[int], layers: int, layer_bytes: int, room: int
) -> Iterator[tuple[list[int], int, int]]:
    many = room // (layer_bytes * layers)
    if many:
        many = max(1, min(many, -(-len(chosen) // MOVES_AHEAD)))
        for at in range(0, len(chosen), many):
            yield chosen[at : at + many], 0, layers
        return
    step = max(1, room // layer_bytes)
    for index in chosen:
        for start in range(0, layers, step):
            yield [index], start, min(start + step, layers)


def rooms(part: Part, extent: Bytes) -> dict[int, Bytes]:
    """Where each block's cells lie in the extent: [layers, heads, cell bytes], without gaps."""
    shape = (part.region.layers, part.region.heads, part.cell_bytes)
    size = part.block_bytes
    return {
        index: extent[at * size : (at + 1) * size].reshape(shape)
        for at, index in enumerate(part.indices)
    }


def pieces(part: Part, copier: Copier, indices: Sequence[int] | None = None) -> list[list[Piece]]:
    """Tasks for the copy threads; layers count from the part's first."""
    chosen = part.indices if indices is None else indices
    return copier.split(part.region.layers, part.region.heads * part.cell_bytes, chosen)


def staged_addresses(part: Part, address: int) -> Addresses:
    """[blocks, 1]: the blocks one behind the other from `address` on."""
    steps = np.arange(len(part.indices), dtype=np.uint64) * np.uint64(part.block_bytes)
    return (np.uint64(address) + steps)[:, None]


def direct_addresses(part: Part) -> tuple[Addresses, Addresses]:
    """Where the blocks' cells lie in registered memory: addresses [blocks, n] of equal pieces, n
    as small as the gaps allow, and the extents [m, 2] (first, last + 1) that these are.
    """
    assert part.places is not None
    found, piece = [], 0
    for index in part.indices:
        addresses, piece = cells_at(part.places[index], part.cell_bytes)
        found.append(addresses[part.start : part.stop])
    table = np.stack(found)  # [blocks, layers, heads, pieces of a cell]
    for _ in range(3):  # pieces of a cell, then cells of a layer, then layers
        count = table.shape[-1]
        step = np.arange(count, dtype=np.uint64) * np.uint64(piece)
        if not np.array_equal(table, table[..., :1] + step):
            break
        table, piece = table[..., 0], piece * count
    table = table.reshape(len(part.indices), -1)
    flat = table.reshape(-1)
    return table, np.stack([flat, flat + np.uint64(piece)], axis=1)


def cells_at(place: Scattered, cell_bytes: int) -> tuple[Addresses, int]:
    """The pieces [layers, heads, n] of cells of `cell_bytes`, a tail's say, and bytes of each."""
    if cell_bytes <= place.piece_bytes:
        return place.addresses[:, :, :1], cell_bytes
    count, rest = divmod(cell_bytes, place.piece_bytes)
    if rest or count > place.addresses.shape[2]:
        limit = f"{place.addresses.shape[2]} pieces of {place.piece_bytes}"
        raise Unsupported(f"a cell of {cell_bytes} bytes cannot be made of {limit}")
    return place.addresses[:, :, :count], place.piece_bytes


def sums_of(work: Writing, part: Part) -> bytes:
    """The checksums of a part's cells, as a Move carries them."""
    sums = work.sums[part.indices, part.start : part.stop]
    return sums.astype("<u8", copy=False).tobytes()


def region_message(region: Region) -> pb.Region:
    return pb.Region(
        layer_start=region.layer_start,
        layer_stop=region.layer_stop,
        head_start=region.head_start,
        head_stop=region.head_stop,
    )
