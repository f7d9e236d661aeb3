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
from kvclient.copying import THREADS
from kvclient.errors import Unavailable, Unsupported
from kvclient.handles import SyncWatch
from kvclient.inline import Inline
from kvclient.options import Options
from kvclient.results import Limits, Role
from kvclient.runner import GRACE_S, Runner
from kvclient.sync import Namespace
from kvclient.tls import Tls
from kvclient.transfer.direct import Pin, Registered
from kvclient.transfer.ring import STAGING_BYTES
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
        staging_s: float = 0.0,
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
            staging_s=staging_s,
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
        staging_s: float = 0.0,
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
            staging_s=staging_s,
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
