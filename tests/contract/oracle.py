"""What the contract tests share: namespaces of their own, and the check of whole chains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from kvclient import AsyncNamespace
from kvproto.grid import Grid, Region
from tests.support.payload import Blocks

_seeds = count(1)


def fresh(**shape: int) -> Blocks:
    """Blocks of a namespace that no other test has."""
    number = next(_seeds)
    return Blocks(weights=number.to_bytes(32, "little"), **shape)


async def check_all(namespace: AsyncNamespace, blocks: Blocks, keys: Sequence[bytes]) -> None:
    out = blocks.out(len(keys))
    result = await namespace.pull(keys, out)
    assert result.found.all()
    assert blocks.wrong(keys, out, result.found) == []


def random_region(rng: np.random.Generator, grid: Grid) -> Region:
    layers = np.sort(rng.choice(grid.layers + 1, 2, replace=False))
    heads = np.sort(rng.choice(grid.heads + 1, 2, replace=False))
    return Region(int(layers[0]), int(layers[1]), int(heads[0]), int(heads[1]))


def cut(blocks: np.ndarray, region: Region) -> np.ndarray:
    return blocks[
        ..., region.layer_start : region.layer_stop, region.head_start : region.head_stop, :
    ]
