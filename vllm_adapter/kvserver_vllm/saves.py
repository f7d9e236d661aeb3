"""Saves: blocks that a step completes are announced, ordered from the ranks, and pinned meanwhile.

Rules:
  1. A block is saved once, by the step that computes its last token, a prompt's tail only when the
     prompt is handed off. Of a prompt that is not, a step names so many blocks, and leaves the rest
     to the next one: the engine's thread does a little at a time. Of what a step does not itself
     compute (the engine had it, or an earlier step left it) it names so many of all prompts, and
     then looks at no more of them than at those that compute a block or are handed off.
  2. What was announced is written or withdrawn: with its request, or as soon as a rank has given
     its push up. A long prompt's announcement is renewed.
  3. Pages under a push are pinned in the block pool until every rank has let go of them.
  4. A recurrent state is saved as it stands after a prompt that is handed off: elsewhere the next
     step would change it under the push. Without one, blocks of such an engine are of no use.
  5. Pushes of requests that are over may pin a bounded share of the pool.
  6. What a request leaves unnamed when it ends stays pinned, and later steps name it: in the order
     in which requests ended, so many blocks a step less those of requests that go on, and from
     `pin_ms` after the end so many a step whatever those take. The engine keeps stepping for it; it
     is announced still. Nothing is left of a request that was aborted, and of no request once the
     namespace is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserver_vllm.common import Common, Tracked
from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import SaveJob
from kvserver_vllm.pins import PinLedger
from kvserver_vllm.runs import Blocks, Run, jobs_of

ANNOUNCE_S = 10.0
"""Life of an announcement; renewed in half of it while its request computes."""
JOB_BLOCKS_MAX = 1024
STEP_BLOCKS = 24
"""Blocks of one request that a step names, unless somebody waits for them; of all requests that are
over, together; of all that it does not compute, too."""
ROOM_MIN = STEP_BLOCKS // 2
"""With less room than that left by a request that had several a step looks for nothing more to
name: vLLM's table of one more request costs as much as what would be named of it."""
ORPHAN_SHARE = 20
"""Of the pool's blocks, 1/20 may stay pinned by pushes of requests that are over."""
ORPHANS_FLOOR = 64


@dataclass(slots=True)
class Ended:
    """A request that is over. Its blocks [tracked.saved, tracked.completed) are to be named yet,
    and what `tables` name of them is held."""

    tracked: Tracked
    tables: Sequence[Sequence[int]]
    until: float
    """From this instant on requests that go on do not come before it."""


