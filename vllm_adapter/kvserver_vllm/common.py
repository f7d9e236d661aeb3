"""What the rooms of the scheduler half share: the hub's face, the engine's facts, one request.

`Common` is written by the scheduler half only (see scheduler.py); lookups.py, loads.py and saves.py
read it.

Rule: what the hub is told or asked goes out at the end of the step's orders, all of it at once. To
wake the hub's thread takes longer than most calls of this half, and it comes to nothing before the
engine's thread rests: vLLM takes requests in between two steps, and a step follows at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kvproto.prefix import ROOT
from kvserver_vllm.chain import Chain
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import SKIP, of_group
from kvserver_vllm.messages import STALL_S, Section
from kvserver_vllm.pace import Pace
from kvserver_vllm.runs import Run

STALL_SHARE = 10


def stall_s(longest_ms: int) -> float:
    """Seconds without progress after which a wait that may last `longest_ms` ends: a tenth of
    that, and at least STALL_S."""
    return max(STALL_S, longest_ms / 1e3 / STALL_SHARE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hub said about a chain: blocks that can be loaded, and that may come yet."""

    usable: int
    live: int
    tiers: tuple[int, ...] = ()
    committed: int = 0
    """Cells that are there, of all the blocks and sections: grows while a writer writes."""


class Hub(Protocol):
    """What this half needs of the hub."""

    @property
    def responsive(self) -> bool:
        """False while the hub is known not to answer."""

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the hub's thread."""

    async def lookup(
        self, sections: Sequence[Section], hashes: Sequence[bytes], pin_s: float, *, tail: bool
    ) -> Answer | None:
        """`tail`: the last of `hashes` is a prompt's tail. None when there is no answer:
        unreachable, refused or too late."""

    async def announce(
        self, sections: Sequence[Section], hashes: Sequence[bytes], ttl_s: float
    ) -> None: ...

    async def withdraw(self, sections: Sequence[Section], hashes: Sequence[bytes]) -> None:
        """What was announced is not coming: whoever waits for it is told."""


@dataclass(slots=True, eq=False)
class Tracked:
    """What this half knows of one request. The hub's thread writes `reply` only. A step goes
    through all that run, with cold caches: four cache lines each, where a dict had forty."""

    request: Any
    chain: Chain | None
    name: str = ""
    hands_off: bool = False
    handed: bool = False
    reply: tuple[int, Answer | None] | None = None
    asks: int = 0
    asked_at: float = 0.0
    answer: Answer | None = None
    asked_blocks: int = 0
    answered_at: float = 0.0
    missed: bool = False
    blocked_since: float | None = None
    waits_since: float | None = None  # for another engine's blocks
    fetch_refused: bool = False
    pays: bool | None = None
    progress: int = 0  # cells and blocks of which the hub's last word was
    live: int = 0
    progress_at: float = 0.0
    matched_from: int = 0  # tokens that a load brings
    matched_to: int = 0
    offered: int = 0  # of them, as vLLM was told
    announced: list[bytes] | None = None
    announced_at: float = 0.0
    saved: int = 0
    completed: int = 0  # of one that is over: blocks that were computed, saved or not
    put_off: bool = False  # what it has computed, for pushes of others hold too many blocks
    tail: bool = False  # the answer's last block is the prompt's tail
    prompt_tokens: int = 0  # that are saved and loaded at most
    tail_saved: bool = False
    arrived_at: float = 0.0

    def __post_init__(self) -> None:
        params = self.request.kv_transfer_params or {}
        self.hands_off = bool(params.get("do_remote_decode"))
        self.handed = bool(params.get("do_remote_prefill"))
        self.name = self.request.request_id
        self.prompt_tokens = int(self.request.num_prompt_tokens)

    def keys(self, start: int, stop: int) -> list[bytes]:
        """Hashes of the blocks [start, stop) that the answer is about."""
        assert self.chain is not None
        if self.tail and stop > self.chain.prompt_blocks:
            return [*self.chain.hashes[start : self.chain.prompt_blocks], self.chain.tail]
        return self.chain.hashes[start:stop]

    def outlive(self) -> None:
        """The request is over, and some of its blocks are saved yet. It is the engine's, and the
        engine's to let go of."""
        assert self.chain is not None
        self.chain.outlive(self.completed)
        self.request = None

    @property
    def pending(self) -> bool:
        return self.asks > 0 and self.answer is None and not self.missed


