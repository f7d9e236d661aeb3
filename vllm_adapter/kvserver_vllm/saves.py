"""Saves: blocks that a step completes are announced, ordered from the ranks, and pinned meanwhile.

Rules:
  1. A block is saved once, by the step that computes its last token; a prompt's tail only when
     the prompt is handed off.
  2. What was announced is written or withdrawn; a long prompt's announcement is renewed.
  3. Pages under a push are pinned in the block pool until every rank has let go of them.
  4. A recurrent state is saved as it stands after a prompt that is handed off: elsewhere the next
     step would change it under the push. Without one, blocks of such an engine are of no use.
  5. Pushes of requests that are over may pin a bounded share of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvserver_vllm.common import Common, Tracked
from kvserver_vllm.messages import BlockPages, SaveJob
from kvserver_vllm.pins import PinLedger

ANNOUNCE_S = 10.0
"""Life of an announcement; renewed in half of it while its request computes."""
JOB_BLOCKS_MAX = 1024
ORPHAN_SHARE = 20
"""Of the pool's blocks, 1/20 may stay pinned by pushes of requests that are over."""
ORPHANS_FLOOR = 64


class Saves:
    """What this engine has promised to write, and is writing."""

    def __init__(self, common: Common, ranks: int) -> None:
        """`ranks` report each save."""
        self._common = common
        self._own: set[bytes] = set()
        self._job = 0
        self._pins = PinLedger(ranks)

    def bind(self, pool: Any) -> None:
        self._pins.bind(pool)

    @property
    def jobs(self) -> int:
        """Saves that ranks have not reported."""
        return self._pins.jobs

    def own(self, key: bytes) -> bool:
        """Whether this engine itself is about to write that block, or is writing it."""
        return key in self._own or key in self._pins.saving

    def announce(self, tracked: Tracked) -> None:
        """Say that the blocks of this prompt which the hub lacks are about to be computed."""
        common, chain = self._common, tracked.chain
        if tracked.announced is not None or not common.saves or not common.sections:
            return
        tracked.announced = []
        if chain is None or not common.hub.responsive or not self._wanted(tracked):
            return
        coming = chain.hashes[tracked.saved : chain.prompt_blocks]
        if self._pushes_tail(tracked):
            coming = [*coming, chain.tail]
        if coming:
            tracked.announced = coming
            self._own.update(coming)
            self._tell(tracked)

    def _tell(self, tracked: Tracked) -> None:
        common = self._common
        assert tracked.announced
        tracked.announced_at = common.clock()
        common.hub.submit(common.hub.announce(common.sections, tracked.announced, ANNOUNCE_S))

    def _ordered(self, tracked: Tracked, blocks: Sequence[BlockPages], now: float) -> None:
        """These blocks are on their way to the hub; the rest is announced again in time."""
        if not tracked.announced:
            return
        keys = {block.hash for block in blocks}
        tracked.announced = [key for key in tracked.announced if key not in keys]
        self._own -= keys
        if tracked.announced and now - tracked.announced_at > ANNOUNCE_S / 2:
            self._tell(tracked)

    def forget(self) -> None:
        """The namespace is left: nothing of it is to come from here."""
        self._own.clear()

    def finished(self, request: str, tracked: Tracked) -> None:
        """A request is over, for whatever reason: what it has not computed is not coming."""
        self._withdraw(tracked)
        self._pins.orphan(request)

    def _withdraw(self, tracked: Tracked) -> None:
        common, left = self._common, tracked.announced
        if left:
            self._own.difference_update(left)
            tracked.announced = []
            if common.sections:
                common.hub.submit(common.hub.withdraw(common.sections, left))

    def _take_back(self, requests: dict[str, Tracked]) -> None:
        """The engine was told to produce no more: nobody is to wait for what it announced."""
        if self._own:
            for tracked in requests.values():
                self._withdraw(tracked)

    def orders(self, output: Any, requests: dict[str, Tracked]) -> list[SaveJob]:
        """Jobs for what this step completes; their pages are pinned from here on."""
        common = self._common
        if not common.saves:
            self._take_back(requests)
        if not (common.saves and common.sections and common.hub.responsive):
            return []
        jobs, blocks = [], self._blocks(output, requests)
        for start in range(0, len(blocks), JOB_BLOCKS_MAX):
            self._job += 1
            part = blocks[start : start + JOB_BLOCKS_MAX]
            jobs.append(SaveJob(self._job, tuple(block for block, _ in part)))
            self._pins.pin(self._job, part)
        return jobs

    def _blocks(
        self, output: Any, requests: dict[str, Tracked]
    ) -> list[tuple[BlockPages, Sequence[int]]]:
        """Blocks that are complete after this step, each with the engine blocks to pin."""
        found: list[tuple[BlockPages, Sequence[int]]] = []
        now = self._common.clock()
        taken: set[bytes] = set()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = requests.get(request_id)
            if tracked is None or not self._wanted(tracked):
                continue
            request = tracked.request
            computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
            full = computed // self._common.block
            tail = computed >= request.num_prompt_tokens and self._pushes_tail(tracked)
            if not (full > tracked.saved or tail) or not self._hashed(tracked, full):
                continue
            if self._pins.orphans > self._orphans_max():
                self._common.count("saves_dropped.pins")
                continue
            state = output.kv_connector_block_state
            tables = state.get_block_ids(request_id) if state is not None else None
            if tables is None:
                continue
            completed = self._completed(tracked, full, tail, tables)
            if self._common.recurrent:
                stateless = len(completed) - (computed == tracked.prompt_tokens)
                before, last = completed[:stateless], completed[stateless:]
                completed = self._common.without_states(before) + last
            self._ordered(tracked, completed, now)
            for block in completed:
                name = block.hash
                if name in taken or name in self._pins.saving or not self._common.savable(block):
                    continue
                taken.add(name)
                found.append((block, self._common.engine_blocks(block)))
        return found

    def _completed(
        self, tracked: Tracked, full: int, tail: bool, tables: Sequence[Sequence[int]]
    ) -> list[BlockPages]:
        """The blocks up to `full` that were not saved yet, and the prompt's tail if it is time."""
        common, chain = self._common, tracked.chain
        assert chain is not None
        blocks = []
        if full > tracked.saved:
            blocks = common.block_pages(tracked, range(tracked.saved, full), tables)
            tracked.saved = full
        if tail:
            tracked.tail_saved = True
            at = chain.prompt_blocks
            blocks += common.block_pages(tracked, range(at, at + 1), tables, tail=True)
        return blocks

    def _wanted(self, tracked: Tracked) -> bool:
        """Whether anybody could use what this request computes."""
        return tracked.hands_off or not self._common.recurrent

    def _pushes_tail(self, tracked: Tracked) -> bool:
        """Tails are pushed for hand-offs only: whoever else asked would have to ask for just that
        prompt."""
        chain = tracked.chain
        wanted = tracked.hands_off and not tracked.tail_saved and self._common.tails
        return wanted and chain is not None and bool(chain.tail)

    def _hashed(self, tracked: Tracked, blocks: int) -> bool:
        """Make sure the chain is that long. The prompt's part is the hub thread's work."""
        chain = tracked.chain
        if chain is None:
            return False
        if len(chain.hashes) < min(blocks, chain.prompt_blocks):
            return False
        chain.extend(blocks)
        return True

    def _orphans_max(self) -> int:
        pool = self._common.pool
        total = int(pool.num_gpu_blocks) if pool is not None else 0
        return max(total // ORPHAN_SHARE, min(ORPHANS_FLOOR, total // 2))

    def released(self, job: int, ranks: int) -> None:
        """So many ranks no longer touch the job's pages."""
        self._pins.released(job, ranks)
