"""Pages out of real tensor layouts, whatever their strides."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from kvproto.errors import FieldError
from kvserver_vllm.layout import (
    CPU_ENCODING,
    LATENT_ENCODING,
    SKIP,
    TOKEN_ENCODING,
    HostPages,
    LayerTensor,
    PageFormat,
)

pytest.importorskip("torch")

import torch

from tests.support.kv_tensors import BLOCKS, CONTENT, DIMS, HEADS, LAYERS, ORDERS, fill, kv_tensors


def cells(pages: HostPages, count: int) -> np.ndarray:
    """Cells as the arena holds them: rows of a larger array, so that they are strided."""
    arena = np.zeros((LAYERS, HEADS + 1, count, pages.format.page_bytes), np.uint8)
    return arena[:, 1:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("offset", "pad"), [(0, 0), (24, 16)])
def test_token_pages_hold_the_tokens_in_order(order: str, offset: int, pad: int) -> None:
    tensors = kv_tensors(order, 32, offset=offset, pad=pad)
    fill(tensors)
    pages = HostPages(TOKEN_ENCODING, tensors)
    ids = [3, 2, 7, 8, 9, 10]
    out = cells(pages, len(ids))
    pages.gather(0, LAYERS, ids, out)
    for layer in range(LAYERS):
        for head in range(HEADS):
            for position, page in enumerate(ids):
                block, half = divmod(page, 2)
                want = tensors[layer][block, head, 16 * half : 16 * half + 16]
                got = out[layer, head, position].view(np.float32).reshape(16, CONTENT)
                assert np.array_equal(got, want.numpy()), (layer, head, page)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("encoding", [TOKEN_ENCODING, LATENT_ENCODING, "other/1"])
def test_scatter_undoes_gather(order: str, encoding: str) -> None:
    source, target = kv_tensors(order, 64), kv_tensors(order, 64, offset=8)
    fill(source)
    read, write = HostPages(encoding, source), HostPages(encoding, target)
    per_block = read.format.pages_per_block
    ids = list(range(per_block, 4 * per_block))
    out = cells(read, len(ids))
    read.gather(0, LAYERS, ids, out)
    write.scatter(0, LAYERS, ids, out)
    for have, want in zip(target, source, strict=True):
        assert torch.equal(have[1:4], want[1:4])
        assert not have[0].any()
        assert not have[4:].any()


def cpu_block(tensor, block: int, head: int):
    """(K [N, D], V [N, D]) as CPU attention stores them: K transposed, then V."""
    tokens = tensor.shape[2]
    flat = tensor[block, head].reshape(-1)
    return flat[: tokens * DIMS].view(DIMS, tokens).T, flat[tokens * DIMS :].view(tokens, DIMS)


@pytest.mark.parametrize("tokens", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_pages_are_32_tokens_whatever_the_block_size(tokens: int, dtype) -> None:
    tensors = kv_tensors("LBHNC", tokens, dtype=dtype, offset=32)
    fill(tensors)
    pages = HostPages(CPU_ENCODING, tensors)
    per_block = tokens // 32
    assert (pages.format.page_tokens, pages.format.pages_per_block) == (32, per_block)
    ids = list(range(5 * per_block - 1, 0, -1))
    out = cells(pages, len(ids))
    pages.gather(0, LAYERS, ids, out)
    for position, page in enumerate(ids):
        block, part = divmod(page, per_block)
        keys, values = cpu_block(tensors[1], block, 1)
        rows = slice(32 * part, 32 * part + 32)
        got = torch.from_numpy(out[1, 1, position].copy()).view(dtype)
        assert torch.equal(got[: 32 * DIMS].view(DIMS, 32).T, keys[rows])
        assert torch.equal(got[32 * DIMS :].view(32, DIMS), values[rows])


@pytest.mark.parametrize(("one", "other"), [*pairwise([32, 64, 128, 32]), (32, 128)])
def test_cpu_blocks_of_one_size_arrive_as_another(one: int, other: int) -> None:
    source, target = kv_tensors("LBHNC", one), kv_tensors("LBHNC", other)
    fill(source)
    read, write = HostPages(CPU_ENCODING, source), HostPages(CPU_ENCODING, target)
    from_ids = list(range(4 // (one // 32) * (one // 32)))[:4]
    to_ids = [id_ + other // 32 for id_ in range(4)]
    out = cells(read, 4)
    read.gather(0, LAYERS, from_ids, out)
    write.scatter(0, LAYERS, to_ids, out)

    def tokens_of(tensors, ids, size):
        keys, values = [], []
        for page in ids:
            block, part = divmod(page, size // 32)
            k, v = cpu_block(tensors[2], block, 0)
            keys.append(k[32 * part : 32 * part + 32])
            values.append(v[32 * part : 32 * part + 32])
        return torch.cat(keys), torch.cat(values)

    for want, got in zip(
        tokens_of(source, from_ids, one), tokens_of(target, to_ids, other), strict=True
    ):
        assert torch.equal(want, got)


@pytest.mark.parametrize("encoding", [TOKEN_ENCODING, LATENT_ENCODING])
@pytest.mark.parametrize(("one", "other"), list(permutations([16, 32, 64, 128], 2)))
def test_token_pages_of_one_block_size_arrive_as_another(
    one: int, other: int, encoding: str
) -> None:
    """128 tokens out of the blocks of one engine, in no order, into those of another."""
    source = kv_tensors("LBNHC", one, blocks=10)
    target = kv_tensors("LBHNC", other, blocks=10, offset=8)
    fill(source)
    from_blocks, to_blocks = ([7, 2, 9, 1, 4, 8, 3, 6][: 128 // size] for size in (one, other))
    read, write = HostPages(encoding, source), HostPages(encoding, target)
    from_ids, to_ids = (
        [block * (size // 16) + at for block in chosen for at in range(size // 16)]
        for chosen, size in ((from_blocks, one), (to_blocks, other))
    )
    out = cells(read, 8)
    read.gather(0, LAYERS, from_ids, out)
    write.scatter(0, LAYERS, to_ids, out)
    for have, want in zip(target, source, strict=True):
        wanted = torch.cat([want[block] for block in from_blocks], 1)
        assert torch.equal(torch.cat([have[block] for block in to_blocks], 1), wanted)
        assert not have[[block for block in range(10) if block not in to_blocks]].any()


def test_the_cpu_kernel_stores_what_the_encoding_says() -> None:
    """The attention kernel itself writes K as [D, N] and V as [N, D]."""
    ops = pytest.importorskip("vllm._custom_ops")
    import vllm.platforms

    if not vllm.platforms.current_platform.is_cpu():
        pytest.skip("needs the CPU build of vLLM")
    tokens, dims = 64, 32
    kv = torch.zeros(2, HEADS, tokens, 2 * dims)
    key_cache, value_cache = kv.view(2, HEADS, 2 * tokens, dims).chunk(2, dim=2)
    key = torch.rand(tokens, HEADS, dims)
    value = torch.rand(tokens, HEADS, dims)
    slots = torch.arange(tokens) + tokens
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots, "vec", k_scale=1.0, v_scale=1.0,
        kv_cache_dtype="auto",
    )  # fmt: skip
    pages = HostPages(CPU_ENCODING, [kv])
    out = np.zeros((1, HEADS, 2, pages.format.page_bytes), np.uint8)
    pages.gather(0, 1, [2, 3], out)
    got = torch.from_numpy(out).view(torch.float32)
    for page in range(2):
        rows = slice(32 * page, 32 * page + 32)
        for head in range(HEADS):
            assert torch.equal(got[0, head, page, : 32 * dims].view(dims, 32).T, key[rows, head])
            assert torch.equal(got[0, head, page, 32 * dims :].view(32, dims), value[rows, head])


def test_kernel_blocks_smaller_than_the_engines_are_pages_all_the_same() -> None:
    """A tensor of kernel blocks (two to an engine block) is addressed by the same page ids."""
    whole = kv_tensors("LBNHC", 64)
    fill(whole)
    split = [t.unflatten(2, (2, 32)).transpose(1, 2).flatten(0, 1) for t in whole]
    ids = [5, 6, 7, 12]
    outs = []
    for tensors in (whole, split):
        pages = HostPages(TOKEN_ENCODING, tensors)
        out = cells(pages, len(ids))
        pages.gather(0, LAYERS, ids, out)
        outs.append(out)
    assert np.array_equal(*outs)


def test_skipped_pages_are_left_alone() -> None:
    tensors = kv_tensors("LBHNC", 32)
    pages = HostPages(CPU_ENCODING, tensors)
    data = np.full((LAYERS, HEADS, 4, pages.format.page_bytes), 7, np.uint8)
    pages.scatter(0, LAYERS, [SKIP, 2, SKIP, 4], data)
    touched = [bool(tensors[0][block].any()) for block in range(BLOCKS)]
    assert touched == [False, False, True, False, True, False]


def test_a_layer_range_is_counted_from_its_start() -> None:
    tensors = kv_tensors("BLHNC", 32)
    fill(tensors)
    pages = HostPages(CPU_ENCODING, tensors)
    everything = np.zeros((LAYERS, HEADS, 2, pages.format.page_bytes), np.uint8)
    part = np.zeros((2, HEADS, 2, pages.format.page_bytes), np.uint8)
    pages.gather(0, LAYERS, [4, 1], everything)
    pages.gather(1, 3, [4, 1], part)
    assert np.array_equal(part, everything[1:])


def test_layers_in_storages_of_their_own_are_gathered_all_the_same() -> None:
    shared = kv_tensors("LBHNC", 32)
    fill(shared)
    apart = [shared[0], shared[1].clone(), shared[2]]
    outs = []
    for tensors in (shared, apart):
        pages = HostPages(CPU_ENCODING, tensors)
        out = cells(pages, 3)
        pages.gather(0, LAYERS, [4, 1, 2], out)
        outs.append(out)
    assert np.array_equal(*outs)


def test_blocks_that_are_no_whole_number_of_pages_are_refused_by_name() -> None:
    with pytest.raises(FieldError, match="block_size is 48"):
        HostPages(CPU_ENCODING, kv_tensors("LBHNC", 48))


def test_the_cpu_encoding_refuses_strides_it_cannot_have() -> None:
    with pytest.raises(FieldError, match="dense per block and head"):
        HostPages(CPU_ENCODING, kv_tensors("LBNHC", 32))


def test_layers_of_different_shapes_are_refused() -> None:
    tensors = kv_tensors("LBHNC", 32)
    with pytest.raises(FieldError, match="equal in all layers"):
        HostPages(CPU_ENCODING, [tensors[0], tensors[1][:, :1]])


def test_unknown_encodings_take_whole_engine_blocks() -> None:
    (layer, *_) = kv_tensors("LBNHC", 32)
    form = PageFormat.of("strange/1", LayerTensor.of(layer))
    assert (form.page_tokens, form.pages_per_block) == (32, 1)
    assert form.page_bytes == 32 * CONTENT * 4


@pytest.mark.parametrize(
    ("encoding", "page"), [(CPU_ENCODING, 32), (TOKEN_ENCODING, 16), (LATENT_ENCODING, 16)]
)
@pytest.mark.parametrize("used", [1, 13, 15])
def test_what_a_tail_page_holds_behind_its_tokens_is_zeroed(
    encoding: str, page: int, used: int
) -> None:
    """Two tails of equal tokens and different traffic are equal bytes; unzeroed they are not."""
    tokens = page + used
    outs, raw = [], []
    for traffic in (1.0, 2.0):
        tensors = kv_tensors("LBHNC", 32)
        fill(tensors)
        pages = HostPages(encoding, tensors)
        out = np.zeros((LAYERS, HEADS, 2, pages.format.page_bytes), np.uint8)
        pages.gather(0, LAYERS, [2, 3], out)
        held = out[..., 1, :].view(np.float32).reshape(LAYERS, HEADS, -1)
        behind = _behind(encoding, page, used, held.shape[-1])
        held[..., behind] = traffic
        raw.append(out.copy())
        pages.format.zero_behind(out, tokens)
        assert not held[..., behind].any()
        assert np.array_equal(held[..., ~behind], raw[-1][..., 1, :].view(np.float32)[..., ~behind])
        assert np.array_equal(out[..., 0, :], raw[-1][..., 0, :])
        outs.append(out)
    assert np.array_equal(*outs)
    assert not np.array_equal(*raw)


def _behind(encoding: str, page: int, used: int, items: int) -> np.ndarray:
    """Which floats of a page belong to tokens from `used` on, said without the code under test."""
    dims = items // 2 // page
    token = np.empty(items, int)
    if encoding == CPU_ENCODING:
        token[: items // 2] = np.tile(np.arange(page), dims)
        token[items // 2 :] = np.repeat(np.arange(page), dims)
    else:
        token[:] = np.repeat(np.arange(page), 2 * dims)
    return token >= used


def test_a_full_page_has_nothing_behind_it_and_opaque_pages_are_refused() -> None:
    tensors = kv_tensors("LBHNC", 32)
    fill(tensors)
    pages = HostPages("opaque/1", tensors)
    out = np.ones((LAYERS, HEADS, 1, pages.format.page_bytes), np.uint8)
    pages.format.zero_behind(out, 32)
    assert out.all()
    with pytest.raises(FieldError, match="encoding is 'opaque/1'"):
        pages.format.zero_behind(out, 31)
