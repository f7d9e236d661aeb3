"""Loads: hub blocks on their way into blocks of the engine.

Rules:
  1. Loads are asynchronous only, one per request, and bounded in the engine blocks they hold. One
     that would take much of what is free is fetched first (fetches.py).
  2. One pull per prefix: an equal prompt waits for the first one's blocks where vLLM caches them.
  3. A load in which nothing arrives for a second (or, if that is longer, a tenth of its deadline)
     is over: it holds blocks of the engine, and a hub that hangs shall not.
  4. A failed load is remembered, for the request and, for a moment, for the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvserver_vllm.common import Common, Tracked, stall_s
from kvserver_vllm.layout import SKIP, of_group
from kvserver_vllm.messages import LoadJob, StepMeta
from kvserver_vllm.runs import Blocks, Run

FAILED_KEY_S = 2.0
"""Seconds that a block whose load failed counts as absent for other requests too."""
TIERS = {1: "device", 2: "host", 3: "disk"}
"""As the hub numbers them."""
HOST_TIER = 2
DIRECT_SHARE = 4
"""A load that needs more than 1/4 of the free blocks is fetched first, without holding any."""
LOADING_SHARE = 2
"""Of the pool's blocks, 1/2 may wait for loads; the next load waits its turn."""


@dataclass(slots=True)
class Load:
    """A load on its way. `start` is its first hub block."""

    request: str
    start: int
    engine_blocks: int
    tokens: int
    hashes: Sequence[bytes]
    tiers: Sequence[int]
    """Of each block, as the hub numbers them."""
    fetched: bool
    ordered_at: float
    deadline_s: float
    make: Callable[[], Run]
    """Works out what is ordered, on first need: by `start` or by the step's orders, two calls on
    the engine's thread that share the work."""
    run: Run | None = None
    failed: int | None = None
    aborted: bool = False


