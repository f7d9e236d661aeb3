"""KV tensors of an engine <-> pages of the hub's cells.

A page is the KV of one layer, one head and `page_tokens` tokens, in the bytes of its *encoding*.
An engine block holds a whole number of pages. Where they lie follows from the tensors' strides and
storage offset alone; density is never assumed, and layers may share one storage.

Encodings:
  * `cpu-attn-kt/1`  CPU attention: K as [D, N], then V as [N, D], per (block, head). A page is
    K as [D, 32], then V as [32, D], whatever the engine's N: the copy converts.
  * `flash-kv/1`     K||V per token and head, one row a token. Pages of 16 tokens.
  * `mla-rows/1`     multi-head latent attention: one latent a token, the same for all heads. Pages
    of 16 tokens.
  * `state-.../1`    a recurrent state, one for all tokens before: bytes as the engine holds them.
  * anything else    the bytes of a whole engine block, opaque. `page_tokens` is then the engine's
    block size, and since it belongs to the namespace, other block sizes never meet it.

Page ids: engine block b of S pages holds the page ids b * S ... b * S + S - 1. Where the engine has
several KV cache groups, each with a block table of its own, a list of page ids holds those of the
first group, then as many of the second, and so on (`of_group`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]

CPU_ENCODING = "cpu-attn-kt/1"
TOKEN_ENCODING = "flash-kv/1"
LATENT_ENCODING = "mla-rows/1"
STATE_PREFIX = "state-"
CPU_PAGE_TOKENS = 32
TOKEN_PAGE_TOKENS = 16
SKIP = -1


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One layer's KV as logical [blocks, heads, tokens, content]; all strides in bytes."""

    address: int
    blocks: int
    heads: int
    tokens: int
    content_bytes: int
    item_bytes: int
    block_stride: int
    head_stride: int
    token_stride: int
    content_stride: int

    @classmethod
    def of(cls, tensor: Any) -> LayerTensor:
        """Describe a 4-D torch tensor. FieldError when it has another rank."""
        if tensor.dim() != 4:
            raise FieldError("kv_cache", tuple(tensor.shape), "[blocks, heads, tokens, content]")
        item = int(tensor.element_size())
        blocks, heads, tokens, content = (int(n) for n in tensor.shape)
        strides = [int(s) * item for s in tensor.stride()]
        return cls(
            address=int(tensor.storage_offset()) * item,
            blocks=blocks,
            heads=heads,
            tokens=tokens,
            content_bytes=content * item,
            item_bytes=item,
            block_stride=strides[0],
            head_stride=strides[1],
            token_stride=strides[2],
            content_stride=strides[3],
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a page: `rows` extents of `row_bytes`, in engine memory and in the page.

    `start` counts from the origin of (block, head); `offset` from the start of the page, where
    the piece is [..., page_tokens, token_bytes]; token_bytes is 0 when it is opaque.
    """

    offset: int
    rows: int
    row_bytes: int
    start: int
    page_stride: int
    row_stride: int
    token_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class PageFormat:
    """How pages of one encoding are cut out of an engine block of `block_tokens` tokens."""

    encoding: str
    page_tokens: int
    page_bytes: int
    block_tokens: int
    parts: tuple[Part, ...]

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens

    @property
    def in_one_piece(self) -> bool:
        """Whether a page's bytes lie in engine memory as in a cell, without gaps."""
        first = self.parts[0]
        return all(
            (part.rows == 1 or part.row_stride == part.row_bytes)
            and part.start == first.start + part.offset
            and (part.page_stride == first.page_stride or self.pages_per_block == 1)
            for part in self.parts
        )

    def zero_behind(self, cells: Bytes, tokens: int) -> None:
        """Zero what `cells`, [..., pages, page_bytes] of one block, hold behind its `tokens`.

        A page's unused positions hold what another request left there. Does nothing when the last
        page is full; FieldError when the encoding does not say where a token lies.
        """
        used = tokens % self.page_tokens
        if not used:
            return
        if not has_tails(self.encoding):
            raise FieldError("encoding", self.encoding, "one whose tokens can be told apart")
        last = cells[..., -1, :]
        for part in self.parts:
            piece = last[..., part.offset : part.offset + part.size_bytes]
            shape = (*piece.shape[:-1], -1, self.page_tokens, part.token_bytes)
            piece.reshape(shape, copy=False)[..., used:, :] = 0

    @classmethod
    def of(cls, encoding: str, layer: LayerTensor) -> PageFormat:
        """The format for `encoding` with this tensor's strides.

        FieldError when the engine's block is no whole number of pages, or when the strides
        contradict the encoding.
        """
        if layer.content_stride != layer.item_bytes:
            raise FieldError("kv_cache.stride", layer.content_stride, "dense along the content")
        if encoding == CPU_ENCODING:
            return cls._cpu(layer)
        if encoding in (TOKEN_ENCODING, LATENT_ENCODING):
            return cls._rows(encoding, layer, TOKEN_PAGE_TOKENS)
        return cls._rows(encoding, layer, layer.tokens)

    @classmethod
    def _cpu(cls, layer: LayerTensor) -> PageFormat:
        if layer.token_stride != layer.content_bytes:
            raise FieldError("kv_cache.stride", layer.token_stride, "dense per block and head")
        tokens, page = layer.tokens, CPU_PAGE_TOKENS
        _require_whole_pages(tokens, page)
        half = layer.content_bytes // 2
        dims = half // layer.item_bytes
        key = Part(
            offset=0,
            rows=dims,
            row_bytes=page * layer.item_bytes,
            start=0,
            page_stride=page * layer.item_bytes,
            row_stride=tokens * layer.item_bytes,
            token_bytes=layer.item_bytes,
        )
        value = Part(
            offset=key.size_bytes,
            rows=1,
            row_bytes=page * half,
            start=tokens * half,
            page_stride=page * half,
            row_stride=page * half,
            token_bytes=half,
        )
        return cls(CPU_ENCODING, page, page * layer.content_bytes, tokens, (key, value))

    @classmethod
    def _rows(cls, encoding: str, layer: LayerTensor, page: int) -> PageFormat:
        _require_whole_pages(layer.tokens, page)
        part = Part(
            offset=0,
            rows=page,
            row_bytes=layer.content_bytes,
            start=0,
            page_stride=page * layer.token_stride,
            row_stride=layer.token_stride,
            token_bytes=layer.content_bytes if has_tails(encoding) else 0,
        )
        return cls(encoding, page, part.size_bytes, layer.tokens, (part,))


def has_tails(encoding: str) -> bool:
    """Whether a page of this encoding can be filled in part: the rest of it can be zeroed. A state
    is always whole."""
    named = encoding in (CPU_ENCODING, TOKEN_ENCODING, LATENT_ENCODING)
    return named or encoding.startswith(STATE_PREFIX)


def _require_whole_pages(tokens: int, page: int) -> None:
    if tokens % page:
        raise FieldError("block_size", tokens, f"a multiple of page_tokens ({page})")


def of_group(page_ids: Sequence[int], group: int, groups: int) -> Sequence[int]:
    """The page ids of one of the engine's `groups` KV cache groups."""
    count = len(page_ids) // groups
    return page_ids[group * count : (group + 1) * count]


class Pages(Protocol):
    """Engine pages of one section's layers and heads on this rank. Layers are counted from the
    rank's first of that section; `page_ids` are those of all groups of the engine.

    In host memory they are copied as they lie (`HostPages`), on a device they are gathered there
    first (`kvserver_vllm.device`).
    """

    layers: int
    heads: int
    format: PageFormat
    memory: list[Any]
    """The storages that the pages lie in, as arrays or tensors of bytes."""

    def addresses(self, layer: int, stop: int, page_ids: Sequence[int]) -> Addresses | None:
        """Where these pages lie, [stop - layer, heads, len(page_ids)]; None unless each of them is
        one piece."""

    def gather(self, layer: int, stop: int, page_ids: Sequence[int], out: Bytes) -> None:
        """Copy pages into `out`, [stop - layer, heads, pages, page_bytes]."""

    def scatter(self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes) -> None:
        """Copy `cells` into the engine's pages; a page id of SKIP is left out."""

    def present(self, page_ids: Sequence[int]) -> list[int]:
        """Positions of pages that this section's layers have: in no group of it SKIP."""

    def count(self, page_ids: Sequence[int]) -> int:
        """Pages of a block."""


class PlacedPages:
    """What follows from where the tensors lie, of pages of one KV cache group."""

    def __init__(self, encoding: str, tensors: Sequence[Any], bases: Sequence[int]) -> None:
        """`tensors` are the rank's layers in order; `bases`: where the storage of each begins."""
        if not tensors:
            raise FieldError("kv_caches", 0, "at least one layer")
        self._described = [LayerTensor.of(tensor) for tensor in tensors]
        first = self._described[0]
        for layer in self._described:
            if _shape(layer) != _shape(first):
                raise FieldError(
                    "kv_caches", _shape(layer), f"equal in all layers, {_shape(first)}"
                )
        self.layers = len(self._described)
        self.heads = first.heads
        self.blocks = first.blocks
        self.format = PageFormat.of(encoding, first)
        self._bases = bases

    def addresses(self, layer: int, stop: int, page_ids: Sequence[int]) -> Addresses | None:
        form = self.format
        if not form.in_one_piece:
            return None
        block, page = np.divmod(np.array(page_ids, np.int64), form.pages_per_block)
        found = np.empty((stop - layer, self.heads, len(page_ids)), np.uint64)
        for row, (base, one) in enumerate(
            zip(self._bases[layer:stop], self._described[layer:stop], strict=True)
        ):
            start = base + one.address + form.parts[0].start
            inner = start + block * one.block_stride + page * form.parts[0].page_stride
            found[row] = inner + (np.arange(self.heads) * one.head_stride)[:, None]
        return found

    def present(self, page_ids: Sequence[int]) -> list[int]:
        return [at for at, page in enumerate(page_ids) if page != SKIP]

    def count(self, page_ids: Sequence[int]) -> int:
        return len(page_ids)


class HostPages(PlacedPages):
    """Pages of KV tensors in host memory, of one KV cache group."""

    def __init__(self, encoding: str, tensors: Sequence[Any]) -> None:
        """`tensors` are the rank's layers in order, torch tensors on the CPU."""
        memory = [storage_of(tensor).numpy() for tensor in tensors]
        super().__init__(encoding, tensors, [base_of(raw) for raw in memory])
        self.memory = list({base_of(raw): raw for raw in memory}.values())  # each storage once
        self._stretches = [
            (stretch, [_part_view(memory[stretch.start], where) for where in stretch.parts])
            for stretch in stretches(self._described, self._bases, self.format)
        ]

    def gather(self, layer: int, stop: int, page_ids: Sequence[int], out: Bytes) -> None:
        for engine, cells in self._pairs(layer, stop, page_ids, out):
            np.copyto(cells, engine)

    def scatter(self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes) -> None:
        for engine, source in self._pairs(layer, stop, page_ids, cells):
            np.copyto(engine, source)

    def _pairs(
        self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes
    ) -> Iterator[tuple[Bytes, Bytes]]:
        """(engine memory, cells) views of equal shape [layers, blocks, pages, heads, rows, bytes].

        Few and large: each copy gives up the interpreter's lock, and getting it back from a busy
        engine costs up to 5 ms.
        """
        for position, block, count, page, pages in _runs(page_ids, self.format.pages_per_block):
            for stretch, views in self._stretches:
                first, last = max(layer, stretch.start), min(stop, stretch.stop)
                if first >= last:
                    continue
                rows = slice(first - stretch.start, last - stretch.start)
                part_cells = cells[first - layer : last - layer]
                for part, view in zip(self.format.parts, views, strict=True):
                    yield (
                        view[rows, block : block + count, page : page + pages],
                        _cell_part(part_cells, position, part, count, pages),
                    )


@dataclass(frozen=True, slots=True)
class Where:
    """One part of all pages of a stretch: [layers, blocks, pages per block, heads, rows, row bytes]
    with these strides, from `start` of its storage on; bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers [start, stop) that lie at equal distances in one storage."""

    start: int
    stop: int
    parts: list[Where]


def stretches(
    layers: Sequence[LayerTensor], bases: Sequence[int], form: PageFormat
) -> list[Stretch]:
    """As few stretches as the layers' places in memory allow; `bases` as in PlacedPages."""
    found, start = list[Stretch](), 0
    while start < len(layers):
        stop, distance = start + 1, 0
        while stop < len(layers):
            step = layers[stop].address - layers[stop - 1].address
            same = bases[stop] == bases[start]
            if not same or step <= 0 or distance not in (0, step):
                break
            stop, distance = stop + 1, step
        parts = [_where(layers[start], stop - start, distance, form, part) for part in form.parts]
        found.append(Stretch(start, stop, parts))
        start = stop
    return found


def _where(layer: LayerTensor, layers: int, distance: int, form: PageFormat, part: Part) -> Where:
    return Where(
        layer.address + part.start,
        (layers, layer.blocks, form.pages_per_block, layer.heads, part.rows, part.row_bytes),
        (
            distance,
            layer.block_stride,
            part.page_stride,
            layer.head_stride,
            part.row_stride,
            1,
        ),
    )


def check_within(where: Where, storage_bytes: int) -> None:
    """FieldError unless every byte lies in a storage of that size."""
    last = sum((n - 1) * s for n, s in zip(where.shape, where.strides, strict=True))
    if where.start < 0 or min(where.strides) < 0 or where.start + last >= storage_bytes:
        raise FieldError(
            "kv_cache.stride", where.strides, f"within its storage of {storage_bytes} bytes"
        )


def base_of(raw: Any) -> int:
    """Where a storage begins: an array, or a tensor."""
    if isinstance(raw, np.ndarray):
        return int(raw.__array_interface__["data"][0])
    return int(raw.data_ptr())


def _shape(layer: LayerTensor) -> tuple[int, ...]:
    return (
        layer.blocks,
        layer.heads,
        layer.tokens,
        layer.content_bytes,
        layer.item_bytes,
        layer.token_stride,
    )


def storage_of(tensor: Any) -> Any:
    """The tensor's whole storage as a tensor of bytes, which keeps it alive."""
    import torch

    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage())


