"""The synchronous client: every call of `kvclient.aio`, for threads.

    client = Client.connect("127.0.0.1:50051")
    ns = client.open_namespace(spec)
    ns.push(hashes, arrays)
    result = ns.pull(hashes, out)

A thread of its own runs the event loop of an AsyncClient; calls post to it and wait, within their
deadline; small pushes and pulls over shm are done by the calling thread (`kvclient.inline`). Safe
to use from several threads at once.

Rules:
 1. Nothing is opened before the first use: a Client may be built before a fork, and used after.
 2. A Client that was opened belongs to its process. In a forked child its calls raise Unsupported
    before they touch gRPC, and so does opening another one there (`kvclient.forks`).
 3. No call outlives its deadline by more than `runner.GRACE_S`, even if the loop's thread starves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from kvclient.aio import AsyncClient
from kvclient.checks import Arrays
from kvclient.copying import THREADS
from kvclient.errors import Unavailable, Unsupported
from kvclient.handles import SyncReadStream, SyncReservation, SyncWatch
from kvclient.inline import Inline
from kvclient.namespace import AsyncNamespace
from kvclient.options import Options
from kvclient.results import Limits, Lookup, Need, PullResult, PushResult, Role
from kvclient.runner import GRACE_S, Runner
from kvclient.tls import Tls
from kvclient.transfer.direct import Pin, Registered
from kvclient.transfer.ring import STAGING_BYTES
from kvproto.grid import Grid, Region
from kvproto.namespace import NamespaceSpec
from kvproto.v1 import kvserver_pb2 as pb

Result = TypeVar("Result")


class Client:
    """See the module, and `AsyncClient` for what each call does."""

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        tenant: str = "",
        deadline_s: float = 10.0,
        transport: str = "auto",
        read_only: bool = False,
        join_token: bytes = b"",
        rank: int = 0,
        connections: int = 2,
        tls: Tls | None = None,
        copy_threads: int = THREADS,
        staging_bytes: int = STAGING_BYTES,
        nixl_params: dict[str, str] | None = None,
        direct: bool = False,
    ) -> None:
        """A client that connects at its first use. Parameters: `AsyncClient.connect`."""
        self._options = Options(
            address=address,
            name=name,
            tenant=tenant,
            deadline_s=deadline_s,
            transport=transport,
            read_only=read_only,
            join_token=join_token,
            rank=rank,
            connections=connections,
            tls=tls,
            staging_bytes=staging_bytes,
            nixl_params=dict(nixl_params or {}),
            direct=direct,
        ).check()
        self._copy_threads = copy_threads
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._aio: AsyncClient | None = None
        self._inline: Inline | None = None
        self._closed = False

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        name: str = "",
        tenant: str = "",
        deadline_s: float = 10.0,
        transport: str = "auto",
        read_only: bool = False,
        join_token: bytes = b"",
        rank: int = 0,
        connections: int = 2,
        tls: Tls | None = None,
        copy_threads: int = THREADS,
        staging_bytes: int = STAGING_BYTES,
        nixl_params: dict[str, str] | None = None,
        direct: bool = False,
    ) -> Self:
        """A client that is connected. Parameters and errors: `AsyncClient.connect`."""
        client = cls(
            address,
            name=name,
            tenant=tenant,
            deadline_s=deadline_s,
            transport=transport,
            read_only=read_only,
            join_token=join_token,
            rank=rank,
            connections=connections,
            tls=tls,
            copy_threads=copy_threads,
            staging_bytes=staging_bytes,
            nixl_params=nixl_params,
            direct=direct,
        )
        client.open()
        return client

    def open(self) -> Self:
        """Connect now, if that has not happened. After a failure it may be tried again."""
        with self._lock:
            if self._closed:
                raise Unavailable(f"the client of {self.address} is closed")
            if self._runner is not None:
                self._runner.check()
                return self
            runner = Runner(self.address)
            try:
                self._aio = runner.run(self._connect(), self._options.deadline_s, "connect")
                self._inline = Inline(self._aio, runner)
            except BaseException:
                runner.stop()
                raise
            self._runner = runner
        return self

    async def _connect(self) -> AsyncClient:
        client = AsyncClient(self._options, copy_threads=self._copy_threads)
        return await client.open()

    def close(self) -> None:
        """Say goodbye; calls under way in other threads raise Unavailable. Idempotent."""
        with self._lock:
            self._closed = True
            runner, client, inline = self._runner, self._aio, self._inline
            self._runner = self._aio = self._inline = None
        if runner is None or client is None or inline is None:
            return
        with suppress(Unsupported):  # in a forked child there is nothing to say
            runner.check()
            inline.close(GRACE_S)
            try:
                runner.run(client.close(), self._options.deadline_s, "close")
            finally:
                runner.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what it is ----------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._options.address

    @property
    def token(self) -> bytes:
        return self.aio.token

    @property
    def epoch(self) -> int:
        return self.aio.epoch

    @property
    def limits(self) -> Limits:
        return self.aio.limits

    @property
    def transport(self) -> str:
        return self.aio.transport

    @property
    def healthy(self) -> bool:
        return self.aio.healthy

    @property
    def reconnects(self) -> int:
        return self.aio.reconnects

    def rejoin(self, token: bytes) -> None:
        async def work() -> None:
            self.aio.rejoin(token)

        self.run(lambda: work(), None, 0.0, "rejoin")

    def register(self, memory: Any, *, deadline_s: float | None = None) -> Registered:
        client = self.aio
        return self.run(
            lambda: client.register(memory, deadline_s=deadline_s), deadline_s, 0.0, "register"
        )

    def unregister(self, memory: Registered, *, deadline_s: float | None = None) -> None:
        client = self.aio
        self.run(
            lambda: client.unregister(memory, deadline_s=deadline_s), deadline_s, 0.0, "unregister"
        )

    def pin(self, blocks: Iterable[Any]) -> Pin:
        return self._options.memories.pin(blocks)

    # ---- namespaces and administration ---------------------------------------------------

    def open_namespace(self, spec: NamespaceSpec, *, deadline_s: float | None = None) -> Namespace:
        client = self.aio
        opened = self.run(
            lambda: client.open_namespace(spec, deadline_s=deadline_s), deadline_s, 0.0, "open"
        )
        return Namespace(self, opened)

    def stats(self, *, deadline_s: float | None = None) -> pb.StatsReply:
        client = self.aio
        return self.run(lambda: client.stats(deadline_s=deadline_s), deadline_s, 0.0, "stats")

    def list_namespaces(self, *, deadline_s: float | None = None) -> list[pb.NamespaceStats]:
        client = self.aio
        return self.run(
            lambda: client.list_namespaces(deadline_s=deadline_s), deadline_s, 0.0, "list"
        )

    def watch(self) -> SyncWatch:
        return SyncWatch(self, self.aio.watch())

    def set_role(
        self,
        engine: str,
        *,
        produces: bool | None = None,
        consumes: bool | None = None,
        deadline_s: float | None = None,
    ) -> Role:
        client = self.aio
        return self.run(
            lambda: client.set_role(
                engine, produces=produces, consumes=consumes, deadline_s=deadline_s
            ),
            *(deadline_s, 0.0, "set_role"),
        )

    def evict(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes] = (),
        *,
        deadline_s: float | None = None,
    ) -> pb.EvictReply:
        client = self.aio
        return self.run(
            lambda: client.evict(namespace_id, hashes, deadline_s=deadline_s),
            *(deadline_s, 0.0, "evict"),
        )

    def drop_namespace(
        self, namespace_id: bytes, *, deadline_s: float | None = None
    ) -> pb.DropNamespaceReply:
        client = self.aio
        return self.run(
            lambda: client.drop_namespace(namespace_id, deadline_s=deadline_s),
            *(deadline_s, 0.0, "drop_namespace"),
        )

    def drain(self, *, deadline_s: float | None = None) -> bool:
        client = self.aio
        return self.run(lambda: client.drain(deadline_s=deadline_s), deadline_s, 0.0, "drain")

    # ---- for this module -----------------------------------------------------------------

    @property
    def aio(self) -> AsyncClient:
        """The client underneath; connects at first use. Touch it on its own loop only."""
        client = self._aio
        if client is None or self._runner is None:
            self.open()
            client = self._aio
        assert client is not None
        return client

    def run(
        self,
        start: Callable[[], Coroutine[Any, Any, Result]],
        deadline_s: float | None,
        wait_s: float,
        what: str,
    ) -> Result:
        """Run what `start` gives on the client's loop, and wait for it."""
        runner = self._runner
        if runner is None:
            raise Unavailable(f"the client of {self.address} is closed")
        runner.check()
        seconds = self._options.deadline_s if deadline_s is None else deadline_s
        return runner.run(start(), seconds + wait_s, what)

    @property
    def inline(self) -> Inline:
        """What is done on the calling thread."""
        inline = self._inline
        if inline is None:
            raise Unavailable(f"the client of {self.address} is closed")
        return inline


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
