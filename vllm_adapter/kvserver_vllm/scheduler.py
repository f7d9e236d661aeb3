"""The scheduler half: decides, step by step, what is looked up, loaded and saved.

Rules:
  1. Nothing here waits. Hashing, lookups and announcements run on the hub's thread; a request is
     answered `None` ("ask again") until the answer is there or its time is over.
  2. A miss is remembered, and so is a failed load: whoever asks again gets the same answer.
  3. Loads are asynchronous only; a request that waits for a hub block that is still being written
     holds no engine blocks.
  4. Pages under a push are pinned in the block pool until every rank has let go of them.
  5. `request_finished` always gives the blocks back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvserver_vllm.chain import Chain
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import BlockPages, LoadJob, RankReport, SaveJob, StepMeta
from kvserver_vllm.pins import PinLedger

logger = logging.getLogger("vllm.kvserver")

PIN_S = 2.0
"""Seconds that a lookup's pin holds what it found."""
FRESH_S = 1.0
"""Age up to which a lookup's answer is acted upon; an older one is asked for again."""
POLL_S = 0.02
"""Seconds between two looks at a prefix that another engine is writing."""
ANNOUNCE_S = 10.0
FAILED_KEY_S = 2.0
"""Seconds that a block whose load failed counts as absent for other requests too."""
JOB_BLOCKS_MAX = 1024
ORPHAN_SHARE = 20
"""Of the pool's blocks, 1/20 may stay pinned by pushes of requests that are over."""
ORPHANS_FLOOR = 64
LOADING_SHARE = 2
"""Of the pool's blocks, 1/2 may wait for loads; the next load waits its turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hub said about a chain: blocks that can be loaded, and that may come yet."""

    usable: int
    live: int
    tiers: tuple[int, ...] = ()


class Hub(Protocol):
    """What this half needs of the hub. `spec` is a namespace's canonical encoding."""

    @property
    def responsive(self) -> bool:
        """False while the hub is known not to answer."""

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the hub's thread."""

    async def lookup(self, spec: bytes, hashes: Sequence[bytes], pin_s: float) -> Answer | None:
        """None when there is no answer: unreachable, refused or too late."""

    async def announce(self, spec: bytes, hashes: Sequence[bytes], ttl_s: float) -> None: ...


@dataclass(slots=True)
class Load:
    """A load on its way. `start` is its first hub block."""

    job: LoadJob
    start: int
    engine_blocks: int
    failed: int | None = None


class Tracked:
    """What this half knows of one request. The hub's thread writes `reply` only."""

    def __init__(self, request: Any, chain: Chain | None) -> None:
        self.request = request
        self.chain = chain
        self.reply: tuple[int, Answer | None] | None = None
        self.asks = 0
        self.asked_at = 0.0
        self.answer: Answer | None = None
        self.answered_at = 0.0
        self.missed = False
        self.blocked_since: float | None = None
        self.live_since: float | None = None
        self.matched_from = 0
        self.announced: list[bytes] | None = None
        self.saved = 0

    @property
    def pending(self) -> bool:
        return self.asks > 0 and self.answer is None and not self.missed


