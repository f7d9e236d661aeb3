"""Lookups: from a request's arrival to the answer "so many tokens are at the hub".

Rules:
  1. Nothing here waits. Hashing and lookups run on the hub's thread; a request is answered `None`
     ("ask again") until the answer is there or its time is over.
  2. A miss is remembered: whoever asks again gets the same answer.
  3. A request that waits for a block which is still being written holds no engine blocks.
"""

from __future__ import annotations

import logging
from typing import Any

from kvserver_vllm.chain import Chain
from kvserver_vllm.common import Answer, Common, Tracked
from kvserver_vllm.loads import Loads
from kvserver_vllm.saves import Saves

logger = logging.getLogger("vllm.kvserver")

PIN_S = 2.0
"""Seconds that a lookup's pin holds what it found."""
FRESH_S = 1.0
"""Age up to which a lookup's answer is acted upon; an older one is asked for again."""
POLL_S = 0.02
"""Seconds between two looks at a prefix that another engine is writing."""


class Lookups:
    """Asks the hub, and says what a request may take from it."""

    def __init__(self, common: Common, loads: Loads, saves: Saves) -> None:
        self._common = common
        self._loads = loads
        self._saves = saves

    def begin(self, tracked: Tracked) -> None:
        """A request has arrived."""
        self._ask(tracked, pin_s=PIN_S)

    def _ask(self, tracked: Tracked, pin_s: float) -> None:
        common = self._common
        tracked.asks += 1
        tracked.asked_at = common.clock()
        tracked.answer = None
        tracked.missed = False
        wanted = common.loads and not _reads_nothing(tracked.request) and common.hub.responsive
        blocks = tracked.request.num_tokens // common.block
        common.hub.submit(self._look_up(tracked, tracked.asks, blocks, pin_s, wanted))

    async def _look_up(
        self, tracked: Tracked, ask: int, blocks: int, pin_s: float, wanted: bool
    ) -> None:
        """Runs on the hub's thread: hash, then look up."""
        common, answer = self._common, None
        try:
            if tracked.chain is None:
                lora = tracked.request.lora_request
                digest = common.adapter_digest(lora) if lora is not None else b""
                tracked.chain = Chain(tracked.request, common.block, digest)
            tracked.chain.extend(blocks)
            hashes = tracked.chain.hashes[:blocks]
            if wanted and hashes:
                started = common.clock()
                answer = await common.hub.lookup(common.spec, hashes, pin_s)
                common.log.write(
                    "lookup",
                    request=tracked.request.request_id,
                    blocks=len(hashes),
                    usable=answer.usable if answer else None,
                    live=answer.live if answer else None,
                    ms=round(1e3 * (common.clock() - started), 3),
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
        elif now - tracked.asked_at >= self._common.settings.lookup_ms / 1e3:
            tracked.missed = True
            self._common.count("lookups_late")

    def matched_tokens(self, tracked: Tracked, computed: int) -> tuple[int | None, bool]:
        """vLLM's get_num_new_matched_tokens: (tokens beyond `computed` | None, asynchronous)."""
        now = self._common.clock()
        self._settle(tracked, now)
        if tracked.pending:
            return self._later(tracked, now)
        answer = tracked.answer
        if answer is None or tracked.missed or not self._common.loads:
            return 0, False
        if now - tracked.answered_at > FRESH_S:
            self._ask(tracked, pin_s=PIN_S)
            return self._later(tracked, now)
        usable = self._loads.without_failed(tracked, answer.usable, now)
        if self._worth_waiting(tracked, answer, usable, now):
            if now - tracked.asked_at >= POLL_S:
                self._ask(tracked, pin_s=0.0)
            return self._later(tracked, now)
        tokens = usable * self._common.block - computed
        if tokens < self._common.block:  # not worth a round trip: vLLM computes that in any case
            return 0, False
        if self._loads.must_queue(tracked, usable, computed):
            return self._later(tracked, now)
        tracked.matched_from = computed
        return tokens, True

    def _later(self, tracked: Tracked, now: float) -> tuple[int | None, bool]:
        """`None`, unless the request has waited for the hub for as long as it may in all."""
        if tracked.blocked_since is None:
            tracked.blocked_since = now
        if now - tracked.blocked_since > self._common.settings.load_deadline_ms / 1e3:
            tracked.missed = True
            return 0, False
        return None, False

    def _worth_waiting(self, tracked: Tracked, answer: Answer, usable: int, now: float) -> bool:
        """Whether another engine is writing what comes next, and there is time for it."""
        wait_s = self._common.settings.wait_ms / 1e3
        if answer.live <= answer.usable or usable < answer.usable or not wait_s:
            return False
        assert tracked.chain is not None
        if self._saves.own(tracked.chain.hashes[answer.usable]):
            return False
        if tracked.live_since is None:
            tracked.live_since = now
        return now - tracked.live_since < wait_s


def _reads_nothing(request: Any) -> bool:
    """Requests that want every token computed."""
    sampling = request.sampling_params
    logprobs = sampling is not None and sampling.prompt_logprobs is not None
    return bool(request.skip_reading_prefix_cache or logprobs)
