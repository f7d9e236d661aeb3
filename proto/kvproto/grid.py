"""A block is a grid of cells; regions, masks and byte offsets are arithmetic on it.

Invariants:
  * cell (layer, head) has index `layer * heads + head` and lies at `index * cell_bytes` in its
    slot: layout [layer][head][page] (docs/adr/0004-slot-layout.md has the figures).
  * a mask is a Python int whose bit i stands for cell i; packed, it is little-endian bytes.
  * a slot is payload, then trailer: one xxh3-64 per cell, little-endian, in cell order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvproto.errors import FieldError, require_int

CHECKSUM_BYTES = 8
LAYERS_MAX = 1024
HEADS_MAX = 1024
CELLS_MAX = 16_384
PAGE_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Region:
    """A layer range x a head range, both half-open."""

    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int

    @property
    def layers(self) -> int:
        return self.layer_stop - self.layer_start

    @property
    def heads(self) -> int:
        return self.head_stop - self.head_start

    @property
    def cells(self) -> int:
        return self.layers * self.heads

    def intersects(self, other: Region) -> bool:
        return (
            self.layer_start < other.layer_stop
            and other.layer_start < self.layer_stop
            and self.head_start < other.head_stop
            and other.head_start < self.head_stop
        )

    def contains(self, other: Region) -> bool:
        return (
            self.layer_start <= other.layer_start
            and other.layer_stop <= self.layer_stop
            and self.head_start <= other.head_start
            and other.head_stop <= self.head_stop
        )


@dataclass(frozen=True)
class Grid:
    """The geometry of the blocks of one namespace. Sizes in bytes, counts in units."""

    layers: int
    heads: int
    block_tokens: int
    page_tokens: int
    page_bytes: int

    def __post_init__(self) -> None:
        require_int("layers", self.layers, 1, LAYERS_MAX)
        require_int("kv_heads", self.heads, 1, HEADS_MAX)
        require_int("block_tokens", self.block_tokens, 1, 65_536)
        require_int("page_tokens", self.page_tokens, 1, self.block_tokens)
        require_int("page_bytes", self.page_bytes, 1, PAGE_BYTES_MAX)
        if self.block_tokens % self.page_tokens:
            raise FieldError(
                "page_tokens", self.page_tokens, f"a divisor of block_tokens ({self.block_tokens})"
            )
        if self.cells > CELLS_MAX:
            raise FieldError("layers * kv_heads", self.cells, f"at most {CELLS_MAX}")

    @property
    def cells(self) -> int:
        return self.layers * self.heads

    @property
    def pages(self) -> int:
        """Pages of one cell of a full block."""
        return self.block_tokens // self.page_tokens

    def pages_for(self, tokens: int) -> int:
        """Pages of one cell of a block that holds `tokens` tokens."""
        require_int("tokens", tokens, 1, self.block_tokens)
        return -(-tokens // self.page_tokens)

    def cell_bytes(self, tokens: int | None = None) -> int:
        """Bytes of one cell; a tail's cells are shorter."""
        pages = self.pages if tokens is None else self.pages_for(tokens)
        return pages * self.page_bytes

    def payload_bytes(self, tokens: int | None = None) -> int:
        return self.cells * self.cell_bytes(tokens)

    @property
    def trailer_bytes(self) -> int:
        return self.cells * CHECKSUM_BYTES

    def slot_bytes(self, tokens: int | None = None) -> int:
        """Payload and trailer, before rounding to a size class."""
        return self.payload_bytes(tokens) + self.trailer_bytes

    def region_bytes(self, region: Region, tokens: int | None = None) -> int:
        return region.cells * self.cell_bytes(tokens)

    @cached_property
    def whole(self) -> Region:
        return Region(0, self.layers, 0, self.heads)

    @cached_property
    def full_mask(self) -> int:
        return (1 << self.cells) - 1

    def check(self, region: Region) -> Region:
        """Return `region` when it is non-empty and lies within the grid; FieldError otherwise."""
        for axis, start, stop, limit in (
            ("layer", region.layer_start, region.layer_stop, self.layers),
            ("head", region.head_start, region.head_stop, self.heads),
        ):
            if not 0 <= start < stop <= limit:
                raise FieldError(
                    f"region.{axis}s", (start, stop), f"non-empty and within [0, {limit})"
                )
        return region

    def mask(self, region: Region) -> int:
        """Bits of the region's cells."""
        if region.heads == self.heads:  # whole layers follow each other
            return ((1 << region.cells) - 1) << (region.layer_start * self.heads)
        row = ((1 << region.heads) - 1) << region.head_start
        mask = 0
        for layer in range(region.layer_start, region.layer_stop):
            mask |= row << (layer * self.heads)
        return mask

    def cell_indices(self, region: Region) -> range | list[int]:
        """Cell indices of the region in layer-major order: the order of packed checksums."""
        if region.heads == self.heads:
            return range(region.layer_start * self.heads, region.layer_stop * self.heads)
        return [
            layer * self.heads + head
            for layer in range(region.layer_start, region.layer_stop)
            for head in range(region.head_start, region.head_stop)
        ]

    def runs(self, region: Region, tokens: int | None = None) -> list[tuple[int, int]]:
        """Contiguous (offset, length) runs of the region within a slot, in bytes, ascending."""
        cell = self.cell_bytes(tokens)
        if region.heads == self.heads:
            start = region.layer_start * self.heads * cell
            return [(start, region.cells * cell)]
        return [
            ((layer * self.heads + region.head_start) * cell, region.heads * cell)
            for layer in range(region.layer_start, region.layer_stop)
        ]

    def trailer_offset(self, tokens: int | None = None) -> int:
        """Where the trailer begins within a slot."""
        return self.payload_bytes(tokens)
