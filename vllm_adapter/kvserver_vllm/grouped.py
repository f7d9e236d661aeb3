"""Pages of one section's layers, dealt out to the engine's KV cache groups.

vLLM gives layers of one kind several KV cache groups where another kind has fewer layers (Gemma-3:
five for its windows), each with a block table of its own. To the hub they are layers of one grid:
each is gathered by the page ids of its group, into its place among the section's layers. Recurrent
states are dealt out in the same way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvproto.errors import FieldError
from kvserver_vllm.device import DevicePages
from kvserver_vllm.layout import SKIP, Addresses, Bytes, HostPages, base_of, of_group

Placed = HostPages | DevicePages


def pages_of(encoding: str, tensors: Sequence[Any]) -> Placed:
    """Pages of one KV cache group, wherever its tensors are. FieldError unless they are together"""
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise FieldError("kv_caches", sorted(devices), "all on one device")
    on_host = all(tensor.device.type == "cpu" for tensor in tensors)
    return (HostPages if on_host else DevicePages)(encoding, tensors)


class GroupedPages:
    """Pages of one section's layers, which vLLM may have dealt out to several KV cache groups."""

    def __init__(self, encoding: str, layers: Sequence[tuple[int, Any]], groups: int) -> None:
        """`layers` are (KV cache group, tensor), in order; the engine has so many `groups`."""
        self.layers = len(layers)
        self._groups = groups
        dealt: dict[int, list[int]] = {}
        for at, (group, _) in enumerate(layers):
            dealt.setdefault(group, []).append(at)
        self._dealt = {
            group: (places, pages_of(encoding, [layers[at][1] for at in places]))
            for group, places in dealt.items()
        }
        pages = [one for _, one in self._dealt.values()]
        first = pages[0]
        for other in pages:
            if _page_of(other) != _page_of(first):
                raise FieldError(
                    "kv_caches", _page_of(other), f"equal in all layers, {_page_of(first)}"
                )
        self.heads, self.format = first.heads, first.format
        storages = {base_of(raw): raw for one in pages for raw in one.memory}
        self.memory = list(storages.values())

    def addresses(self, layer: int, stop: int, page_ids: Sequence[int]) -> Addresses | None:
        if not self.format.in_one_piece:
            return None
        found = np.empty((stop - layer, self.heads, self.count(page_ids)), np.uint64)
        for pages, start, end, ids, places in self._parts(layer, stop, page_ids):
            mine = pages.addresses(start, end, ids)
            assert mine is not None
            found[places] = mine
        return found

    def gather(self, layer: int, stop: int, page_ids: Sequence[int], out: Bytes) -> None:
        for pages, start, end, ids, places in self._parts(layer, stop, page_ids):
            pages.gather(start, end, ids, out[places])

    def scatter(self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes) -> None:
        for pages, start, end, ids, places in self._parts(layer, stop, page_ids):
            pages.scatter(start, end, ids, cells[places])

    def present(self, page_ids: Sequence[int]) -> list[int]:
        lists = [of_group(page_ids, group, self._groups) for group in self._dealt]
        return [at for at, ids in enumerate(zip(*lists, strict=True)) if SKIP not in ids]

    def count(self, page_ids: Sequence[int]) -> int:
        return len(page_ids) // self._groups

    def _parts(
        self, layer: int, stop: int, page_ids: Sequence[int]
    ) -> Iterator[tuple[Placed, int, int, Sequence[int], slice]]:
        """(pages of a group, its layers from, to, their page ids, their places in the stretch)."""
        for group, (places, pages) in self._dealt.items():
            ids = of_group(page_ids, group, self._groups)
            start, end = bisect_left(places, layer), bisect_left(places, stop)
            while start < end:
                run = _steady(places, start, end)
                step = places[start + 1] - places[start] if run > start + 1 else 1
                chosen = slice(places[start] - layer, places[run - 1] - layer + 1, step)
                yield pages, start, run, ids, chosen
                start = run


class StatePages:
    """Recurrent states as pages: one for a whole block of the hub, the engine's block of its group.

    What stands for a hub block is a list of page ids like any other section's, of which those of a
    state's group are equal: the id of the engine block (`Common.run`).
    """

    def __init__(self, states: GroupedPages, groups: int) -> None:
        self._states = states
        self._groups = groups
        self.layers, self.heads, self.format = states.layers, states.heads, states.format
        self.memory = states.memory

    def addresses(self, layer: int, stop: int, page_ids: Sequence[int]) -> Addresses | None:
        return self._states.addresses(layer, stop, self._one(page_ids))

    def gather(self, layer: int, stop: int, page_ids: Sequence[int], out: Bytes) -> None:
        self._states.gather(layer, stop, self._one(page_ids), out)

    def scatter(self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes) -> None:
        self._states.scatter(layer, stop, self._one(page_ids), cells)

    def present(self, page_ids: Sequence[int]) -> list[int]:
        return self._states.present(self._one(page_ids))

    def count(self, page_ids: Sequence[int]) -> int:
        return 1

    def _one(self, page_ids: Sequence[int]) -> list[int]:
        """The first of each group."""
        return list(page_ids[:: len(page_ids) // self._groups])


def _page_of(pages: Placed) -> tuple[int, int, int]:
    return pages.heads, pages.format.page_tokens, pages.format.page_bytes


def _steady(places: Sequence[int], start: int, end: int) -> int:
    """Where the places that lie at equal distances, from `start` on, end."""
    stop = start + 1
    while stop < end and places[stop] - places[stop - 1] == places[start + 1] - places[start]:
        stop += 1
    return stop
