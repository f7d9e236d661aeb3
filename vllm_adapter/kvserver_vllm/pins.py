"""Pins of engine blocks under pushes.

Rules:
  1. Only this module touches and frees blocks of the pool on behalf of pushes. A block is touched
     when its job goes out and freed when every rank has reported the job; nothing else unpins it.
  2. What a request that is over has yet to name is touched when it ends, and let go of once a job
     pins it, or none will.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvserver_vllm.runs import Run


class PinLedger:
    """Jobs on their way, the blocks they pin and the keys they save."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._pool: Any = None
        self._blocks: dict[int, list[Any]] = {}
        self._left: dict[int, int] = {}
        self._keys: dict[int, list[bytes]] = {}
        self.saving: set[bytes] = set()
        """Keys on their way."""
        self._owners: dict[int, dict[str, int]] = {}
        self._orphans: dict[int, int] = {}
        self._held = 0

    def bind(self, pool: Any) -> None:
        self._pool = pool

    @property
    def jobs(self) -> int:
        return len(self._left)

    @property
    def orphans(self) -> int:
        """Engine blocks pinned for requests that are over."""
        return sum(self._orphans.values()) + self._held

    def hold(self, ids: Sequence[int]) -> None:
        """Pin engine blocks of a request that is over; `let_go` of each of them follows."""
        self._held += len(ids)
        if self._pool is not None:
            self._pool.touch(list(map(self._pool.blocks.__getitem__, ids)))

    def let_go(self, ids: Sequence[int]) -> None:
        self._held -= len(ids)
        if self._pool is not None:
            self._pool.free_blocks(map(self._pool.blocks.__getitem__, reversed(ids)))

    def pin(self, job: int, part: Sequence[tuple[Run, Sequence[int]]]) -> None:
        """`part`: what the job saves, each with the engine blocks that it reads."""
        owners: dict[str, int] = {}
        pinned: list[int] = []
        keys: list[bytes] = []
        for run, ids in part:
            owners[run.request] = owners.get(run.request, 0) + len(ids)
            pinned += ids
            keys += run.hashes
        blocks = []
        if self._pool is not None:
            blocks = list(map(self._pool.blocks.__getitem__, pinned))
            self._pool.touch(blocks)
        self._blocks[job] = blocks
        self._left[job] = self._ranks
        self._owners[job] = owners
        self._keys[job] = keys
        self.saving.update(keys)

    def orphan(self, request: str) -> None:
        for job, owners in self._owners.items():
            self._orphans[job] = self._orphans.get(job, 0) + owners.pop(request, 0)

    def released(self, job: int, ranks: int) -> None:
        left = self._left.get(job)
        if left is None:
            return
        if left > ranks:
            self._left[job] = left - ranks
            return
        del self._left[job]
        blocks = self._blocks.pop(job)
        if self._pool is not None:
            self._pool.free_blocks(reversed(blocks))
        self.saving.difference_update(self._keys.pop(job))
        self._owners.pop(job, None)
        self._orphans.pop(job, None)
