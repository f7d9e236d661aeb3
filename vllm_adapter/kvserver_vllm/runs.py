"""Runs: blocks of a request that follow one another, in columns.

A prompt of 8,000 tokens is 62 blocks of the hub, and one call on the engine's thread may name them
all. So a run is handled by its columns, lists that are sliced and joined, and:

Rules:
  1. The scheduler half makes no object per block, and loops over blocks only where some of them
     differ from the rest.
  2. Pickled, a run is bytes: 32 for each hash, 2 or 4 for each page.
  3. The ranks see a sequence of BlockPages. It is made when it is first looked at, which is on the
     link's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

from kvproto.prefix import HASH_BYTES
from kvserver_vllm.messages import BlockPages

SHORT_MAX = 0x7FFF
"""Larger page ids do not fit two bytes."""


@dataclass(slots=True)
class Run:
    """Blocks that follow one another in the chain of one request, and their engine pages."""

    request: str
    parent: bytes
    """The hash before the first block."""
    hashes: Sequence[bytes]
    pages: Sequence[int]
    """Those of the first block, then those of the second, ...; as in BlockPages."""
    width: int
    """Pages of a block; the last one may have fewer."""
    tokens: int
    """Tokens of a block but the last."""
    last_tokens: int

    def __len__(self) -> int:
        return len(self.hashes)

    def pages_of(self, index: int) -> Sequence[int]:
        return self.pages[index * self.width : (index + 1) * self.width]

    def cut(self, start: int, stop: int) -> Run:
        """The blocks [start, stop) of it, at least one."""
        if start == 0 and stop == len(self):
            return self
        return Run(
            self.request,
            self.hashes[start - 1] if start else self.parent,
            self.hashes[start:stop],
            self.pages[start * self.width : stop * self.width],
            self.width,
            self.tokens,
            self.last_tokens if stop == len(self) else self.tokens,
        )

    def stretches(self, wanted: Callable[[int], bool]) -> list[Run]:
        """The blocks at those positions that are `wanted`, as runs."""
        marks = [-1, *(index for index in range(len(self)) if not wanted(index)), len(self)]
        return [self.cut(a + 1, b) for a, b in pairwise(marks) if b > a + 1]

    def blocks(self) -> Iterator[BlockPages]:
        parent, end = self.parent, len(self) - 1
        for index, key in enumerate(self.hashes):
            tokens = self.tokens if index < end else self.last_tokens
            yield BlockPages(key, parent, tuple(self.pages_of(index)), self.request, tokens)
            parent = key

    def packed(self) -> tuple[Any, ...]:
        """What `unpacked` makes an equal run of: plain data, and little of it."""
        ids = array("h" if max(self.pages) <= SHORT_MAX else "i", self.pages)
        keys = b"".join((self.parent, *self.hashes))
        return self.request, keys, ids.typecode, ids.tobytes(), *self._form

    @property
    def _form(self) -> tuple[int, int, int]:
        return self.width, self.tokens, self.last_tokens

    @classmethod
    def unpacked(cls, request: str, keys: bytes, typecode: str, ids: bytes, *form: int) -> Run:
        names = [keys[at : at + HASH_BYTES] for at in range(0, len(keys), HASH_BYTES)]
        return cls(request, names[0], names[1:], array(typecode, ids), *form)


class Blocks(Sequence[BlockPages]):
    """The blocks of some runs, one after another. Only who takes one by its number, or goes
    through them, has them made."""

    __slots__ = ("_made", "_packed", "_runs")

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._packed: tuple[tuple[Any, ...], ...] = ()
        self._made: list[BlockPages] | None = None

    def __len__(self) -> int:
        return len(self._made) if self._made is not None else self._count()

    def _count(self) -> int:
        of_packed = sum(len(keys) // HASH_BYTES - 1 for _, keys, *_ in self._packed)
        return of_packed or sum(map(len, self._runs))

    @overload
    def __getitem__(self, at: int) -> BlockPages: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[BlockPages]: ...
    def __getitem__(self, at: int | slice) -> BlockPages | Sequence[BlockPages]:
        return self._blocks()[at]

    def __iter__(self) -> Iterator[BlockPages]:
        return iter(self._blocks())

    def _blocks(self) -> list[BlockPages]:
        if self._made is None:
            runs = [Run.unpacked(*one) for one in self._packed] or self._runs
            self._made = [block for run in runs for block in run.blocks()]
        return self._made

    def __getstate__(self) -> tuple[tuple[Any, ...], ...]:
        return self._packed or tuple(run.packed() for run in self._runs)

    def __setstate__(self, state: tuple[tuple[Any, ...], ...]) -> None:
        self._runs, self._made, self._packed = (), None, state


def jobs_of(runs: Sequence[Run], blocks_max: int) -> Iterator[list[Run]]:
    """The runs, in order, in lists of at most so many blocks."""
    found: list[Run] = []
    room = blocks_max
    for run in runs:
        start = 0
        while start < len(run):
            stop = min(start + room, len(run))
            found.append(run.cut(start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield found
                found, room = [], blocks_max
    if found:
        yield found
