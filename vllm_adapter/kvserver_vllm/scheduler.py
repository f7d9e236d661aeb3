"""The scheduler half: decides, step by step, what is looked up, loaded and saved.

This module holds the requests and dispatches; lookups.py, fetches.py, loads.py and saves.py hold
the rules. One more stands here: `request_finished` always gives the blocks back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvserver_vllm.common import Common, Hub, Tracked
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.fetches import Fetches
from kvserver_vllm.figures import Recorder
from kvserver_vllm.loads import Loads
from kvserver_vllm.lookups import Lookups
from kvserver_vllm.messages import RankReport, Section, StepMeta
from kvserver_vllm.patience import Patience
from kvserver_vllm.saves import Saves


class SchedulerHalf:
    """One per engine, called on the scheduler's thread only."""

    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        log: EventLog,
        *,
        group_tokens: Sequence[int],
        ranks: int,
        loads: bool,
        saves: bool,
        prefix_caching: bool,
        adapter_digest: Callable[[Any], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`group_tokens` are the tokens of a block of each of the engine's KV cache groups;
        `ranks` report each save; `loads` and `saves` follow from kv_role."""
        self._common = Common(
            settings,
            hub,
            log,
            clock,
            group_tokens=tuple(group_tokens),
            loads=loads,
            saves=saves,
            prefix_caching=prefix_caching,
            adapter_digest=adapter_digest,
        )
        self._loads = Loads(self._common)
        self._fetches = Fetches(self._common, self._loads, ranks)
        self._saves = Saves(self._common, ranks)
        patience = Patience(self._common, self._saves)
        self._lookups = Lookups(self._common, self._loads, self._fetches, patience)
        self._requests: dict[str, Tracked] = {}
        self._told: tuple[Section, ...] = ()
        gauges = {"hub_connected": lambda: float(hub.responsive)}
        self.figures = Recorder("scheduler", self._common.counters, gauges)

    @property
    def counters(self) -> dict[str, int]:
        return self._common.counters

    # ---- what the engine tells once ----------------------------------------------------------

    def bind_pool(self, pool: Any) -> None:
        self._common.pool = pool
        self._common.null = pool.null_block.block_id
        self._saves.bind(pool)

    def open(self, sections: Sequence[Section], page_tokens: int, *, tails: bool) -> None:
        """From now on work in these namespaces. `tails`: their pages can be filled in part. Safe to
        call from the hub's thread."""
        self._common.tails = tails
        self._common.page_tokens = page_tokens
        self._common.state_groups = frozenset(
            group for section in sections if section.recurrent for group in section.groups
        )
        one_page = self._common.group_tokens == (page_tokens,)
        self._common.plain = one_page and not self._common.state_groups
        self._common.sections = tuple(sections)

    def forget(self) -> None:
        """Neither save nor look up for the requests at hand, and use nothing that is still on its
        way: their KV is of the time before."""
        for request in self._requests:
            self._fetches.drop(request)
        self._requests.clear()
        self._loads.forget()
        self._saves.forget()
        self._common.sections = ()

    def obey(self, *, loads: bool, saves: bool) -> None:
        """From the next decision on; loads and pushes under way end as they would. Safe to call
        from the hub's thread."""
        self._common.loads, self._common.saves = loads, saves

    # ---- one request -------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Start hashing the prompt, and the lookup where the request may use one."""
        if request.abort_immediately or request.is_finished() or request.resumable:
            return
        tracked = Tracked(request, None)
        self._requests[request.request_id] = tracked
        if not self._common.sections:
            tracked.missed = True
        else:
            if self._common.recurrent:
                self._hold_one_back(tracked)
            self._lookups.begin(tracked)

    def _hold_one_back(self, tracked: Tracked) -> None:
        """A state is what all tokens before it made of it, and the prompt's last token is computed
        by whoever answers: what is handed over is the state before that one. A prefill leg, whose
        own token nobody wants, does not compute it at all."""
        request = tracked.request
        if tracked.handed:
            tracked.prompt_tokens -= 1
        elif tracked.hands_off:
            shortened = self._common.saves and shorten(request)
            tracked.hands_off, tracked.prompt_tokens = shortened, int(request.num_prompt_tokens)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """vLLM's get_num_new_matched_tokens: (tokens beyond `computed` | None, asynchronous)."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return 0, False
        return self._lookups.matched_tokens(tracked, computed)

    def after_alloc(self, request: Any, tables: Sequence[Sequence[int]], tokens: int) -> None:
        """vLLM's update_state_after_alloc: engine blocks of the request, by KV cache group; they
        are not looked at where no `tokens` are loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        if tokens > 0:
            fetched = self._fetches.landing(tracked.name)
            self._loads.start(tracked, tables, tokens, fetched=fetched)
        else:
            self._saves.announce(tracked)

    def tiers_of(self, request: Any) -> dict[int, int]:
        """{tier: tokens} of a load that was just planned; tiers as the hub numbers them."""
        return self._loads.tiers_of(request.request_id)

    def finished(
        self, request: Any, *, whole: bool, tables: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any] | None:
        """vLLM's request_finished, for whatever reason; `whole` unless it was aborted. `tables` are
        the blocks that it still has. Returns the kv_transfer_params of its answer: after a prefill
        leg, the hint for the decode leg."""
        tracked = self._requests.pop(request.request_id, None)
        self._fetches.drop(request.request_id)
        self._loads.abort(request.request_id)
        if tracked is None:
            return None
        self._saves.finished(request.request_id, tracked, tables if whole else ())
        if not (whole and tracked.hands_off and self._common.saves):
            return None
        return {"do_remote_prefill": True, "do_remote_decode": False}

    # ---- each step ---------------------------------------------------------------------------

    def build_meta(self, output: Any) -> StepMeta:
        """vLLM's build_connector_meta; reads `output` only."""
        common, fetches, loads = self._common, self._fetches, self._loads
        tokens = self._prompt_tokens(output) if output.num_scheduled_tokens else 0
        common.pace.step_begins(common.clock(), tokens)
        meta = StepMeta(saves=self._saves.orders(output, self._requests))
        if fetches.outgoing or fetches.drops:
            fetches.take_orders(meta)
        if loads.outgoing or loads.aborts or loads.voids:
            loads.take_orders(meta)
        if meta.saves or meta.loads or meta.fetches or self._told is not common.sections:
            self._told = meta.sections = common.sections
        if common.words:
            common.send()
        return meta

    def _prompt_tokens(self, output: Any) -> int:
        """Tokens of prompts that this step computes, but those of which it computes a single one:
        that costs what decoding a token does."""
        tokens, log, requests = 0, self._common.log, self._requests
        least = 1 if log.on else 2
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = requests.get(request_id) if scheduled >= least else None
            if tracked is not None:
                request = tracked.request
                left = request.num_prompt_tokens - request.num_computed_tokens
                if left > 0:
                    tokens += min(scheduled, left) if scheduled > 1 else 0
                    if log.on:
                        log.write("scheduled", request=request_id, tokens=scheduled, left=left)
        return tokens

    def ranks_reported(self, report: RankReport | None, received: set[str]) -> None:
        """News from the ranks: finished saves, failed blocks, loads that all ranks ended."""
        self._common.pace.step_ends(self._common.clock())
        if report is not None:
            for job, ranks in report.saved.items():
                self._saves.released(job, ranks)
            if report.lost:
                self._saves.lost(report.lost)
            for request_id, position in report.failed.items():
                self._loads.failed(request_id, position)
            for request_id, news in report.fetched.items():
                self._fetches.reported(request_id, news)
        for request_id in received:
            self._loads.ended(request_id, self._requests.get(request_id))

    @property
    def has_pending_work(self) -> bool:
        """Whether ranks still owe reports, or are owed orders, or the hub a word: the engine keeps
        stepping meanwhile."""
        owed = self._loads.aborts or self._fetches.drops or self._common.words
        return bool(self._saves.jobs or owed)


def shorten(request: Any) -> bool:
    """Take the last token from a prompt that vLLM has not scheduled yet, and let it answer with one
    token. Whether that could be done."""
    if request.prompt_token_ids is None or request.num_prompt_tokens < 2:
        return False
    if request.prompt_embeds is not None or request.num_tokens > request.num_prompt_tokens:
        return False
    request.prompt_token_ids = request.prompt_token_ids[:-1]
    del request._all_token_ids[-1:]
    request.num_prompt_tokens -= 1
    request.max_tokens = 1
    return True
