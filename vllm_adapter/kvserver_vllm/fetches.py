"""Fetches: blocks on their way into the ranks' staging, for requests that hold no engine blocks.

Theory of operation. Where blocks are still being written, or where the engine has few to spare, a
request does not wait in blocks of the engine. The ranks are told to fetch: they lease cells as
these are committed (or move them into host memory) and report how far they have come. When the
rest is near, vLLM allocates, and a load takes what the fetch has and the last cells as they come.

Rules:
  1. A request has one fetch, from the order until its load goes out or it is dropped.
  2. A fetch without progress is cut: what is whole by then is loaded, the rest is computed.
     Progress is what arrives; where nothing does for a while, the hub is asked, for its writers
     commit cells before a group of layers is whole.
  3. So is one that takes longer than the request may wait for a writer; but what is complete at the
     hub by then waits for none: it is on its way here, and is taken.
  4. A fetch that the ranks' staging has no room for is refused; the request waits, and is loaded
     from the hub when the blocks are complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvserver_vllm.common import Answer, Common, Tracked
from kvserver_vllm.loads import Loads
from kvserver_vllm.messages import FetchJob, FetchProgress, StepMeta

ASKS = 10
"""So often a fetch asks the hub before it is cut, where nothing comes."""


@dataclass(slots=True)
class Fetch:
    """One under way. It covers the blocks [start, stop) of the request's answer."""

    start: int
    stop: int
    until: float
    progress_at: float
    committed: int
    """Cells at the hub, as far as that was counted as progress."""
    ranks: dict[int, FetchProgress] = field(default_factory=dict)
    cells: int = 0
    asked_at: float = 0.0
    asking: bool = False
    heard: int = 0
    """Cells at the hub, by its last word. The hub's thread writes this, and ends `asking`."""
    over: bool = False
    """No writer is waited for, or not any more."""
    enough: int | None = None
    """Blocks that were complete at the hub when that ended. The hub's thread writes this."""


class Fetches:
    """Fetches under way, and what the ranks are to be told."""

    def __init__(self, common: Common, loads: Loads, ranks: int) -> None:
        self._common = common
        self._loads = loads
        self._ranks = ranks
        self._active: dict[str, Fetch] = {}
        self.outgoing: list[FetchJob] = []
        self.drops: list[str] = []
        """Neither has the ranks heard of; a step looks here before it calls."""

    def begin(self, tracked: Tracked, start: int, stop: int, wait_s: float) -> None:
        """Order the blocks [start, stop); a writer is waited for within `wait_s`."""
        request, now = tracked.name, self._common.clock()
        block, keys = self._common.block, tracked.keys(start, stop)
        tokens = [block] * (stop - start)
        tokens[-1] = self._common.covered(tracked, stop) - (stop - 1) * block
        answer = tracked.answer
        committed = answer.committed if answer is not None else 0
        over = answer is not None and answer.usable >= stop
        self._active[request] = Fetch(start, stop, now + wait_s, now, committed, over=over)
        self._loads.claim(request, keys)
        self.outgoing.append(FetchJob(request, keys, tuple(tokens), wait_s))
        self._common.count("fetches")

    def covers(self, tracked: Tracked, start: int) -> bool:
        """Whether its fetch begins early enough for a load from block `start` on."""
        return self._active[tracked.name].start <= start

    def of(self, tracked: Tracked) -> Fetch | None:
        return self._active.get(tracked.name)

    def take_orders(self, meta: StepMeta) -> None:
        """Tell the ranks of fetches and drops that they have not heard of."""
        meta.fetches, meta.drops = self.outgoing, self.drops
        self.outgoing, self.drops = [], []

    def reported(self, request: str, ranks: dict[int, FetchProgress]) -> None:
        fetch = self._active.get(request)
        if fetch is None:
            return
        fetch.ranks.update(ranks)
        cells = sum(progress.cells for progress in fetch.ranks.values())
        if cells > fetch.cells:
            fetch.cells, fetch.progress_at = cells, self._common.clock()

    def usable(self, tracked: Tracked, now: float) -> int | None:
        """Blocks that a load may be planned with; None while it is worth waiting for more."""
        fetch = self._active[tracked.name]
        reports = list(fetch.ranks.values())
        heard = len(reports) == self._ranks
        if heard and any(progress.refused for progress in reports):
            tracked.fetch_refused = True
            self.drop(tracked.name)
            return None
        if heard and all(progress.near for progress in reports):
            return fetch.stop
        if fetch.heard > fetch.committed:
            fetch.committed, fetch.progress_at = fetch.heard, now
        whole = fetch.start + (min(progress.whole for progress in reports) if heard else 0)
        ended = heard and all(progress.ended for progress in reports)
        stalled = now - fetch.progress_at >= self._common.writer_stall_s
        if ended or stalled or (fetch.enough is not None and whole >= fetch.enough):
            return whole
        if now < fetch.until:
            self._ask(tracked, fetch, now)
        elif fetch.over:
            return whole
        else:
            fetch.over, fetch.until = True, now + self._common.settings.load_deadline_ms / 1e3
            self._common.tell(self._hear_complete, tracked, fetch)
        return None

    def _ask(self, tracked: Tracked, fetch: Fetch, now: float) -> None:
        """Nothing has come for a while: hear whether somebody still writes."""
        quiet = now - max(fetch.progress_at, fetch.asked_at)
        if quiet >= self._common.writer_stall_s / ASKS and not fetch.asking:
            fetch.asked_at, fetch.asking = now, True
            self._common.tell(self._hear, tracked, fetch)

    async def _hear(self, tracked: Tracked, fetch: Fetch) -> None:
        """Runs on the hub's thread."""
        try:
            answer = await self._look(tracked)
            if answer is not None:
                fetch.heard = answer.committed
        finally:
            fetch.asking = False

    async def _hear_complete(self, tracked: Tracked, fetch: Fetch) -> None:
        """Runs on the hub's thread."""
        complete = 0
        try:
            answer = await self._look(tracked)
            if answer is not None:
                complete = min(answer.usable, fetch.stop)
        finally:
            fetch.enough = complete

    async def _look(self, tracked: Tracked) -> Answer | None:
        common, keys = self._common, tracked.keys(0, tracked.asked_blocks)
        sections = common.sections
        if not sections:  # the namespace was left meanwhile
            return None
        return await common.hub.lookup(sections, keys, 0.0, tail=tracked.tail)

    def landing(self, request: str) -> bool:
        """Its load goes out: whether it takes from a fetch."""
        return self._active.pop(request, None) is not None

    def drop(self, request: str) -> None:
        """Nobody will load it."""
        if self._active.pop(request, None) is not None:
            self.drops.append(request)
            self._loads.unclaim(request)