class SchedulerHalf:
    """One per engine, called on the scheduler's thread only."""

    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        log: EventLog,
        *,
        engine_block_tokens: int,
        ranks: int,
        loads: bool,
        saves: bool,
        prefix_caching: bool,
        adapter_digest: Callable[[Any], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ranks` report each save; `loads` and `saves` follow from kv_role."""
        self._settings = settings
        self._hub = hub
        self._log = log
        self._engine_block = engine_block_tokens
        self._ranks = ranks
        self._loads = loads
        self._saves = saves
        self._prefix_caching = prefix_caching
        self._adapter_digest = adapter_digest
        self._clock = clock
        self._block = settings.block_tokens
        self._spec = self._told = b""
        self._page_tokens = 1
        self._layer_start: dict[int, int] = {}
        self._pool: Any = None
        self._requests: dict[str, Tracked] = {}
        self._active: dict[str, Load] = {}
        self._loading: set[bytes] = set()
        self._failed_keys: dict[bytes, float] = {}
        self._own: set[bytes] = set()
        self._outgoing: list[LoadJob] = []
        self._aborts: list[str] = []
        self._job = 0
        self._pins = PinLedger(ranks)
        self.counters: dict[str, int] = {}

    # ---- what the engine tells once ----------------------------------------------------------

    def bind_pool(self, pool: Any) -> None:
        self._pool = pool
        self._pins.bind(pool)

    def open(self, spec: bytes, page_tokens: int, layer_start: dict[int, int]) -> None:
        """From now on work in this namespace. Safe to call from the hub's thread."""
        self._page_tokens = page_tokens
        self._layer_start = dict(layer_start)
        self._spec = spec

    def forget(self) -> None:
        """Neither save nor look up for the requests at hand: their KV is of the time before."""
        self._requests.clear()
        self._own.clear()
        self._spec = b""

    # ---- lookups -----------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Start hashing the prompt, and the lookup where the request may use one."""
        if request.abort_immediately or request.is_finished() or request.resumable:
            return
        tracked = Tracked(request, None)
        self._requests[request.request_id] = tracked
        if not self._spec:
            tracked.missed = True
        else:
            self._ask(tracked, pin_s=PIN_S)

    def _ask(self, tracked: Tracked, pin_s: float) -> None:
        tracked.asks += 1
        tracked.asked_at = self._clock()
        tracked.answer = None
        tracked.missed = False
        wanted = self._loads and not _reads_nothing(tracked.request) and self._hub.responsive
        blocks = tracked.request.num_tokens // self._block
        self._hub.submit(self._look_up(tracked, tracked.asks, blocks, pin_s, wanted))

    async def _look_up(
        self, tracked: Tracked, ask: int, blocks: int, pin_s: float, wanted: bool
    ) -> None:
        """Runs on the hub's thread: hash, then look up."""
        answer = None
        try:
            if tracked.chain is None:
                lora = tracked.request.lora_request
                digest = self._adapter_digest(lora) if lora is not None else b""
                tracked.chain = Chain(tracked.request, self._block, digest)
            tracked.chain.extend(blocks)
            hashes = tracked.chain.hashes[:blocks]
            if wanted and hashes:
                started = self._clock()
                answer = await self._hub.lookup(self._spec, hashes, pin_s)
                self._log.write(
                    "lookup",
                    request=tracked.request.request_id,
                    blocks=len(hashes),
                    usable=answer.usable if answer else None,
                    live=answer.live if answer else None,
                    ms=round(1e3 * (self._clock() - started), 3),
                )
        except Exception:
            logger.exception("kvserver: lookup failed; the request goes on without the hub")
        tracked.reply = (ask, answer)

    def _settle(self, tracked: Tracked, now: float) -> None:
        """Take the hub thread's reply, or give up on it when its time is over."""
        if not tracked.pending:
            return
        reply = tracked.reply
        if reply is not None and reply[0] == tracked.asks:
            tracked.answer, tracked.answered_at = reply[1], now
            tracked.missed = reply[1] is None
            if reply[1] is not None:
                tracked.saved = max(tracked.saved, reply[1].usable)
        elif now - tracked.asked_at >= self._settings.lookup_ms / 1e3:
            tracked.missed = True
            self._count("lookups_late")

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """vLLM's get_num_new_matched_tokens: (tokens beyond `computed` | None, asynchronous)."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return 0, False
        now = self._clock()
        self._settle(tracked, now)
        if tracked.pending:
            return self._later(tracked, now)
        answer = tracked.answer
        if answer is None or tracked.missed or not self._loads:
            return 0, False
        if now - tracked.answered_at > FRESH_S:
            self._ask(tracked, pin_s=PIN_S)
            return self._later(tracked, now)
        usable = self._without_failed(tracked, answer.usable, now)
        if self._worth_waiting(tracked, answer, usable, now):
            if now - tracked.asked_at >= POLL_S:
                self._ask(tracked, pin_s=0.0)
            return self._later(tracked, now)
        tokens = usable * self._block - computed
        if tokens < self._block:  # not worth a round trip: vLLM computes that much in any case
            return 0, False
        if self._must_queue(tracked, usable, computed):
            return self._later(tracked, now)
        tracked.matched_from = computed
        return tokens, True

    def _later(self, tracked: Tracked, now: float) -> tuple[int | None, bool]:
        """`None`, unless the request has waited for the hub for as long as it may in all."""
        if tracked.blocked_since is None:
            tracked.blocked_since = now
        if now - tracked.blocked_since > self._settings.load_deadline_ms / 1e3:
            tracked.missed = True
            return 0, False
        return None, False

    def _without_failed(self, tracked: Tracked, usable: int, now: float) -> int:
        """Cut a prefix at the first block whose load failed a moment ago."""
        if not self._failed_keys or tracked.chain is None:
            return usable
        self._failed_keys = {k: t for k, t in self._failed_keys.items() if t > now}
        for index in range(usable):
            if tracked.chain.hashes[index] in self._failed_keys:
                return index
        return usable

    def _worth_waiting(self, tracked: Tracked, answer: Answer, usable: int, now: float) -> bool:
        """Whether another engine is writing what comes next, and there is time for it."""
        wait_s = self._settings.wait_ms / 1e3
        if answer.live <= answer.usable or usable < answer.usable or not wait_s:
            return False
        assert tracked.chain is not None
        key = tracked.chain.hashes[answer.usable]
        if key in self._own or self._pins.saving(key):
            return False
        if tracked.live_since is None:
            tracked.live_since = now
        return now - tracked.live_since < wait_s

    def _must_queue(self, tracked: Tracked, usable: int, computed: int) -> bool:
        """Whether the load has to wait: for an equal prefix, or for its share of blocks."""
        assert tracked.chain is not None
        wanted = tracked.chain.hashes[computed // self._block : usable]
        if self._prefix_caching and any(key in self._loading for key in wanted):
            return True
        if not self._active or self._pool is None:
            return False
        waiting = sum(load.engine_blocks for load in self._active.values())
        needed = -(-(usable * self._block - computed) // self._engine_block)
        return waiting + needed > int(self._pool.num_gpu_blocks) // LOADING_SHARE

    # ---- loads -------------------------------------------------------------------------------

    def after_alloc(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        """vLLM's update_state_after_alloc for the one group: engine blocks of the request."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        if tokens > 0:
            self._start_load(tracked, block_ids, tokens)
        elif tracked.announced is None and self._saves and self._spec:
            self._announce(tracked)

    def _start_load(self, tracked: Tracked, block_ids: Sequence[int], tokens: int) -> None:
        chain = tracked.chain
        assert chain is not None
        request = tracked.request.request_id
        begin, stop = tracked.matched_from, tracked.matched_from + tokens
        first, last = begin // self._block, -(-stop // self._block)
        blocks = tuple(
            self._block_pages(tracked, index, block_ids, begin) for index in range(first, last)
        )
        now = self._clock()
        waited = now - tracked.blocked_since if tracked.blocked_since is not None else 0.0
        deadline = max(0.0, self._settings.load_deadline_ms / 1e3 - waited)
        job = LoadJob(request, blocks, deadline)
        self._active[request] = Load(job, first, -(-tokens // self._engine_block))
        self._loading.update(block.hash for block in blocks)
        self._outgoing.append(job)
        self._count("loads")

    def _block_pages(
        self, tracked: Tracked, index: int, block_ids: Sequence[int], begin: int = 0
    ) -> BlockPages:
        """Page ids of hub block `index`; pages before token `begin` and null blocks are skipped."""
        chain = tracked.chain
        assert chain is not None
        page, per_block = self._page_tokens, self._engine_block // self._page_tokens
        null = int(self._pool.null_block.block_id) if self._pool is not None else -1
        pages = []
        for token in range(index * self._block, (index + 1) * self._block, page):
            engine, within = divmod(token, self._engine_block)
            skip = token < begin or block_ids[engine] == null
            pages.append(SKIP if skip else block_ids[engine] * per_block + within // page)
        return BlockPages(
            hash=chain.hashes[index],
            parent=chain.parent(index),
            pages=tuple(pages),
            request=tracked.request.request_id,
        )

    def _announce(self, tracked: Tracked) -> None:
        """Say that the blocks of this prompt which the hub lacks are about to be computed."""
        chain = tracked.chain
        tracked.announced = []
        if chain is None or not self._hub.responsive:
            return
        coming = chain.hashes[tracked.saved : tracked.request.num_prompt_tokens // self._block]
        if coming:
            tracked.announced = coming
            self._own.update(coming)
            self._hub.submit(self._hub.announce(self._spec, coming, ANNOUNCE_S))

    # ---- each step ---------------------------------------------------------------------------

    def build_meta(self, output: Any) -> StepMeta:
        """vLLM's build_connector_meta; reads `output` only."""
        meta = StepMeta(loads=self._outgoing, aborts=self._aborts)
        self._outgoing, self._aborts = [], []
        if self._saves and self._spec and self._hub.responsive:
            blocks = self._blocks_to_save(output)
            for start in range(0, len(blocks), JOB_BLOCKS_MAX):
                self._job += 1
                part = blocks[start : start + JOB_BLOCKS_MAX]
                meta.saves.append(SaveJob(self._job, tuple(block for block, _ in part)))
                self._pins.pin(self._job, part)
        if meta.saves or meta.loads or self._told != self._spec:
            self._told = self._spec
            meta.spec, meta.layer_start = self._spec, self._layer_start
        return meta

    def _blocks_to_save(self, output: Any) -> list[tuple[BlockPages, list[int]]]:
        """Blocks that are complete after this step, each with the engine blocks to pin."""
        found: list[tuple[BlockPages, list[int]]] = []
        taken: set[bytes] = set()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            request = tracked.request
            computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
            full = computed // self._block
            if full <= tracked.saved or not self._hashed(tracked, full):
                continue
            if self._pins.orphans > self._orphans_max():
                self._count("saves_skipped")
                continue
            state = output.kv_connector_block_state
            tables = state.get_block_ids(request_id) if state is not None else None
            if tables is None:
                continue
            for index in range(tracked.saved, full):
                block = self._block_pages(tracked, index, tables[0])
                if SKIP in block.pages or block.hash in taken or self._pins.saving(block.hash):
                    continue
                taken.add(block.hash)
                found.append((block, self._engine_blocks(block)))
            tracked.saved = full
        return found

    def _hashed(self, tracked: Tracked, blocks: int) -> bool:
        """Make sure the chain is that long. The prompt's part is the hub thread's work."""
        chain = tracked.chain
        if chain is None:
            return False
        prompt = tracked.request.num_prompt_tokens // self._block
        if len(chain.hashes) < min(blocks, prompt):
            return False
        chain.extend(blocks)
        return True

    def _engine_blocks(self, block: BlockPages) -> list[int]:
        per_block = self._engine_block // self._page_tokens
        return sorted({page // per_block for page in block.pages})

    def _orphans_max(self) -> int:
        total = int(self._pool.num_gpu_blocks) if self._pool is not None else 0
        return max(total // ORPHAN_SHARE, min(ORPHANS_FLOOR, total // 2))

    def ranks_reported(self, report: RankReport | None, received: set[str]) -> None:
        """News from the ranks: finished saves, failed blocks, loads that all ranks ended."""
        if report is not None:
            for job, ranks in report.saved.items():
                self._pins.released(job, ranks)
            for request_id, position in report.failed.items():
                load = self._active.get(request_id)
                if load is not None:
                    load.failed = min(position, position if load.failed is None else load.failed)
        for request_id in received:
            load = self._active.pop(request_id, None)
            if load is not None:
                self._end_load(request_id, load)

    def _end_load(self, request_id: str, load: Load) -> None:
        self._loading.difference_update(block.hash for block in load.job.blocks)
        tracked = self._requests.get(request_id)
        if load.failed is None:
            if tracked is not None:
                tracked.blocked_since = None
            return
        self._count("loads_failed")
        until = self._clock() + FAILED_KEY_S
        for block in load.job.blocks[load.failed :]:
            self._failed_keys[block.hash] = until
        if tracked is not None:
            tracked.missed = True
            tracked.answer = None
            tracked.saved = min(tracked.saved, load.start + load.failed)

    def finished(self, request: Any) -> None:
        """vLLM's request_finished, for whatever reason."""
        tracked = self._requests.pop(request.request_id, None)
        if request.request_id in self._active:
            self._aborts.append(request.request_id)
        if tracked is not None:
            self._own.difference_update(tracked.announced or ())
            self._pins.orphan(request.request_id)

    @property
    def has_pending_work(self) -> bool:
        """Whether ranks still owe reports: the engine keeps stepping meanwhile."""
        return bool(self._pins.jobs or self._aborts)

    def tiers_of(self, request: Any, tokens: int) -> dict[int, int]:
        """{tier: tokens} of a load that was just planned; tiers as the hub numbers them."""
        tracked = self._requests.get(request.request_id)
        load = self._active.get(request.request_id)
        if tracked is None or load is None or tracked.answer is None:
            return {}
        counts: dict[int, int] = {}
        left = tokens
        for position, block in enumerate(load.job.blocks):
            index = load.start + position
            known = tracked.answer.tiers
            tier = known[index] if index < len(known) else 0
            here = min(left, self._page_tokens * sum(page != SKIP for page in block.pages))
            counts[tier] = counts.get(tier, 0) + here
            left -= here
        return {tier: count for tier, count in counts.items() if count}

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1


def _reads_nothing(request: Any) -> bool:
    """Requests that want every token computed."""
    sampling = request.sampling_params
    logprobs = sampling is not None and sampling.prompt_logprobs is not None
    return bool(request.skip_reading_prefix_cache or logprobs)
