"""KV tensors in the physical orders that engines have, on any device, and pages to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvserver_vllm.layout import SKIP, Bytes

LAYERS, BLOCKS, HEADS, DIMS = 3, 6, 2, 4
CONTENT = 2 * DIMS
# Logical axes L B H N C, outermost first.
ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def kv_tensors(
    order: str,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    pad: int = 0,
    blocks: int = BLOCKS,
    content: int = CONTENT,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Layers over one storage in physical order `order`, `pad` items between blocks' rows."""
    sizes = {"L": LAYERS, "B": blocks, "H": HEADS, "N": tokens, "C": content}
    strides, step = {}, 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * sizes[axis] + (pad if axis == order[1] else 0)
    raw = torch.zeros(offset + step, dtype=dtype, device=device)
    shape = [sizes[axis] for axis in "BHNC"]
    return [
        torch.as_strided(
            raw, shape, [strides[axis] for axis in "BHNC"], offset + layer * strides["L"]
        )
        for layer in range(LAYERS)
    ]


def fill(tensors: Sequence[torch.Tensor], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        values = torch.rand(tensor.shape, generator=generator)
        tensor.copy_(values.to(tensor.dtype))


def complaints(
    host: Callable[[Sequence[Any]], Any], other: Callable[[Sequence[Any]], Any],
    tensors: Sequence[torch.Tensor], rng: np.random.Generator,
) -> list[str]:  # fmt: skip
    """What `other` pages gather and scatter differently from `host` pages of the same bytes: random
    pages of random layers, some left out. `host` is given copies on the CPU."""
    mine, theirs = host(on_host(tensors)), other(tensors)
    pages_in_all = mine.blocks * mine.format.pages_per_block
    found = []
    for _ in range(8):
        layer = int(rng.integers(0, len(tensors)))
        stop = int(rng.integers(layer + 1, len(tensors) + 1))
        ids = rng.permutation(pages_in_all)[: int(rng.integers(1, pages_in_all + 1))]
        ids = np.where(rng.random(len(ids)) < 0.2, SKIP, ids).tolist()
        shape = (stop - layer, mine.heads, len(ids), mine.format.page_bytes)
        want, have = room(shape), room(shape)
        mine.gather(layer, stop, ids, want)
        theirs.gather(layer, stop, ids, have)
        if not np.array_equal(want, have):
            found.append(f"gather of {ids} in layers {layer} to {stop}")
        cells = room(shape)
        cells[...] = rng.integers(0, 256, shape, np.uint8)
        mine.scatter(layer, stop, ids, cells)
        theirs.scatter(layer, stop, ids, cells)
        for want_in, have_in in zip(mine.memory, theirs.memory, strict=True):
            if not np.array_equal(want_in, have_in.cpu().numpy()):
                found.append(f"scatter of {ids} in layers {layer} to {stop}")
    return found


def on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same in host memory: storages, strides and all."""
    kept: dict[int, torch.Tensor] = {}
    copies = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        raw = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
        copy = kept.setdefault(storage.data_ptr(), raw.to("cpu", copy=True))
        copies.append(copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return copies


def room(shape: tuple[int, ...]) -> Bytes:
    """Cells as the arena holds them: rows of a larger array, so that they are strided."""
    return np.zeros((shape[0], shape[1] + 1, *shape[2:]), np.uint8)[:, 1:]
