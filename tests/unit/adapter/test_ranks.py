"""Engines split over other numbers of ranks read what was written: on tensors, with the layouts
that real engines have.

The whole KV of a model is cut into the tensors of each rank as vLLM cuts it (consecutive heads,
ranges of layers, replicas where there are more ranks than heads). Writers copy their pages into one
block as the hub holds it, [layer, head, page]; readers copy theirs out. Where a rank's part lies is
the adapter's own word (`rank_info`, `layer_starts`, `RankSection.region`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from kvproto.grid import Region
from kvserver_vllm.identity import layer_starts, rank_info, replicas
from kvserver_vllm.layout import CPU_ENCODING, TOKEN_ENCODING, HostPages
from kvserver_vllm.messages import RankInfo, Section, StepMeta
from kvserver_vllm.rank import RankSection

LAYERS, BLOCK, DIMS = 8, 128, 4
UNTOUCHED = 0xEE
# Logical [layers, heads, tokens, K or V, dims] of one hub block.
Whole = np.ndarray
Bytes = np.ndarray


@dataclass(frozen=True)
class Split:
    """How one engine is split, and the size of its blocks."""

    tp: int = 1
    pp: int = 1
    block: int = 32


@dataclass
class RankOf:
    """One rank: its tensors, its place in the grid, and the page ids of the hub block in them."""

    pages: HostPages
    tensors: list[torch.Tensor]
    region: Region
    pushes: bool
    ids: list[int]


def whole_kv(heads: int) -> Whole:
    shape = (LAYERS, heads, BLOCK, 2, DIMS)
    return np.random.default_rng(1).random(shape, np.float32)


def reference(whole: Whole, encoding: str) -> Bytes:
    """The hub's cells of the whole KV, said without the code under test."""
    layers, heads = whole.shape[:2]
    if encoding == TOKEN_ENCODING:
        pages = whole.reshape(layers, heads, BLOCK // 16, -1)
    else:
        cut = whole.reshape(layers, heads, BLOCK // 32, 32, 2, DIMS)
        keys = cut[..., 0, :].swapaxes(-1, -2).reshape(*cut.shape[:3], -1)
        values = cut[..., 1, :].reshape(*cut.shape[:3], -1)
        pages = np.concatenate([keys, values], axis=-1)
    return np.ascontiguousarray(pages).view(np.uint8)


def tensor_of(part: Whole, encoding: str, size: int) -> torch.Tensor:
    """[blocks, heads, tokens, content] of one layer as the engine's attention stores it; an unused
    block stands before and behind."""
    heads, blocks = part.shape[0], BLOCK // size
    tensor = torch.full((blocks + 2, heads, size, 2 * DIMS), -1.0)
    if encoding == TOKEN_ENCODING:  # FlashAttention's: heads within tokens
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    for block in range(blocks):
        tokens = torch.from_numpy(part[:, block * size : (block + 1) * size])
        if encoding == TOKEN_ENCODING:
            tensor[block + 1] = tokens.reshape(heads, size, 2 * DIMS)
        else:
            keys = tokens[:, :, 0].transpose(1, 2).reshape(heads, -1)
            values = tokens[:, :, 1].reshape(heads, -1)
            tensor[block + 1] = torch.cat([keys, values], 1).view(heads, size, 2 * DIMS)
    return tensor


def engine(split: Split, whole: Whole, encoding: str) -> list[RankOf]:
    """The ranks of an engine that holds `whole`, cut as vLLM cuts it."""
    heads = whole.shape[1]
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads, use_mla=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=split.tp),
    )
    each, depth = max(1, heads // split.tp), LAYERS // split.pp
    infos: dict[tuple[int, int], RankInfo] = {}
    held: dict[tuple[int, int], tuple[HostPages, list[torch.Tensor], tuple[str, ...]]] = {}
    for stage in range(split.pp):
        layers = range(stage * depth, (stage + 1) * depth)
        names = tuple(f"model.layers.{layer}.self_attn.attn" for layer in layers)
        for rank in range(split.tp):
            first = rank * heads // split.tp  # vLLM: heads in order, or replicas side by side
            tensors = [
                tensor_of(whole[layer, first : first + each], encoding, split.block)
                for layer in layers
            ]
            pages = HostPages(encoding, tensors)
            infos[stage, rank] = rank_info(config, names, pages, "float32", rank)
            held[stage, rank] = pages, tensors, names
    starts, total = layer_starts(infos)
    assert total == LAYERS
    meta = StepMeta(sections=(Section(b"spec", starts),))
    ranks = []
    for (stage, rank), (pages, tensors, names) in held.items():
        section = RankSection(0, pages, names, infos[stage, rank].head_start)
        per_block = pages.format.pages_per_block
        ids = list(range(per_block, per_block + BLOCK // pages.format.page_tokens))
        pushes = rank % replicas(config) == 0
        ranks.append(RankOf(pages, tensors, section.region(meta, stage), pushes, ids))
    return ranks


def window(cells: Bytes, region: Region) -> Bytes:
    """A region's cells within the block."""
    layers = cells[region.layer_start : region.layer_stop]
    return layers[:, region.head_start : region.head_stop]


def write(ranks: list[RankOf], like: Bytes, *, shift: int = 0) -> tuple[Bytes, np.ndarray]:
    """The hub's block after all ranks have written, and how often each cell was written. `shift`
    moves every rank's heads, as a wrong offset would."""
    slot = np.full_like(like, UNTOUCHED)
    times = np.zeros(like.shape[:2], int)
    for rank in ranks:
        if rank.pushes:
            r, heads = rank.region, like.shape[1]
            start = (r.head_start + shift) % (heads - r.heads + 1)
            place = Region(r.layer_start, r.layer_stop, start, start + r.heads)
            before = slot.copy()
            rank.pages.gather(0, rank.pages.layers, rank.ids, window(slot, place))
            changed = (slot != before).any(axis=(2, 3))
            mine = np.zeros_like(changed)
            mine[r.layer_start : r.layer_stop, r.head_start : r.head_stop] = True
            assert shift or not (changed & ~mine).any(), "wrote another rank's cells"
            times += mine
    return slot, times


def read(ranks: list[RankOf], slot: Bytes) -> None:
    """Each rank copies its part out of the hub's block."""
    for rank in ranks:
        rank.pages.scatter(0, rank.pages.layers, rank.ids, window(slot, rank.region))


def differences(readers: list[RankOf], expected: list[RankOf]) -> int:
    """Layers whose bytes differ from those of a rank that computed them itself."""
    return sum(
        not torch.equal(have, want)
        for reader, twin in zip(readers, expected, strict=True)
        for have, want in zip(reader.tensors, twin.tensors, strict=True)
    )


CASES = [
    (8, Split(tp=4), Split(tp=2)),
    (8, Split(tp=8), Split(tp=1)),
    (8, Split(tp=2), Split(tp=8)),
    (8, Split(pp=4), Split(pp=2)),
    (8, Split(tp=2, pp=4), Split(tp=4, pp=2, block=64)),
    (2, Split(tp=8), Split(tp=2, block=128)),  # replicas write
    (2, Split(tp=1, block=64), Split(tp=8)),  # replicas read
    (1, Split(tp=4, pp=2), Split(tp=2)),  # on both sides
]
ENCODINGS = [CPU_ENCODING, TOKEN_ENCODING]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("heads", "writer", "reader"), CASES)
def test_every_rank_gets_the_bytes_that_it_would_have_computed(
    heads: int, writer: Split, reader: Split, encoding: str
) -> None:
    whole = whole_kv(heads)
    want = reference(whole, encoding)
    slot, times = write(engine(writer, whole, encoding), want)
    assert (times == 1).all(), "each cell is written once, whatever the replicas"
    assert np.array_equal(slot, want)
    readers = engine(reader, np.zeros_like(whole), encoding)
    expected = engine(reader, whole, encoding)
    assert differences(readers, expected) == len(readers) * (LAYERS // reader.pp)
    read(readers, slot)
    assert differences(readers, expected) == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_rank_reads_its_own_heads_and_layers_only(encoding: str) -> None:
    """What is wrong in other ranks' cells never reaches it."""
    whole = whole_kv(8)
    want = reference(whole, encoding)
    expected = engine(Split(tp=4, pp=2), whole, encoding)
    for number, twin in enumerate(expected):
        reader = engine(Split(tp=4, pp=2), np.zeros_like(whole), encoding)[number]
        slot = np.full_like(want, UNTOUCHED)
        window(slot, reader.region)[:] = window(want, reader.region)
        read([reader], slot)
        assert differences([reader], [twin]) == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("writer", "reader"), [(Split(tp=4), Split(tp=2)), (Split(tp=8), Split())])
def test_a_wrong_head_offset_is_noticed(writer: Split, reader: Split, encoding: str) -> None:
    """Negative control: writers one head off."""
    whole = whole_kv(8)
    want = reference(whole, encoding)
    slot, _ = write(engine(writer, whole, encoding), want, shift=1)
    assert not np.array_equal(slot, want)
    readers = engine(reader, np.zeros_like(whole), encoding)
    read(readers, slot)
    assert differences(readers, engine(reader, whole, encoding)) > 0
