"""Checks of what callers pass in: each failure names the argument and what would be accepted.

Rule 1: InvalidArgument is raised before anything is sent, reserved or copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvclient.errors import InvalidArgument
from kvclient.results import Bytes
from kvclient.transfer.direct import Block, Scattered
from kvproto.errors import FieldError
from kvproto.grid import Grid, Region
from kvproto.prefix import HASH_BYTES, ROOT

Arrays = Bytes | Sequence[Bytes] | Sequence[Scattered]


def hash_list(field: str, hashes: Sequence[bytes], *, count_max: int | None = None) -> list[bytes]:
    """At least one key, each of 32 bytes, at most `count_max` (the hub's keys_per_call_max)."""
    if isinstance(hashes, bytes | str) or len(hashes) == 0:
        raise InvalidArgument.of(field, hashes, "a non-empty list of digests")
    if count_max is not None and len(hashes) > count_max:
        raise InvalidArgument.of(field, len(hashes), f"at most {count_max} (keys_per_call_max)")
    for i, digest in enumerate(hashes):
        if not isinstance(digest, bytes) or len(digest) != HASH_BYTES:
            raise InvalidArgument.of(f"{field}[{i}]", digest, f"a digest of {HASH_BYTES} bytes")
    return list(hashes)


def parent_list(parents: Sequence[bytes] | None, hashes: list[bytes]) -> list[bytes]:
    """The chain (ROOT, hashes[0], ...) by default."""
    if parents is None:
        return [ROOT, *hashes[:-1]]
    listed = hash_list("parents", parents)
    if len(listed) != len(hashes):
        raise InvalidArgument.of("parents", len(listed), f"{len(hashes)} digests, one a key")
    return listed


def token_list(tokens: Sequence[int] | None, count: int, grid: Grid) -> list[int]:
    """All full by default."""
    if tokens is None:
        return [grid.block_tokens] * count
    if len(tokens) != count:
        raise InvalidArgument.of("tokens", len(tokens), f"{count} numbers, one a key")
    listed = [int(number) for number in tokens]
    for i, number in enumerate(listed):
        if not 1 <= number <= grid.block_tokens:
            limit = f"from 1 to {grid.block_tokens} (block_tokens)"
            raise InvalidArgument.of(f"tokens[{i}]", number, limit)
    return listed


def region_in(region: Region | None, grid: Grid, within: Region | None = None) -> Region:
    """`region`, by default all of `within` (the grid); inside both."""
    outer = within or grid.whole
    if region is None:
        return outer
    try:
        grid.check(region)
    except FieldError as error:
        raise InvalidArgument.from_field(error) from None
    if not outer.contains(region):
        raise InvalidArgument.of("region", region, f"within {outer}")
    return region


def milliseconds(field: str, seconds: float, limit_s: float) -> int:
    """A duration in milliseconds, at most the hub's limit."""
    if not 0 <= seconds <= limit_s:
        raise InvalidArgument.of(field, seconds, f"from 0 to {limit_s:g} s")
    return min(round(seconds * 1000), int(limit_s * 1000))


def blocks_of(
    field: str, arrays: Arrays, tokens: Sequence[int], grid: Grid, region: Region
) -> list[Block]:
    """One array [layers, heads, bytes] per block, each wide enough for a cell of its tokens.

    Takes [N, layers, heads, bytes] or a list of [layers, heads, bytes]; the bytes may also come
    as [pages, page bytes]. Or a list of Scattered, of the same shape.
    """
    if len(arrays) != len(tokens):
        raise InvalidArgument.of(field, len(arrays), f"{len(tokens)} blocks, one a key")
    return [
        _block(f"{field}[{i}]", array, grid.cell_bytes(count), region)
        for i, (array, count) in enumerate(zip(arrays, tokens, strict=True))
    ]


def _block(field: str, array: Block, cell_bytes: int, region: Region) -> Block:
    if isinstance(array, Scattered):
        return _scattered(field, array, cell_bytes, region)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        kind = getattr(array, "dtype", type(array).__name__)
        raise InvalidArgument.of(field, str(kind), "a NumPy array of uint8")
    limit = f"shape [{region.layers}, {region.heads}, {cell_bytes} or more]"
    if array.ndim == 4:
        pages, page_bytes = array.shape[2:]
        if pages > 1 and array.strides[2] != page_bytes * array.strides[3]:
            raise InvalidArgument.of(field, array.strides, "an array whose cells are contiguous")
        array = array.reshape(*array.shape[:2], pages * page_bytes)
    if array.ndim != 3 or array.shape[:2] != (region.layers, region.heads):
        raise InvalidArgument.of(field, array.shape, limit)
    if array.shape[2] < cell_bytes:
        raise InvalidArgument.of(field, array.shape, limit)
    return array


def _scattered(field: str, block: Scattered, cell_bytes: int, region: Region) -> Scattered:
    layers, heads, width = block.shape
    if (layers, heads) != (region.layers, region.heads) or width < cell_bytes:
        limit = f"shape [{region.layers}, {region.heads}, {cell_bytes} or more]"
        raise InvalidArgument.of(field, block.shape, limit)
    return block


def dense(block: Block, grid: Grid) -> bool:
    """Whether it is a whole block in an array, whose cells stand one behind the other."""
    if isinstance(block, Scattered) or block.nbytes != grid.payload_bytes():
        return False
    return bool(block.flags.c_contiguous)


def targets_of(
    field: str, arrays: Arrays, tokens: Sequence[int], grid: Grid, region: Region
) -> list[Block]:
    """The same for arrays that are written: writable, and each cell contiguous."""
    blocks = blocks_of(field, arrays, tokens, grid, region)
    for i, block in enumerate(blocks):
        if isinstance(block, Scattered):
            continue
        if not block.flags.writeable:
            raise InvalidArgument.of(f"{field}[{i}]", "read-only", "a writable array")
        if block.shape[2] > 1 and block.strides[2] != 1:
            limit = "an array whose cells are contiguous"
            raise InvalidArgument.of(f"{field}[{i}]", block.strides, limit)
    return blocks