class Loads:
    """Loads under way, and the keys of those that failed."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._active: dict[str, Load] = {}
        self._claims: dict[bytes, str] = {}  # key -> the request that gets it
        self._claimed: dict[str, list[bytes]] = {}  # and the other way round
        self._failed_keys: dict[bytes, float] = {}
        self.outgoing: list[Load] = []
        self.aborts: list[str] = []
        self.voids: list[str] = []
        """None of these have the ranks heard of; a step looks here before it calls."""

    def without_failed(self, tracked: Tracked, usable: int, now: float) -> int:
        """Cut a prefix at the first block whose load failed a moment ago."""
        if not self._failed_keys or tracked.chain is None:
            return usable
        self._failed_keys = {k: t for k, t in self._failed_keys.items() if t > now}
        for index, key in enumerate(tracked.keys(0, usable)):
            if key in self._failed_keys:
                return index
        return usable

    def must_queue(self, tracked: Tracked, usable: int, computed: int) -> bool:
        """Whether the load has to wait: for an equal prefix, or for its share of blocks."""
        common = self._common
        if self.claimed(tracked, usable, computed):
            return True
        if not self._active or common.pool is None:
            return False
        waiting = sum(load.engine_blocks for load in self._active.values())
        needed = self._needed(tracked, usable, computed)
        return waiting + needed > int(common.pool.num_gpu_blocks) // LOADING_SHARE

    def claimed(self, tracked: Tracked, usable: int, computed: int) -> bool:
        """Whether another request gets some of these blocks, and vLLM will have them cached."""
        if not self._common.prefix_caching or not self._claims:
            return False
        wanted = tracked.keys(computed // self._common.block, usable)
        if self._claims.keys().isdisjoint(wanted):
            return False
        mine = tracked.name
        return any(self._claims.get(key, mine) != mine for key in wanted)

    def claim(self, request: str, keys: Sequence[bytes]) -> None:
        """This request gets these blocks: others wait for them."""
        if self._common.prefix_caching:
            self._claims.update(dict.fromkeys(keys, request))
            self._claimed.setdefault(request, []).extend(keys)

    def unclaim(self, request: str) -> None:
        for key in self._claimed.pop(request, ()):
            if self._claims.get(key) == request:
                del self._claims[key]

    def crowds(self, tracked: Tracked, usable: int, computed: int) -> bool:
        """Whether so many blocks, waiting for the hub, would leave others too few."""
        pool = self._common.pool
        if pool is None:
            return False
        free = int(pool.get_num_free_blocks())
        return self._needed(tracked, usable, computed) > free // DIRECT_SHARE

    def _needed(self, tracked: Tracked, usable: int, computed: int) -> int:
        """Engine blocks of a load."""
        tokens = self._common.covered(tracked, usable) - computed
        return self._common.engine_blocks_of(tokens)

    def start(
        self, tracked: Tracked, tables: Sequence[Sequence[int]], tokens: int, *, fetched: bool
    ) -> None:
        """The engine gave blocks to a request whose `tokens` come from the hub, or from a fetch: as
        many as it was offered, or fewer."""
        common = self._common
        request = tracked.name
        begin, stop = tracked.matched_from, tracked.matched_to
        if tokens < tracked.offered:
            stop = begin + tokens
        first, last = begin // common.block, -(-stop // common.block)
        assert tracked.chain is not None
        tail = tracked.tail and last > tracked.chain.prompt_blocks
        hashes, now = tracked.keys(first, last), common.clock()
        waited = now - tracked.blocked_since if tracked.blocked_since is not None else 0.0
        longest = common.settings.load_deadline_ms / 1e3
        needed = common.engine_blocks_of(tokens)
        tiers = _tiers(tracked, first, last, fetched)
        make = partial(common.run, tracked, range(first, last), tables, begin=begin, tail=tail)
        load = Load(
            request, first, needed, tokens, hashes, tiers, fetched, now, max(0.0, longest - waited),
            make,
        )  # fmt: skip
        self._active[request] = load
        self.claim(request, hashes)
        self.outgoing.append(load)
        common.count("loads")

    def take_orders(self, meta: StepMeta) -> None:
        """Tell the ranks of loads, aborts and voids that they have not heard of."""
        stall = stall_s(self._common.settings.load_deadline_ms)
        meta.loads = [
            LoadJob(one.request, Blocks([self._run(one)]), one.deadline_s, one.fetched, stall)
            for one in self.outgoing
        ]
        meta.aborts, meta.voids = self.aborts, self.voids
        self.outgoing, self.aborts, self.voids = [], [], []

    def _run(self, load: Load) -> Run:
        if load.run is None:
            run = load.make()
            recurrent = self._common.recurrent
            load.run = self._common.without_states(run, len(run) - 1) if recurrent else run
        return load.run

    def forget(self) -> None:
        """The namespace is left: what is still on its way is reported as failed, whole."""
        self.voids += self._active

    def failed(self, request: str, position: int) -> None:
        """A rank lacks the block at `position` of this request's load."""
        load = self._active.get(request)
        if load is not None:
            load.failed = min(position, position if load.failed is None else load.failed)

    def ended(self, request: str, tracked: Tracked | None) -> None:
        """All ranks have reported this request's load."""
        load = self._active.pop(request, None)
        if load is None:
            return
        self.unclaim(request)
        self._count(load)
        if load.failed is None:
            if not load.fetched:
                common = self._common
                common.pace.loaded(load.tokens, common.clock() - load.ordered_at)
            if tracked is not None:
                tracked.blocked_since = None
            return
        self._common.count("loads_failed")
        until = self._common.clock() + FAILED_KEY_S
        self._failed_keys.update(dict.fromkeys(load.hashes[load.failed :], until))
        if tracked is not None:
            tracked.missed = True
            tracked.answer = None
            tracked.saved = min(tracked.saved, load.start + load.failed)

    def abort(self, request: str) -> None:
        """The request is over; its load, if any, is reported all the same."""
        load = self._active.get(request)
        if load is not None:
            load.aborted = True
            self.aborts.append(request)

    def _count(self, load: Load) -> None:
        """What it brought: nothing to a request that is over, and where vLLM has several KV cache
        groups or a state, nothing if any of it failed."""
        common, came = self._common, load.failed
        whole = len(common.group_tokens) > 1 or common.recurrent
        if load.aborted or (came is not None and whole):
            came = 0
        for tier, tokens in self._counts(load, came).items():
            if tier in TIERS:
                common.count(f"hit_tokens.{TIERS[tier]}", tokens)

    def tiers_of(self, request: str) -> dict[int, int]:
        """{tier: tokens} of a load that was just planned; tiers as the hub numbers them."""
        load = self._active.get(request)
        return self._counts(load) if load is not None else {}

    def _counts(self, load: Load, blocks: int | None = None) -> dict[int, int]:
        """{tier: tokens} of the first so many blocks of a load."""
        first, of_one = load.tiers[0], load.tiers.count(load.tiers[0]) == len(load.tiers)
        trimmed = any(section.trimmed for section in self._common.sections)
        if blocks is None and of_one and not trimmed:
            return {first: load.tokens}
        counts: dict[int, int] = {}
        for tier, tokens in list(zip(load.tiers, self._tokens(load), strict=True))[:blocks]:
            if tokens:
                counts[tier] = counts.get(tier, 0) + tokens
        return counts

    def _tokens(self, load: Load) -> list[int]:
        """Tokens that each block of a load brings."""
        run, left = self._run(load), load.tokens
        found: list[int] = []
        for index in range(len(run)):
            here = run.tokens if index < len(run) - 1 else run.last_tokens
            pages = run.pages_of(index)
            if SKIP in pages:
                mine = self._first_section(pages)
                here = self._common.page_tokens * sum(page != SKIP for page in mine)
            found.append(min(left, here))
            left -= found[-1]
        if self._common.recurrent:  # alone, a state brings all tokens before it
            found[-1] += left
        return found

    def _first_section(self, pages: Sequence[int]) -> Sequence[int]:
        """Those of the section that the answer's tiers are about, in one of its groups."""
        common = self._common
        return of_group(pages, common.sections[0].groups[0], len(common.group_tokens))


def _tiers(tracked: Tracked, first: int, last: int, fetched: bool) -> list[int]:
    """Of the hub blocks [first, last); what is being written stands in the hub's memory."""
    known = list(tracked.answer.tiers[first:last]) if tracked.answer is not None else []
    known += [0] * (last - first - len(known))
    return [tier or HOST_TIER for tier in known] if fetched and 0 in known else known
