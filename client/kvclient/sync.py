"""A namespace for threads: every call of `kvclient.namespace`, made and waited for.

Rule: whole blocks, one a call, and what else is small, go by the calling thread where that can
(`kvclient.inline`); everything can go by the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kvclient.checks import Arrays
from kvclient.handles import SyncReadStream, SyncReservation, SyncWatch
from kvclient.namespace import AsyncNamespace
from kvclient.results import Lookup, Need, PullResult, PushResult
from kvproto.grid import Grid, Region

if TYPE_CHECKING:
    from kvclient.client import Client

Result = TypeVar("Result")


class Namespace:
    """`AsyncNamespace`, synchronous. Comes from `Client.open_namespace`."""

    def __init__(self, client: Client, namespace: AsyncNamespace) -> None:
        self._client = client
        self._aio = namespace
        self._inline = client.inline
        self._here = self._inline.namespace(namespace.spec)
        self.spec = namespace.spec
        self.id: bytes = namespace.id
        self.grid: Grid = namespace.grid

    @property
    def near_misses(self) -> tuple[str, ...]:
        return self._aio.near_misses

    @property
    def slot_bytes(self) -> int:
        return self._aio.slot_bytes

    def lookup(
        self,
        hashes: Sequence[bytes],
        *,
        pin_s: float = 0.0,
        need: Sequence[Need] = (),
        deadline_s: float | None = None,
    ) -> Lookup:
        return self._client.run(
            lambda: self._aio.lookup(hashes, pin_s=pin_s, need=need, deadline_s=deadline_s),
            *(deadline_s, 0.0, "lookup"),
        )

    def announce(
        self, hashes: Sequence[bytes], ttl_s: float, *, deadline_s: float | None = None
    ) -> int:
        return self._client.run(
            lambda: self._aio.announce(hashes, ttl_s, deadline_s=deadline_s),
            *(deadline_s, 0.0, "announce"),
        )

    def withdraw(self, hashes: Sequence[bytes], *, deadline_s: float | None = None) -> int:
        return self._client.run(
            lambda: self._aio.withdraw(hashes, deadline_s=deadline_s), deadline_s, 0.0, "withdraw"
        )

    def reserve(
        self,
        hashes: Sequence[bytes],
        parents: Sequence[bytes] | None = None,
        *,
        tokens: Sequence[int] | None = None,
        region: Region | None = None,
        ttl_s: float | None = None,
        wait_s: float = 0.0,
        durable: bool = False,
        deadline_s: float | None = None,
    ) -> SyncReservation:
        reservation = self._client.run(
            lambda: self._aio.reserve(
                hashes,
                parents,
                tokens=tokens,
                region=region,
                ttl_s=ttl_s,
                wait_s=wait_s,
                durable=durable,
                deadline_s=deadline_s,
            ),
            *(deadline_s, wait_s, "reserve"),
        )
        return SyncReservation(self._client, reservation)

    def push(
        self,
        hashes: Sequence[bytes],
        arrays: Arrays,
        *,
        parents: Sequence[bytes] | None = None,
        tokens: Sequence[int] | None = None,
        region: Region | None = None,
        durable: bool = False,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> PushResult:
        plain = tokens is None and region is None and not (durable or wait_s)
        if plain and isinstance(hashes, list | tuple) and len(hashes) == 1:
            done = self._inline.push_ahead(self._here, hashes, arrays, parents, deadline_s)
            if done is not None:
                return done

        def start(namespace: AsyncNamespace) -> Coroutine[Any, Any, PushResult]:
            return namespace.push(
                hashes,
                arrays,
                parents=parents,
                tokens=tokens,
                region=region,
                durable=durable,
                wait_s=wait_s,
                deadline_s=deadline_s,
            )

        return self._perform(start, hashes, deadline_s, wait_s, "push")

    def acquire(
        self,
        hashes: Sequence[bytes],
        *,
        region: Region | None = None,
        wait_s: float = 0.0,
        window_bytes: int = 0,
        lease_s: float = 0.0,
        inherit_lease: int = 0,
        deadline_s: float | None = None,
    ) -> SyncReadStream:
        stream = self._aio.acquire(
            hashes,
            region=region,
            wait_s=wait_s,
            window_bytes=window_bytes,
            lease_s=lease_s,
            inherit_lease=inherit_lease,
            deadline_s=deadline_s,
        )
        return SyncReadStream(self._client, stream, self._aio.deadline(deadline_s, wait_s))

    def pull(
        self,
        hashes: Sequence[bytes],
        out: Arrays,
        *,
        region: Region | None = None,
        wait_s: float = 0.0,
        window_bytes: int = 0,
        inherit_lease: int = 0,
        deadline_s: float | None = None,
    ) -> PullResult:
        plain = region is None and not (wait_s or window_bytes or inherit_lease)
        if plain and isinstance(hashes, list | tuple) and len(hashes) == 1:
            done = self._inline.pull_one(self._here, hashes, out, deadline_s)
            if done is not None:
                return done

        def start(namespace: AsyncNamespace) -> Coroutine[Any, Any, PullResult]:
            return namespace.pull(
                hashes,
                out,
                region=region,
                wait_s=wait_s,
                window_bytes=window_bytes,
                inherit_lease=inherit_lease,
                deadline_s=deadline_s,
            )

        return self._perform(start, hashes, deadline_s, wait_s, "pull")

    def _perform(
        self,
        start: Callable[[AsyncNamespace], Coroutine[Any, Any, Result]],
        hashes: Sequence[bytes],
        deadline_s: float | None,
        wait_s: float,
        what: str,
    ) -> Result:
        """On this thread, where that is quick (`kvclient.inline`); else on the loop's."""
        if not wait_s and isinstance(hashes, list | tuple):
            done = self._inline.run(self._here, len(hashes), start)
            if done is not None:
                return done[0]
        return self._client.run(lambda: start(self._aio), deadline_s, wait_s, what)

    def release(self, *leases: int) -> None:
        self._client.run(lambda: self._aio.release(*leases), None, 0.0, "release")

    def watch(self) -> SyncWatch:
        return SyncWatch(self._client, self._aio.watch())

    def report_corrupt(self, hashes: Sequence[bytes], *, deadline_s: float | None = None) -> int:
        return self._client.run(
            lambda: self._aio.report_corrupt(hashes, deadline_s=deadline_s),
            *(deadline_s, 0.0, "report_corrupt"),
        )