@dataclass
class Common:
    """The engine and the hub, as all rooms see them."""

    settings: Settings
    hub: Hub
    log: EventLog
    clock: Callable[[], float]
    group_tokens: tuple[int, ...]
    """Tokens of a block of each of the engine's KV cache groups."""
    loads: bool
    saves: bool
    prefix_caching: bool
    adapter_digest: Callable[[Any], bytes]
    sections: tuple[Section, ...] = ()
    page_tokens: int = 1
    tails: bool = True
    state_groups: frozenset[int] = frozenset()
    """KV cache groups whose blocks hold a recurrent state: their page ids are block ids."""
    plain: bool = False
    """One KV cache group without a state, a page of the hub's for each of its blocks: a request's
    pages are its table, which is not gone through block by block."""
    pace: Pace = field(default_factory=Pace)
    pool: Any = None
    null: int = -1
    """The pool's null block, which stands for one that the engine does not have."""
    counters: dict[str, int] = field(default_factory=dict)
    words: list[tuple[Callable[..., Coroutine[Any, Any, None]], tuple[Any, ...]]] = field(
        default_factory=list
    )
    """What the hub is to be told and asked with the next step."""

    def tell(self, word: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        self.words.append((word, args))

    def send(self) -> None:
        """Have the hub's thread say what it was told to, and ask."""
        if self.words:
            self.hub.submit(_say(self.words))
            self.words = []

    @property
    def block(self) -> int:
        """Tokens of a hub block."""
        return self.settings.block_tokens

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    @property
    def writer_stall_s(self) -> float:
        """Seconds that a request waits for what other engines write while they commit nothing. An
        engine that takes longer for a layer of a chunk needs a longer `handoff_wait_ms`."""
        return stall_s(self.settings.handoff_wait_ms)

    @property
    def recurrent(self) -> bool:
        """Whether some of the layers keep a state in place of KV."""
        return bool(self.state_groups)

    def covered(self, tracked: Tracked, blocks: int) -> int:
        """Tokens that so many blocks of an answer hold: the last one may be the prompt's tail."""
        tokens = blocks * self.block
        return min(tokens, tracked.prompt_tokens) if tracked.tail else tokens

    def run(
        self,
        tracked: Tracked,
        blocks: range,
        tables: Sequence[Sequence[int]],
        *,
        begin: int = 0,
        tail: bool = False,
    ) -> Run:
        """These hub blocks, the last of which is the prompt's tail if `tail`, and their page ids;
        pages before token `begin`, null blocks and those that the engine has not allocated are
        skipped."""
        chain = tracked.chain
        assert chain is not None
        page, block = self.page_tokens, self.settings.block_tokens
        last_tokens = chain.tail_tokens if tail else block
        first = blocks.start * block // page
        stop = -(-((blocks.stop - 1) * block + last_tokens) // page)
        hashes = chain.hashes[blocks.start : blocks.stop - tail]
        if tail:
            hashes.append(chain.tail)
        pages: Sequence[int] = tables[0][first:stop] if self.plain else ()
        if len(pages) != stop - first or self.null in pages or begin > first * page:
            pages = self._pages(tables, first, stop, begin)
        parent = chain.hashes[blocks.start - 1] if blocks.start else ROOT
        width = block // page * len(self.group_tokens)
        return Run(tracked.name, parent, hashes, pages, width, block, last_tokens)

    def _pages(
        self, tables: Sequence[Sequence[int]], first: int, stop: int, begin: int
    ) -> list[int]:
        """The pages [first, stop) of each group, block after block of the hub."""
        page, whole = self.page_tokens, self.block // self.page_tokens
        groups = [
            [block_ids[0]] * (stop - first)
            if group in self.state_groups
            else self._group_pages(block_ids, tokens // page, range(first, stop), begin)
            for group, (block_ids, tokens) in enumerate(zip(tables, self.group_tokens, strict=True))
        ]
        if len(groups) == 1:
            return groups[0]
        starts = range(0, stop - first, whole)
        return [one for at in starts for ids in groups for one in ids[at : at + whole]]

    def _group_pages(
        self, block_ids: Sequence[int], per_block: int, wanted: range, begin: int
    ) -> list[int]:
        """The pages `wanted`, counted from the request's first, in one KV cache group."""
        first, held = wanted.start, min(wanted.stop, len(block_ids) * per_block)
        engine = block_ids[first // per_block : (wanted.stop - 1) // per_block + 1]
        if per_block == 1:
            pages = list(engine)
        else:
            pages = [
                block_ids[n // per_block] * per_block + n % per_block for n in range(first, held)
            ]
        pages += [SKIP] * (len(wanted) - len(pages))
        if begin > first * self.page_tokens or self.null in engine:
            for n in range(first, held):
                if n * self.page_tokens < begin or block_ids[n // per_block] == self.null:
                    pages[n - first] = SKIP
        return pages

    def without_states(self, run: Run, blocks: int) -> Run:
        """The same run, without the pages of state groups in its first so many blocks."""
        groups = len(self.group_tokens)
        pages = list(run.pages)
        for index in range(blocks):
            start, ids = index * run.width, run.pages_of(index)
            count = len(ids) // groups
            for group in self.state_groups:
                at = start + group * count
                pages[at : at + count] = [SKIP] * count
        return replace(run, pages=pages)

    def engine_blocks(self, run: Run) -> Sequence[int]:
        """The engine blocks that its pages lie in; one may be named by several of its blocks."""
        if self.plain:
            return run.pages if SKIP not in run.pages else [p for p in run.pages if p != SKIP]
        found: list[int] = []
        for index in range(len(run)):
            found += self._engine_blocks(run.pages_of(index))
        return found

    def _engine_blocks(self, page_ids: Sequence[int]) -> list[int]:
        """Of one block of the hub."""
        found: set[int] = set()
        for group, group_tokens in enumerate(self.group_tokens):
            state = group in self.state_groups
            per_block = 1 if state else group_tokens // self.page_tokens
            pages = of_group(page_ids, group, len(self.group_tokens))
            found.update(page // per_block for page in pages if page != SKIP)
        return sorted(found)

    def engine_blocks_of(self, tokens: int) -> int:
        """Engine blocks that so many tokens take, at most."""
        return sum(-(-tokens // group_tokens) for group_tokens in self.group_tokens)

    def savable(self, page_ids: Sequence[int]) -> bool:
        """Whether the engine still has all pages of at least one section, of a block."""
        if SKIP not in page_ids:
            return True
        groups = [
            SKIP not in of_group(page_ids, group, len(self.group_tokens))
            for group in range(len(self.group_tokens))
        ]
        return any(all(groups[g] for g in section.groups) for section in self.sections)


async def _say(words: Sequence[tuple[Callable[..., Coroutine[Any, Any, None]], Any]]) -> None:
    await asyncio.gather(*(word(*args) for word, args in words))
