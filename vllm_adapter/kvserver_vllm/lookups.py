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
from kvserver_vllm.common import Common, Tracked
from kvserver_vllm.fetches import Fetches
from kvserver_vllm.loads import Loads
from kvserver_vllm.patience import Patience

logger = logging.getLogger("vllm.kvserver")

PIN_S = 2.0
"""Seconds that a lookup's pin holds what it found."""
FRESH_S = 1.0
"""Age up to which a lookup's answer is acted upon; an older one is asked for again."""
TRY_EACH = 16
"""Of the hits that are expected not to pay, each 16th is taken all the same."""
POLL_S = 0.02
"""Seconds between two looks at a prefix that another engine is writing."""


class Lookups:
    """Asks the hub, and says what a request may take from it."""

    def __init__(self, common: Common, loads: Loads, fetches: Fetches, patience: Patience) -> None:
        self._common = common
        self._loads = loads
        self._fetches = fetches
        self._declined = 0
        self._patience = patience

    def begin(self, tracked: Tracked) -> None:
        """A request has arrived."""
        tracked.arrived_at = self._common.clock()
        self._ask(tracked, pin_s=PIN_S)

    def _ask(self, tracked: Tracked, pin_s: float) -> None:
        common = self._common
        tracked.asks += 1
        tracked.asked_at = common.clock()
        tracked.answer = None
        tracked.missed = False
        wanted = common.loads and not _reads_nothing(tracked.request) and common.hub.responsive
        # A state after the last token is of no use: that token is computed again.
        blocks = (tracked.request.num_tokens - common.recurrent) // common.block
        prompt = tracked.prompt_tokens
        unfinished = prompt % common.block > 0 and blocks == prompt // common.block
        tracked.tail = unfinished and tracked.handed and common.tails
        tracked.asked_blocks = blocks + tracked.tail
        common.tell(self._look_up, tracked, tracked.asks, blocks, pin_s, wanted)

    async def _look_up(
        self, tracked: Tracked, ask: int, blocks: int, pin_s: float, wanted: bool
    ) -> None:
        """Runs on the hub's thread: hash, then look up."""
        common, answer = self._common, None
        try:
            if tracked.chain is None:
                lora = tracked.request.lora_request
                digest = common.adapter_digest(lora) if lora is not None else b""
                tracked.chain = Chain(tracked.request, common.block, digest, tracked.prompt_tokens)
            tracked.chain.extend(blocks)
            if tracked.tail or tracked.hands_off:
                tracked.chain.extend_to_tail()
            hashes = tracked.keys(0, blocks + tracked.tail)
            sections = common.sections  # none: the namespace was left meanwhile
            if wanted and hashes and sections:
                started = common.clock()
                answer = await common.hub.lookup(sections, hashes, pin_s, tail=tracked.tail)
                common.count("lookups")
                if answer is None:
                    common.count("lookups_failed")
                common.log.write(
                    "lookup",
                    request=tracked.name,
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
                whole = min(reply[1].usable, tracked.asked_blocks - tracked.tail)
                tracked.saved = max(tracked.saved, whole)
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
        if self._fetches.of(tracked) is not None:
            return self._fetched(tracked, computed, now)
        if now - tracked.answered_at > FRESH_S:
            self._ask(tracked, pin_s=PIN_S)
            return self._later(tracked, now)
        usable = self._loads.without_failed(tracked, answer.usable, now)
        longest = self._patience.left(tracked, answer, now) if usable == answer.usable else 0.0
        if longest > 0:
            if self._begin_fetch(tracked, answer.live, computed, longest):
                return None, False
            if now - tracked.asked_at >= POLL_S:
                self._ask(tracked, pin_s=0.0)
            return self._later(tracked, now)
        covered = self._common.covered(tracked, usable)
        tokens = covered - self._held_back(tracked, covered) - computed
        if tokens < self._least(tracked, computed):
            return 0, False
        if not self._pays(tracked, tokens):
            return 0, False
        if self._loads.crowds(tracked, usable, computed):
            longest = self._common.settings.load_deadline_ms / 1e3
            if self._begin_fetch(tracked, usable, computed, longest):
                return None, False
        if self._loads.must_queue(tracked, usable, computed):
            return self._later(tracked, now)
        tracked.matched_from, tracked.matched_to, tracked.offered = computed, covered, tokens
        return tokens, True

    def _begin_fetch(self, tracked: Tracked, blocks: int, computed: int, longest: float) -> bool:
        """Have the ranks get hold of the blocks up to `blocks`, without blocks of the engine."""
        common, start = self._common, computed // self._common.block
        tokens = common.covered(tracked, blocks) - computed
        if tracked.fetch_refused or not common.settings.staging_bytes:
            return False
        if tokens < self._least(tracked, computed):
            return False
        if self._loads.claimed(tracked, blocks, computed):
            return False
        self._fetches.begin(tracked, start, blocks, longest)
        return True

    def _fetched(self, tracked: Tracked, computed: int, now: float) -> tuple[int | None, bool]:
        """A fetch runs: wait for it without blocks, or plan a load of what it has."""
        if not self._fetches.covers(tracked, computed // self._common.block):
            self._fetches.drop(tracked.name)  # the engine's own cache has shrunk
            self._ask(tracked, pin_s=PIN_S)
            return self._later(tracked, now)
        usable = self._fetches.usable(tracked, now)
        if usable is None:
            return None, False
        covered = self._common.covered(tracked, usable)
        tokens = covered - self._held_back(tracked, covered) - computed
        if tokens < self._least(tracked, computed):
            tracked.missed = True
            self._fetches.drop(tracked.name)
            return 0, False
        if self._loads.must_queue(tracked, usable, computed):
            return self._later(tracked, now)
        tracked.matched_from, tracked.matched_to, tracked.offered = computed, covered, tokens
        return tokens, True

    def _held_back(self, tracked: Tracked, covered: int) -> int:
        """Of a prompt that is there to its last token vLLM computes that one again; its window
        begins a token earlier than the next one's. Told of the whole prompt, vLLM gives up blocks
        for the next one's: it is told of one token less."""
        trimmed = any(section.trimmed for section in self._common.sections)
        return int(trimmed and covered >= tracked.request.num_tokens)

    def _later(self, tracked: Tracked, now: float) -> tuple[int | None, bool]:
        """`None`, unless the request has waited for the hub for as long as it may in all."""
        if tracked.blocked_since is None:
            tracked.blocked_since = now
        if now - tracked.blocked_since > self._common.settings.load_deadline_ms / 1e3:
            tracked.missed = True
            return 0, False
        return None, False

    def _least(self, tracked: Tracked, computed: int) -> int:
        """Fewer tokens are not worth a round trip: vLLM computes that much in any case. After a
        hand-off nothing but the last token is to be computed, unless the engine's own cache, which
        ends at an engine block, has nearly all of it."""
        if not tracked.tail:
            return self._common.settings.min_hit_tokens or self._common.block
        return max(self._common.group_tokens) if computed else 1

    def _pays(self, tracked: Tracked, tokens: int) -> bool:
        """Whether loading so many tokens is expected to take less time than computing them. Decided
        once a request; a few are taken all the same, since only loads tell what loads cost."""
        common = self._common
        if tracked.pays is None:
            load_s, own_s = common.pace.load_s(tokens), common.pace.prefill_s(tokens)
            known = load_s is not None and own_s is not None and load_s > own_s
            tracked.pays = True
            if known and common.settings.hits == "auto" and not tracked.handed:
                self._declined += 1
                tracked.pays = self._declined % TRY_EACH == 0
                if not tracked.pays:
                    common.count("hits_declined")
        return tracked.pays


def _reads_nothing(request: Any) -> bool:
    """Requests that want every token computed."""
    sampling = request.sampling_params
    logprobs = sampling is not None and sampling.prompt_logprobs is not None
    return bool(request.skip_reading_prefix_cache or logprobs)