class Saves:
    """What this engine has promised to write, and is writing."""

    def __init__(self, common: Common, ranks: int) -> None:
        """`ranks` report each save."""
        self._common = common
        self._own: set[bytes] = set()
        self._job = 0
        self._ranks = ranks
        self._pins = PinLedger(ranks)
        self._ended: deque[Ended] = deque()
        self._orphans_max = 0

    def bind(self, pool: Any) -> None:
        total = int(pool.num_gpu_blocks)
        self._orphans_max = max(total // ORPHAN_SHARE, min(ORPHANS_FLOOR, total // 2))
        self._pins.bind(pool)

    @property
    def jobs(self) -> int:
        """Saves that ranks have not reported, and ended requests that were not named whole."""
        return self._pins.jobs + len(self._ended)

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
        common.tell(common.hub.announce, common.sections, tracked.announced, ANNOUNCE_S)

    def _ordered(self, tracked: Tracked, runs: Sequence[Run], now: float) -> None:
        """These blocks are on their way to the hub; the rest is announced again in time."""
        assert tracked.announced
        for run in runs:
            self._own.difference_update(run.hashes)
            if tracked.announced[: len(run)] == run.hashes:
                tracked.announced = tracked.announced[len(run) :]
            else:
                keys = set(run.hashes)
                tracked.announced = [key for key in tracked.announced if key not in keys]
        if tracked.announced and now - tracked.announced_at > ANNOUNCE_S / 2:
            self._tell(tracked)

    def forget(self) -> None:
        """The namespace is left: nothing of it is to come from here."""
        self._own.clear()
        for one in self._ended:
            self._pins.let_go(self._held(one, one.tracked.saved, None))
        self._ended.clear()

    def finished(
        self, request: str, tracked: Tracked, tables: Sequence[Sequence[int]] = ()
    ) -> None:
        """A request is over, for whatever reason: what it has not computed is not coming, nor what
        was put off to the last. `tables`: its blocks, if what it has computed stands in them."""
        of = tracked.request
        tracked.completed = min(of.num_computed_tokens, of.num_tokens) // self._common.block
        left = tracked.completed > tracked.saved and any(tables) and self._on
        if left and not tracked.put_off and not self._common.recurrent:
            tracked.put_off = self._pins.orphans > self._orphans_max
            if not tracked.put_off and self._known(tracked, tracked.completed):
                until = self._common.clock() + self._common.settings.pin_ms / 1e3
                tracked.outlive()
                one = Ended(tracked, tables, until)
                self._pins.hold(self._held(one, tracked.saved, None))
                self._ended.append(one)
                self._pins.orphan(request)
                return
        if tracked.put_off:
            self._common.count("saves_dropped.pins")
        self._withdraw(tracked)
        self._pins.orphan(request)

    def _held(self, one: Ended, start: int, stop: int | None) -> list[int]:
        """The engine's blocks from where the hub's block `start` begins to where `stop` does, None:
        to the end of all that is left. What two of the hub's share goes with the later one."""
        common, end = self._common, one.tracked.completed * self._common.block
        found: list[int] = []
        null = common.pool.null_block.block_id if common.pool is not None else -1
        for ids, tokens in zip(one.tables, common.group_tokens, strict=True):
            last = -(-end // tokens) if stop is None else stop * common.block // tokens
            found += ids[start * common.block // tokens : last]
        return [block for block in found if block != null] if null in found else found

    def _of_ended(self, room: int) -> list[SaveJob]:
        """Jobs for what this step names of requests that are over: `room` blocks, as many as a step
        may where the time of the first is over, and all of what somebody waits for."""
        common = self._common
        jobs: list[SaveJob] = []
        now = common.clock()
        if now >= self._ended[0].until:
            room = STEP_BLOCKS
        while self._ended:
            one = self._ended[0]
            tracked, start = one.tracked, one.tracked.saved
            stop = tracked.completed
            if not tracked.hands_off:
                stop = min(stop, start + room)
            if stop == start:
                break
            room = max(0, room - (stop - start))
            assert tracked.chain is not None
            if len(tracked.chain.hashes) < stop:
                tracked.chain.extend(stop)
            run = common.run(tracked, range(start, stop), one.tables)
            tracked.saved = stop
            if tracked.announced:
                self._ordered(tracked, [run], now)
            whole = stop == tracked.completed
            held: Sequence[int]
            if common.plain:
                held = common.engine_blocks(run)
            else:
                held = self._held(one, start, None if whole else stop)
            jobs += self._jobs(self._new(run), held)
            if whole:
                self._ended.popleft()
                self._withdraw(tracked)
        return jobs

    def _withdraw(self, tracked: Tracked) -> None:
        common, left = self._common, tracked.announced
        if left:
            self._own.difference_update(left)
            tracked.announced = []
            if common.sections:
                common.tell(common.hub.withdraw, common.sections, left)

    def _take_back(self, requests: dict[str, Tracked]) -> None:
        """The engine was told to produce no more: nobody is to wait for what it announced."""
        if self._own:
            for tracked in requests.values():
                self._withdraw(tracked)

    def orders(self, output: Any, requests: dict[str, Tracked]) -> Sequence[SaveJob]:
        """Jobs for what this step completes; their pages are pinned from here on."""
        if not self._common.saves:
            self._take_back(requests)
        jobs: Sequence[SaveJob] = ()
        if output.num_scheduled_tokens and self._on:
            runs = self._runs(output, requests)
            if runs:
                jobs = self._jobs(runs)
        if self._ended:
            named = sum(len(job.blocks) for job in jobs)
            jobs = [*jobs, *self._of_ended(max(0, STEP_BLOCKS - named))]
        return jobs

    @property
    def _on(self) -> bool:
        common = self._common
        return common.saves and bool(common.sections) and common.hub.responsive

    def _jobs(self, runs: Sequence[Run], held: Sequence[int] | None = None) -> list[SaveJob]:
        """They pin their pages from here on. `held`: the engine's blocks that were held for these
        runs, of a request that is over; what no job pins is let go of."""
        common, pins = self._common, self._pins
        jobs: list[SaveJob] = []
        single = len(runs) == 1 and len(runs[0].hashes) <= JOB_BLOCKS_MAX
        for part in (runs,) if single else jobs_of(runs, JOB_BLOCKS_MAX):
            self._job += 1
            jobs.append(SaveJob(self._job, Blocks(part)))
            reads = list(map(common.engine_blocks, part))
            if single and reads[0] == held:
                pins.take_over(self._job, part[0], held)
                return jobs
            pins.pin(self._job, part, reads, over=held is not None)
        if held is not None:
            pins.let_go(held)
        return jobs

    def _runs(self, output: Any, requests: dict[str, Tracked]) -> list[Run]:
        """Blocks that are complete after this step, and that no other push has. One function, and
        what few requests need stands behind what tells them: caches are cold here."""
        found: list[Run] = []
        common, state, room = self._common, output.kv_connector_block_state, STEP_BLOCKS
        block, recurrent = common.settings.block_tokens, bool(common.state_groups)
        crowded = self._pins.orphans > self._orphans_max
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked, own = requests.get(request_id), scheduled // block
            if tracked is None or not (tracked.hands_off or ((room or own) and not recurrent)):
                continue
            request, tail = tracked.request, False
            computed = request.num_computed_tokens + scheduled
            full = computed // block
            if not (full > tracked.saved or tracked.hands_off):
                continue
            if computed > request.num_tokens:  # some are drafts
                computed = request.num_tokens
                full = computed // block
            if tracked.hands_off:
                tail = computed >= request.num_prompt_tokens and self._pushes_tail(tracked)
            else:
                full = min(full, tracked.saved + min(STEP_BLOCKS, room + own))
            chain = tracked.chain
            if not (full > tracked.saved or tail) or chain is None:
                continue
            if len(chain.hashes) < full and not self._hashed(tracked, full):
                continue
            tracked.put_off = crowded
            tables = state.get_block_ids(request_id) if state is not None and not crowded else None
            if tables is None:
                continue
            if not tracked.hands_off:
                more = full - tracked.saved - own
                room = max(0, room - max(0, more))
                room = 0 if more > 1 and room < ROOM_MIN else room
            completed = []
            if full > tracked.saved:
                completed.append(common.run(tracked, range(tracked.saved, full), tables))
                tracked.saved = full
            if tail:
                completed.append(self._tail(tracked, tables))
            if recurrent:
                stateful = computed == tracked.prompt_tokens
                completed = self._without_states(completed, stateful)
            if tracked.announced:
                self._ordered(tracked, completed, common.clock())
            for run in completed:
                found += self._new(run)
        return found

    def _new(self, run: Run) -> Sequence[Run]:
        """What of it is not on its way already, and still whole: that is on its way from here."""
        saving, savable, keys = self._pins.saving, self._common.savable, run.hashes
        if saving.isdisjoint(keys) and SKIP not in run.pages:
            saving.update(keys)
            return (run,)
        if saving.issuperset(keys):
            return ()
        found = run.stretches(lambda at: keys[at] not in saving and savable(run.pages_of(at)))
        for new in found:
            saving.update(new.hashes)
        return found

    def _tail(self, tracked: Tracked, tables: Sequence[Sequence[int]]) -> Run:
        """The prompt's, whose time it is."""
        assert tracked.chain is not None
        tracked.tail_saved = True
        at = tracked.chain.prompt_blocks
        return self._common.run(tracked, range(at, at + 1), tables, tail=True)

    def _without_states(self, runs: Sequence[Run], stateful: bool) -> list[Run]:
        """The states are those after the last block, if it is `stateful`, and of no other."""
        last = len(runs) - 1
        return [
            self._common.without_states(run, len(run) - (stateful and at == last))
            for at, run in enumerate(runs)
        ]

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
        if not self._known(tracked, blocks):
            return False
        assert tracked.chain is not None
        tracked.chain.extend(blocks)
        return True

    def _known(self, tracked: Tracked, blocks: int) -> bool:
        """Whether the prompt's part of so long a chain is there."""
        chain = tracked.chain
        return chain is not None and len(chain.hashes) >= min(blocks, chain.prompt_blocks)

    def lost(self, keys: Sequence[bytes]) -> None:
        """A rank has given up pushing these blocks, which are whole with its part only: nobody is
        to wait for them. The hub takes back no more than this engine's word: of a block that any
        rank has reserved an announcement is over already, what other ranks write of it and what
        other engines have announced stays."""
        common = self._common
        if common.sections:
            common.tell(common.hub.withdraw, common.sections, keys)

    def released(self, job: int, ranks: int) -> None:
        """So many ranks no longer touch the job's pages."""
        self._pins.released(job, ranks)
