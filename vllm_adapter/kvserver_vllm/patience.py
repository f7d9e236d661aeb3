"""How long a request waits for blocks that another engine has yet to write.

Rules:
  1. A block that nobody has announced is waited for on a hand-off's hint only, `intent_wait_ms`
     from the request's arrival; others only while the hub knows of a writer.
  2. In all a request waits at most `handoff_wait_ms`, and at most 1.5 times what computing the rest
     itself is estimated to take.
  3. Waiting ends `STALL_S` after the last progress.
  4. Nobody waits for a block that this engine itself is about to write: it might wait for itself.
"""

from __future__ import annotations

from kvserver_vllm.common import Answer, Common, Tracked
from kvserver_vllm.saves import Saves

STALL_S = 1.0
OWN_SHARE = 1.5


class Patience:
    """Judges one request at a time; what it remembers stands in `Tracked`."""

    def __init__(self, common: Common, saves: Saves) -> None:
        self._common = common
        self._saves = saves

    def waits(self, tracked: Tracked, answer: Answer, blocks: int, now: float) -> bool:
        """Whether to ask again: `blocks` are wanted, and the hub's last word is `answer`."""
        if answer.usable >= blocks:
            return False
        settings = self._common.settings
        if tracked.waits_since is None:
            tracked.waits_since = tracked.progress_at = now
        elif answer.usable > tracked.progress:
            tracked.progress_at = now
        tracked.progress = answer.usable
        waited = now - tracked.waits_since
        if waited >= self._longest(tracked, answer, blocks):
            return False
        if answer.live > answer.usable:
            if self._saves.own(tracked.keys(answer.usable, answer.usable + 1)[0]):
                return False
            return now - tracked.progress_at < STALL_S
        return tracked.handed and now - tracked.arrived_at < settings.intent_wait_ms / 1e3

    def _longest(self, tracked: Tracked, answer: Answer, blocks: int) -> float:
        common = self._common
        longest = common.settings.handoff_wait_ms / 1e3
        rest = common.covered(tracked, blocks) - common.covered(tracked, answer.usable)
        own = common.pace.prefill_s(rest)
        return longest if own is None else min(longest, OWN_SHARE * own)
