"""Sections: a model's layers by what they attend to, each kind with a namespace of its own.

Most models are one section. Those that mix full attention with sliding windows (Cohere2, GPT-OSS,
Gemma) are one section for each: the layers with full attention, and those of each window.

Why not one namespace with all layers: of a windowed layer only the last tokens of a prefix are
needed, and engines give the earlier ones up. In one namespace a block without them would stay
partial for ever: the hub gives partial blocks up within seconds and never writes them to disk,
for a partial block is what a writer that died leaves. With namespaces of their own every block is
whole or absent, the early blocks of a window age and leave on their own, and layers of different
page sizes may be neighbours.

Rules:
  1. A section's grid holds its layers in the order of their global indices, whatever pipeline rank
     or KV cache group of the engine they lie in. Both sides agree on it by the attribute `section`,
     which models with full attention only do not have.
  2. A prefix is usable if the full section has every block and each windowed one the last blocks,
     as many as hold the window before the next token. An engine that keeps all KV of a windowed
     layer (`trimmed` False: vLLM's hybrid memory allocator is off) needs every block, since vLLM
     would take what was not loaded for computed when another request ends earlier.
  3. Layers that keep a recurrent state (Mamba, linear attention) are a section, `state`, of which a
     prefix needs the state after its last token and nothing else. A block of it is one page.
  4. A block is pushed to those sections all of whose pages the engine still has, and pulled from
     those any of whose pages the engine has room for. Null blocks stand for what was given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvproto.namespace import NamespaceSpec
from kvserver_vllm.attributes import attributes_of
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.grouped import GroupedPages, StatePages
from kvserver_vllm.identity import (
    attention_layers,
    encoding_of,
    head_range,
    keeps_state,
    kv_dtype_of,
    layer_index,
    layer_starts,
    rank_info,
    specs_of,
    state_info,
)
from kvserver_vllm.layout import STATE_PREFIX, LayerTensor, Pages
from kvserver_vllm.messages import STATE, RankHolds, RankInfo, Section
from kvserver_vllm.rank import RankSection

TRIMMED_KINDS = ("SlidingWindowSpec",)
"""KV cache specs of vLLM whose blocks behind the window are given up."""

Ranks = Mapping[tuple[int, int], RankInfo]


def hold(
    config: Any,
    kv_cache_config: Any,
    kv_caches: Mapping[str, Any],
    tp_rank: int,
    block_tokens: int,
) -> tuple[list[RankSection], RankHolds]:
    """This rank's sections, and the word on them for the scheduler half.

    `kv_caches` are vLLM's KV tensors by layer. UnsupportedError when one cannot be served.
    """
    groups = kv_cache_config.kv_cache_groups
    group_of = {name: at for at, group in enumerate(groups) for name in group.layer_names}
    layers = attention_layers(config, list(group_of))
    states = {at for at, group in enumerate(groups) if keeps_state(group)}
    windows = {
        name: STATE if at in states else int(getattr(layers[name], "sliding_window", None) or 0)
        for name, at in group_of.items()
    }
    sections, infos = [], []
    for window in kinds(windows.values()):
        names = sorted((n for n in group_of if windows[n] == window), key=layer_index)
        tensors = [(group_of[name], kv_caches[name]) for name in names]
        if window == STATE:
            pages, info = _states(kv_cache_config, names, tensors, block_tokens)
            start = 0
        else:
            pages, info = _attention(config, kv_cache_config, names, tensors, tp_rank)
            start, _ = head_range(config, tp_rank)
        infos.append(replace(info, window=window, groups=tuple(sorted({at for at, _ in tensors}))))
        sections.append(RankSection(window, pages, tuple(names), start))
    return sections, RankHolds(tuple(infos), attributes_of(config))


def _attention(
    config: Any,
    kv_cache_config: Any,
    names: Sequence[str],
    tensors: Sequence[tuple[int, Any]],
    tp_rank: int,
) -> tuple[Pages, RankInfo]:
    """Layers of KV, `tensors` with the KV cache group of each."""
    groups = kv_cache_config.kv_cache_groups
    trimming = {
        at
        for at, group in enumerate(groups)
        if all(type(spec).__name__ in TRIMMED_KINDS for spec in specs_of(group))
    }
    encoding = encoding_of(config, names, LayerTensor.of(tensors[0][1]))
    pages = GroupedPages(encoding, tensors, len(groups))
    info = rank_info(config, names, pages, kv_dtype_of(config, names, tensors[0][1]), tp_rank)
    return pages, replace(info, trimmed=all(group in trimming for group, _ in tensors))


def _states(
    kv_cache_config: Any,
    names: Sequence[str],
    tensors: Sequence[tuple[int, Any]],
    block_tokens: int,
) -> tuple[Pages, RankInfo]:
    """Layers that keep a state, which vLLM gives as bytes: [blocks, 1, 1, bytes]."""
    groups = kv_cache_config.kv_cache_groups
    shapes = {tuple(tensor.shape[1:3]) for _, tensor in tensors}
    if shapes != {(1, 1)}:
        raise UnsupportedError(f"recurrent states of shape {sorted(shapes)}, not one a block")
    spec = specs_of(groups[tensors[0][0]])[0]
    pages = StatePages(GroupedPages(STATE_PREFIX, tensors, len(groups)), len(groups))
    return pages, state_info(names, spec, pages, block_tokens)


def kinds(windows: Iterable[int]) -> list[int]:
    """The windows that occur, in the order of the sections: full attention first, states last."""
    return sorted(set(windows), key=lambda window: (window != 0, -window))


def by_section(ranks: Mapping[tuple[int, int], RankHolds]) -> list[Ranks]:
    """What the ranks hold, section by section. A pipeline rank may have no layer of one."""
    every = [info for rank in ranks.values() for info in rank.sections]
    tokens = {info.page_tokens for info in every if info.window != STATE}
    if len(tokens) > 1:
        raise UnsupportedError(f"layers with pages of different tokens: {sorted(tokens)}")
    return [
        {
            rank: info
            for rank, holds in ranks.items()
            for info in holds.sections
            if info.window == window
        }
        for window in kinds(info.window for info in every)
    ]


def section_attribute(ranks: Ranks, sections: int, states: str = "") -> dict[str, str]:
    """What tells the namespaces of one model's sections apart. `states` are the dtypes of its
    recurrent states (`state_dtypes`)."""
    return _name(ranks, sections) | ({"state_dtypes": states} if states else {})


def state_dtypes(sections: Iterable[Ranks]) -> str:
    """In what precision recurrent states are kept: it changes what all later layers see."""
    infos = (info for ranks in sections for info in ranks.values() if info.window == STATE)
    return next((info.kv_dtype for info in infos), "")


def _name(ranks: Ranks, sections: int) -> dict[str, str]:
    window = next(iter(ranks.values())).window
    names = {0: "full", STATE: "state"}
    return {} if sections == 1 else {"section": names.get(window, f"window {window}")}


def section_of(spec: NamespaceSpec, ranks: Ranks) -> Section:
    """What both halves need to know of a section."""
    infos = list(ranks.values())
    return Section(
        spec=spec.canonical,
        layer_start=layer_starts(ranks)[0],
        window=infos[0].window,
        trimmed=all(info.trimmed for info in infos),
        groups=tuple(sorted({group for info in infos for group in info.groups})),
    )
