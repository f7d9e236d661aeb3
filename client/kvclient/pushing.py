"""Pushes: windows of blocks, each reserved, filled and committed (`kvclient.writing`)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvclient.copying import Writing
from kvclient.results import CommitVerdict, PushVerdict
from kvclient.timing import Deadline
from kvclient.transfer.direct import Block
from kvclient.writing import Reservation
from kvproto.grid import Region

if TYPE_CHECKING:
    from kvclient.namespace import AsyncNamespace

T = TypeVar("T")
PUSH_WINDOW_BYTES = 64 << 20  # reserved at once by a push, twice that while windows overlap


# An enum's member is looked up by Python code, each time.
_NO_SPACE = int(PushVerdict.NO_SPACE)


class Push:
    """One push: windows of blocks are reserved, copied and committed, each step of one window
    while the others do theirs. `verdicts` fills with PushVerdict. The caller of `run` cancels it at
    the deadline.
    """

    def __init__(
        self, namespace: AsyncNamespace, *, hashes: list[bytes], parents: list[bytes],
        tokens: list[int], sources: list[Block], region: Region, durable: bool, wait_s: float,
        deadline: Deadline,
    ) -> None:  # fmt: skip
        self._namespace = namespace
        self._hashes = hashes
        self._parents = parents
        self._tokens = tokens
        self._sources = sources
        self._region = region
        self._durable = durable
        self._wait_s = wait_s
        self._deadline = deadline
        self._open: set[Reservation] = set()
        self.verdicts = np.full(len(hashes), _NO_SPACE, np.uint8)

    async def run(self) -> None:
        windows = list(self._windows(range(len(self._hashes))))
        tasks: list[asyncio.Task[Any]] = []
        try:
            if len(windows) == 1:  # there is nothing to overlap with
                await self._whole(windows[0])
            else:
                await self._pipelined(windows, tasks)
            await self._once_more()
        except BaseException:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)
            for reservation in self._open:
                self._namespace.session.background(reservation.abort())
            raise

    async def _once_more(self) -> None:
        """What found no space while this push itself held some is tried again, one window at a
        time, as long as that helps.
        """
        if not (self.verdicts == _NO_SPACE).any():
            return
        left = np.flatnonzero(self.verdicts == _NO_SPACE).tolist()
        while left and len(left) < len(self.verdicts):
            for window in self._windows(left):
                await self._whole(window)
            before, left = left, np.flatnonzero(self.verdicts == _NO_SPACE).tolist()
            if len(left) == len(before):
                return

    async def _whole(self, window: list[int]) -> None:
        reservation = await self._reserve(window)
        await self._finish(window, reservation, await self._copy(window, reservation))

    async def _pipelined(self, windows: list[list[int]], tasks: list[asyncio.Task[Any]]) -> None:
        """Windows are reserved while others are copied, two of them at a time, and committed while
        later ones are. A copy begins when its window is reserved where it then follows the one
        before (`Transfer.follows`), elsewhere when that has ended.
        """

        def begin(step: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
            tasks.append(asyncio.create_task(step))
            return tasks[-1]

        reserving = begin(self._reserve(windows[0]))
        copying: deque[asyncio.Task[Writing | None]] = deque()
        finishing: deque[asyncio.Task[None]] = deque()
        for number, window in enumerate(windows):
            reservation = await reserving
            if copying and not self._namespace.session.link.transfer.follows:
                await copying.popleft()
            copying.append(begin(self._copy(window, reservation)))
            finishing.append(begin(self._finish_after(copying[-1], window, reservation)))
            if number + 1 < len(windows):
                if len(copying) > 1:
                    await copying.popleft()
                if len(finishing) > 2:
                    await finishing.popleft()
                reserving = begin(self._reserve(windows[number + 1]))
        for task in finishing:
            await task

    async def _finish_after(
        self, copying: asyncio.Task[Writing | None], window: list[int], reservation: Reservation
    ) -> None:
        await self._finish(window, reservation, await copying)

    def _windows(self, indices: Sequence[int]) -> Iterator[list[int]]:
        grid = self._namespace.grid
        limits = self._namespace.session.link.limits
        room = min(PUSH_WINDOW_BYTES, max(limits.window_bytes_max // 2, 1))
        window: list[int] = []
        used = 0
        for index in indices:
            size = grid.region_bytes(self._region, self._tokens[index])
            if window and (used + size > room or len(window) >= limits.keys_per_call_max):
                yield window
                window, used = [], 0
            window.append(index)
            used += size
        if window:
            yield window

    async def _reserve(self, window: list[int]) -> Reservation:
        reservation = await self._namespace.reserve_within(
            self._deadline,
            [self._hashes[i] for i in window],
            [self._parents[i] for i in window],
            [self._tokens[i] for i in window],
            region=self._region,
            wait_s=self._wait_s,
            durable=self._durable,
        )
        self._open.add(reservation)
        for position, index in enumerate(window):
            self.verdicts[index] = reservation.verdicts[position]  # WRITE until it is committed
        return reservation

    async def _copy(self, window: list[int], reservation: Reservation) -> Writing | None:
        if not reservation.writable:
            return None
        sources = [self._sources[window[position]] for position in reservation.writable]
        return await reservation.move(reservation.writable, sources, self._region, None)

    async def _finish(
        self, window: list[int], reservation: Reservation, work: Writing | None
    ) -> None:
        if work is not None:
            answers = await reservation.settle(
                reservation.writable, self._region, work, self._deadline
            )
            for position, answer in zip(reservation.writable, answers.tolist(), strict=True):
                self.verdicts[window[position]] = _PUSHED[answer]
        await reservation.abort()
        self._open.discard(reservation)


_PUSHED = {
    int(CommitVerdict.OK): PushVerdict.WRITTEN,
    int(CommitVerdict.GONE): PushVerdict.GONE,
    int(CommitVerdict.MISMATCH): PushVerdict.MISMATCH,
}
