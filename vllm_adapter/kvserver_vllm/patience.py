"""How long a request waits for blocks that another engine has yet to write.

Rules:
  1. A block that nobody has announced is waited for on a hand-off's hint only, `intent_wait_ms`
     from the request's arrival; others only while the hub knows of a writer.
  2. In all a request waits at most `handoff_wait_ms`, and at most 1.5 times what computing the rest
     itself is estimated to take.
  3. Waiting ends a tenth of `handoff_wait_ms`, and at least a second, after the last progress: a
     cell that somebody committed, or a block that somebody announced.
  4. Nobody waits for a block that this engine itself is about to write: it might wait for itself.
"""

from __future__ import annotations

from kvserver_vllm.common import Answer, Common, Tracked
from kvserver_vllm.saves import Saves

OWN_SHARE = 1.5


class Patience:
    """Judges one request at a time; what it remembers stands in `Tracked`."""

    def __init__(self, common: Common, saves: Saves) -> None:
        self._common = common
        self._saves = saves

    def left(self, tracked: Tracked, answer: Answer, now: float) -> float:
        """Seconds for which it may go on waiting, 0 when it is to take what there is: the hub's
        last word on the blocks that were asked for is `answer`."""
        blocks = tracked.asked_blocks
        if answer.usable >= blocks:
            return 0.0
        if tracked.waits_since is None:
            tracked.waits_since = tracked.progress_at = now
        elif answer.committed > tracked.progress or answer.live > tracked.live:
            tracked.progress_at = now
        tracked.progress, tracked.live = answer.committed, answer.live
        left = tracked.waits_since + self._longest(tracked, answer, blocks) - now
        if answer.live > answer.usable:
            if self._saves.own(tracked.keys(answer.usable, answer.usable + 1)[0]):
                return 0.0
            stalled = now - tracked.progress_at >= self._common.writer_stall_s
            return 0.0 if stalled else max(left, 0.0)
        if not tracked.handed:
            return 0.0
        intent = tracked.arrived_at + self._common.settings.intent_wait_ms / 1e3
        return max(min(left, intent - now), 0.0)

    def _longest(self, tracked: Tracked, answer: Answer, blocks: int) -> float:
        common = self._common
        longest = common.settings.handoff_wait_ms / 1e3
        rest = common.covered(tracked, blocks) - common.covered(tracked, answer.usable)
        own = common.pace.prefill_s(rest)
        return longest if own is None else min(longest, OWN_SHARE * own)