def _part_view(raw: Bytes, where: Where) -> Bytes:
    check_within(where, raw.size)
    return np.lib.stride_tricks.as_strided(raw[where.start :], where.shape, where.strides)


def _cell_part(cells: Bytes, position: int, part: Part, count: int, pages: int) -> Bytes:
    """[layers, count, pages, heads, rows, row bytes] over cells [layers, heads, pages, bytes]."""
    stop = position + count * pages
    flat = cells[:, :, position:stop, part.offset : part.offset + part.size_bytes]
    split = flat.reshape(*flat.shape[:2], count, pages, part.rows, part.row_bytes)
    return split.transpose(0, 2, 3, 1, 4, 5)


def _runs(
    page_ids: Sequence[int], pages_per_block: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(position, block, blocks, page, pages) of stretches that one strided copy covers."""
    position, total = 0, len(page_ids)
    while position < total:
        first = page_ids[position]
        if first == SKIP:
            position += 1
            continue
        length = 1
        while position + length < total and page_ids[position + length] == first + length:
            length += 1
        block, page = divmod(first, pages_per_block)
        whole = length // pages_per_block
        if page == 0 and whole:
            yield position, block, whole, 0, pages_per_block
            position += whole * pages_per_block
        else:
            pages = min(length, pages_per_block - page)
            yield position, block, 1, page, pages
            position += pages
