"""Pins of engine blocks under pushes.

Rules:
  1. Only this module touches and frees blocks of the pool on behalf of pushes. A block is touched
     when its job goes out and freed when every rank has reported the job; nothing else unpins it.
  2. What a request that is over has yet to name is touched when it ends, and let go of once a job
     pins it, or none will; where a job reads just that, it is the job's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserver_vllm.runs import Run


@dataclass(slots=True)
class Pinned:
    """A job on its way."""

    ids: Sequence[int]
    """Of the engine's blocks, in the order in which they were touched."""
    keys: Sequence[bytes]
    owners: dict[str, int]
    """Requests that go on, and how many of the blocks are pinned for each."""
    orphans: int
    """How many are pinned for requests that are over."""
    ranks: int
    """That have not let go of it."""


class PinLedger:
    """Jobs on their way, the blocks they pin and the keys they save."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._pool: Any = None
        self._jobs: dict[int, Pinned] = {}
        self.saving: set[bytes] = set()
        """Keys on their way. Who decides to save one adds it; the job made of it in the same call
        takes it away when it is over."""
        self.orphans = 0
        """Engine blocks pinned for requests that are over."""

    def bind(self, pool: Any) -> None:
        self._pool = pool

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    def _blocks(self, ids: Sequence[int]) -> list[Any]:
        return list(map(self._pool.blocks.__getitem__, ids))

    def hold(self, ids: Sequence[int]) -> None:
        """Pin engine blocks of a request that is over; `let_go` of each of them follows, or a job
        takes them over."""
        self.orphans += len(ids)
        if self._pool is not None:
            self._pool.touch(self._blocks(ids))

    def let_go(self, ids: Sequence[int]) -> None:
        self.orphans -= len(ids)
        if self._pool is not None:
            self._pool.free_blocks(reversed(self._blocks(ids)))

    def pin(
        self, job: int, runs: Sequence[Run], reads: Sequence[Sequence[int]], *, over: bool = False
    ) -> None:
        """The job saves `runs`, each of which `reads` these engine blocks. `over`: their request
        is."""
        owners: dict[str, int] = {}
        pinned: list[int] = []
        keys: list[bytes] = []
        for run, ids in zip(runs, reads, strict=True):
            owners[run.request] = owners.get(run.request, 0) + len(ids)
            pinned += ids
            keys += run.hashes
        pool = self._pool
        if pool is not None:
            pool.touch(list(map(pool.blocks.__getitem__, pinned)))
        orphans = len(pinned) if over else 0
        self.orphans += orphans
        self._jobs[job] = Pinned(pinned, keys, {} if over else owners, orphans, self._ranks)

    def take_over(self, job: int, run: Run, ids: Sequence[int]) -> None:
        """The job saves `run`, of a request that is over, and reads just what is held for it: that
        is the job's from here on, neither touched again nor let go of."""
        self._jobs[job] = Pinned(ids, run.hashes, {}, len(ids), self._ranks)

    def orphan(self, request: str) -> None:
        for pinned in self._jobs.values():
            count = pinned.owners.pop(request, 0)
            pinned.orphans += count
            self.orphans += count

    def released(self, job: int, ranks: int) -> None:
        pinned = self._jobs.get(job)
        if pinned is None:
            return
        pinned.ranks -= ranks
        if pinned.ranks > 0:
            return
        del self._jobs[job]
        self.orphans -= pinned.orphans
        if self._pool is not None:
            self._pool.free_blocks(reversed(self._blocks(pinned.ids)))
        self.saving.difference_update(pinned.keys)
