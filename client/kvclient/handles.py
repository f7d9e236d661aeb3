"""Reservations and read streams for threads: what `kvclient.client` hands out.

Each call posts to the client's loop and waits; see `kvclient.writing` and `kvclient.reading` for
what it does. Views (`cells`) and `verify` need no loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvclient.checks import Arrays
from kvclient.errors import Unavailable
from kvclient.reading import Granted, ReadStream
from kvclient.results import Bytes, Tier
from kvclient.timing import Deadline
from kvclient.watching import Watch, WatchEvent
from kvclient.writing import Reservation
from kvproto.cells import Checksums
from kvproto.grid import Region

Result = TypeVar("Result")
STEP_S = 1.0  # a watch without end looks this often whether it is closed


class Runs(Protocol):
    """What runs coroutines on the client's loop (`kvclient.client.Client`)."""

    def run(
        self,
        start: Callable[[], Coroutine[Any, Any, Result]],
        deadline_s: float | None,
        wait_s: float,
        what: str,
    ) -> Result: ...


class SyncReservation:
    """`Reservation`, synchronous: `with ns.reserve(...) as reservation`."""

    def __init__(self, client: Runs, reservation: Reservation) -> None:
        self._client = client
        self._aio = reservation
        self.region = reservation.region
        self.ttl_s = reservation.ttl_s
        self.verdicts: Bytes = reservation.verdicts
        self.writable: list[int] = reservation.writable

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()

    def cells(self, index: int) -> Bytes:
        return self._aio.cells(index)

    def fill(
        self,
        indices: Sequence[int],
        arrays: Arrays,
        *,
        region: Region | None = None,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        return self._client.run(
            lambda: self._aio.fill(indices, arrays, region=region, deadline_s=deadline_s),
            *(deadline_s, 0.0, "fill"),
        )

    def commit(
        self,
        indices: Sequence[int] | None = None,
        *,
        region: Region | None = None,
        checksums: Checksums | None = None,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        return self._client.run(
            lambda: self._aio.commit(
                indices, region=region, checksums=checksums, deadline_s=deadline_s
            ),
            *(deadline_s, 0.0, "commit"),
        )

    def abort(self) -> None:
        with suppress(Unavailable):  # the client was closed before: that ended everything
            self._client.run(self._aio.abort, None, 0.0, "abort")

    def fence(self) -> int:
        return self._client.run(self._aio.fence, None, 0.0, "fence")


class SyncGranted:
    """`Granted`, synchronous."""

    def __init__(self, client: Runs, granted: Granted) -> None:
        self._client = client
        self._aio = granted
        self.index: int = granted.index
        self.tokens: int = granted.tokens
        self.tier: Tier = granted.tier
        self.complete: bool = granted.complete

    @property
    def cells(self) -> Bytes:
        return self._aio.cells

    @property
    def corrupt(self) -> bool:
        return self._aio.corrupt

    def verify(self) -> bool:
        return self._aio.verify()

    def copy_to(self, out: Bytes) -> bool:
        return self._client.run(lambda: self._aio.copy_to(out), None, 0.0, "copy_to")

    def release(self) -> None:
        self._client.run(self._aio.release, None, 0.0, "release")


class SyncReadStream:
    """`ReadStream`, synchronous: `with ns.acquire(...) as stream: for granted in stream: ...`."""

    def __init__(self, client: Runs, stream: ReadStream, step: Deadline) -> None:
        self._client = client
        self._aio = stream
        self._step_s = step.seconds

    @property
    def missing(self) -> list[int]:
        return self._aio.missing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(Unavailable):
            self._client.run(self._aio.aclose, None, 0.0, "close")

    def __iter__(self) -> Iterator[SyncGranted]:
        return self

    def __next__(self) -> SyncGranted:
        granted = self._client.run(self._next, self._step_s, 0.0, "acquire")
        if granted is None:
            raise StopIteration
        return SyncGranted(self._client, granted)

    async def _next(self) -> Granted | None:
        """A StopAsyncIteration cannot cross a future."""
        try:
            return await anext(self._aio)
        except StopAsyncIteration:
            return None


class SyncWatch:
    """`Watch`, synchronous: `with client.watch() as watch: for event in watch: ...`."""

    def __init__(self, client: Runs, watch: Watch) -> None:
        self._client = client
        self._aio = watch
        self._pending: asyncio.Task[WatchEvent | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(Unavailable):
            self._client.run(self._close, None, 0.0, "close")

    async def _close(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.gather(self._pending, return_exceptions=True)
        await self._aio.aclose()

    def __iter__(self) -> Iterator[WatchEvent]:
        return self

    def __next__(self) -> WatchEvent:
        """Waits without end; ends with the watch or its client."""
        while (event := self.next(STEP_S)) is None:
            if self._aio.ended:
                raise StopIteration
        return event

    def next(self, timeout_s: float) -> WatchEvent | None:
        """The next event, None when there is none within `timeout_s`, or ever."""
        try:
            return self._client.run(lambda: self._next(timeout_s), timeout_s, 0.0, "watch")
        except Unavailable:
            if self._aio.ended:
                return None
            raise

    async def _next(self, timeout_s: float) -> WatchEvent | None:
        """What has begun to be read is not lost with a timeout: the next call goes on with it."""
        if self._pending is None:
            self._pending = asyncio.get_running_loop().create_task(self._read())
        done, _ = await asyncio.wait({self._pending}, timeout=timeout_s)
        if not done:
            return None
        task, self._pending = self._pending, None
        return await task

    async def _read(self) -> WatchEvent | None:
        try:
            return await anext(self._aio)
        except StopAsyncIteration:
            return None
