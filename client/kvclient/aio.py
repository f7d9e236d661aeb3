"""The asynchronous client.

    async with AsyncClient.connect("127.0.0.1:50051") as client:
        ns = await client.open_namespace(spec)
        await ns.push(hashes, arrays)
        result = await ns.pull(hashes, out)      # byte-exact where result.found, a miss elsewhere

Rules:
 1. A client belongs to the process and the event loop that opened it. Open it after forks: in the
    child of a process that had opened one, `open` raises Unsupported (`kvclient.forks`).
 2. Every call ends within its deadline, with a result or a KVError.
 3. A lost hub costs calls (Unavailable, Gone), never the client: it reconnects by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any

from kvclient import forks
from kvclient.checks import hash_list
from kvclient.copying import THREADS, Copier
from kvclient.errors import InvalidArgument
from kvclient.leases import Leases
from kvclient.namespace import AsyncNamespace
from kvclient.options import Options
from kvclient.orders import Orders, role_from
from kvclient.results import Limits, Role
from kvclient.session import Link, Message, Session
from kvclient.staging import Buffers
from kvclient.timing import Deadline
from kvclient.tls import Tls
from kvclient.transfer.direct import Memories, Pin, Registered
from kvclient.transfer.ring import STAGING_BYTES
from kvclient.watching import Watch
from kvproto.namespace import NamespaceSpec
from kvproto.v1 import kvserver_pb2 as pb

log = logging.getLogger("kvclient")


class Connecting:
    """What `AsyncClient.connect` returns: await it, or enter it with `async with`."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self.client.open().__await__()

    async def __aenter__(self) -> AsyncClient:
        return await self.client.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.client.close()


class AsyncClient:
    """A client of one hub. `connect` builds it; `close` (or `async with`) ends it."""

    def __init__(self, options: Options, *, copy_threads: int = THREADS) -> None:
        self.log = log
        self.session = Session(options, log)
        self.leases = Leases(self.session)
        if not 1 <= copy_threads <= 64:
            raise InvalidArgument.of("copy_threads", copy_threads, "from 1 to 64")
        self.copier = Copier(copy_threads)
        self.buffers = Buffers()

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
    ) -> Connecting:
        """Connect to the hub at `address` ("host:port"): `await` it or use `async with`.

        name          shown in the hub's stats, at most 128 bytes
        tenant        default "": the default tenant
        deadline_s    deadline of each call that names none of its own, default 10
        transport     how bytes move: "shm" (on the hub's host), "tcp", "nixl" (RDMA), or "auto"
                      (default): shm, else nixl where both sides have RDMA, else tcp
        read_only     maps the arena for reading only; default False
        join_token    `token` of a client whose session this one joins as a further rank: leases
                      of one rank's lookup then hold for all. Default: a session of its own
        rank          this rank's number, default 0
        connections   of the tcp transport, default 2
        tls           TLS towards the hub (`kvclient.Tls`); default None: plain
        copy_threads  threads for copies and checksums, default 2
        staging_bytes memory that nixl moves bytes through, default 128 MiB
        staging_s     time to make that memory and NIXL's agent, each time a session is opened:
                      RDMA hardware pins all of it; default 0: `deadline_s`, if that is longer
        nixl_params   parameters of the NIXL backend, default none
        direct        nixl moves what lies in registered memory (`register`) without staging, and
                      a call that fails may leave some of it pinned; default False

        Errors name the address and the reason: Unavailable, DeadlineExceeded, NotFound (no such
        session to join), Unsupported (no transport in common).
        """
        options = Options(
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
        )
        return Connecting(cls(options, copy_threads=copy_threads))

    async def open(self) -> AsyncClient:
        forks.check()
        await self.session.open()
        return self

    async def close(self) -> None:
        """Say goodbye. Copies end first; reservations and leases of this client are over."""
        self.copier.close()
        await self.session.close()
        self.buffers.clear()

    # ---- what it is ----------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self.session.address

    @property
    def token(self) -> bytes:
        """16 bytes: lets further ranks join this session. Changes when the client reconnects."""
        return self.session.link.token

    @property
    def epoch(self) -> int:
        """Of the hub process that this client is connected to. Unavailable without one."""
        return self.session.link.epoch

    @property
    def limits(self) -> Limits:
        return self.session.link.limits

    @property
    def transport(self) -> str:
        """The transport in use, "shm" or "tcp". Unavailable without a connection."""
        return self.session.link.transfer.transport

    @property
    def staging_bytes(self) -> int:
        """Memory that bytes are on their way through now; only nixl has some."""
        link = self.session.current
        return link.transfer.staging_bytes if link is not None else 0

    @property
    def healthy(self) -> bool:
        """Connected, and the last heartbeat was answered."""
        return self.session.healthy

    @property
    def reconnects(self) -> int:
        """How often the client found its hub again after losing its session."""
        return self.session.reconnects

    def rejoin(self, token: bytes) -> None:
        """For a rank: join the session of `token` from now on, in the background. After the hub
        was restarted the first rank has a new token; until a further rank is told of it, it works
        in a session of its own.
        """
        self.session.rejoin(token)

    # ---- memory that the hub may be sent to ------------------------------------------------

    async def register(self, memory: Any, *, deadline_s: float | None = None) -> Registered:
        """Let pushes and pulls move what lies in this memory without staging (nixl, `direct`).

        `memory` is a contiguous NumPy array, or a torch tensor on the CPU or a CUDA device; it is
        kept alive. Do it once for all of it: it costs milliseconds, on RDMA hardware more. It holds
        for later sessions too; with another transport it changes nothing.

        A call that fails may leave parts of it pinned: a hub that stopped may go on and read or
        write them. `pin` of the error, or `pin(...)` here, says until when. InvalidArgument without
        `direct`, Conflict when it overlaps with what was registered before.
        """
        if not self.session.options.direct:
            raise InvalidArgument.of("direct", False, "True, to register memory")
        registered = Registered.of(memory)
        self.memories.add(registered)
        try:
            await self.session.attach(self.deadline(deadline_s))
        except BaseException:
            self.memories.remove(registered)
            raise
        return registered

    async def unregister(self, memory: Registered, *, deadline_s: float | None = None) -> None:
        """Take it back. Conflict while a hub may still touch it."""
        self.memories.remove(memory)
        await self.session.attach(self.deadline(deadline_s))

    @property
    def direct(self) -> bool:
        """Whether registered memory is moved without staging now."""
        return self.session.link.transfer.direct

    @property
    def memories(self) -> Memories:
        return self.session.options.memories

    def pin(self, blocks: Iterable[Any]) -> Pin:
        """What a hub may still read or write of these arrays, tensors, Scattered blocks or
        Registered memories: also of calls that still run, and after a cancellation."""
        return self.memories.pin(blocks)

    # ---- namespaces and administration ---------------------------------------------------

    async def open_namespace(
        self, spec: NamespaceSpec, *, deadline_s: float | None = None
    ) -> AsyncNamespace:
        """Open the namespace of `spec`. LimitExceeded when its blocks can never fit."""
        if not isinstance(spec, NamespaceSpec):
            raise InvalidArgument.of("spec", spec, "a kvproto.namespace.NamespaceSpec")
        namespace = AsyncNamespace(self, spec)
        await namespace.open(self.deadline(deadline_s))
        return namespace

    async def stats(self, *, deadline_s: float | None = None) -> pb.StatsReply:
        """The hub's state: tiers, sessions, namespaces, counters."""
        reply: pb.StatsReply = await self._ask("Stats", pb.StatsRequest(), deadline_s)
        return reply

    async def list_namespaces(self, *, deadline_s: float | None = None) -> list[pb.NamespaceStats]:
        request = pb.ListNamespacesRequest()
        return list((await self._ask("ListNamespaces", request, deadline_s)).namespaces)

    def watch(self) -> Watch:
        """Which blocks of this tenant are where, first all of them, then every change."""
        return Watch(self.session)

    def follow(self, ceiling: Role, obey: Callable[[Role], None]) -> Orders:
        """For engines: take an operator's orders from now on. `obey` is told of each, at once;
        `ceiling` is what the engine was started for, and does now.
        """
        orders = Orders(self.session, ceiling, obey)
        self.session.background(orders.run())
        return orders

    async def set_role(
        self,
        engine: str,
        *,
        produces: bool | None = None,
        consumes: bool | None = None,
        deadline_s: float | None = None,
    ) -> Role:
        """Have an engine stop or start; its role once it has obeyed. `engine` is the name of its
        session, or the beginning of it; None leaves that half as it is.

        Conflict beyond what it was started for, NotFound when no one engine has that name,
        Unavailable when it does not obey in time.
        """
        deadline = self.deadline(deadline_s)
        deadline_ms = max(1, min(60_000, int(deadline.seconds * 900)))
        request = pb.SetRoleRequest(engine=engine, deadline_ms=deadline_ms)
        if produces is not None:
            request.produces = produces
        if consumes is not None:
            request.consumes = consumes
        return role_from((await self._ask("SetRole", request, deadline)).role)

    async def evict(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes] = (),
        *,
        deadline_s: float | None = None,
    ) -> pb.EvictReply:
        """Drop unleased blocks of ONE namespace from all tiers; without keys, all of them.

        `in_use` of the reply counts the blocks that stayed because a reader holds a lease on them,
        or a copy between tiers runs. What this client gave back before is free by then.
        """
        keys = hash_list("hashes", hashes) if hashes else []
        request = pb.EvictRequest(namespace_id=_id(namespace_id), hashes=b"".join(keys))
        deadline = self.deadline(deadline_s)
        await self.leases.settle(deadline)  # what this client gave back must not be in the way
        reply: pb.EvictReply = await self._ask("Evict", request, deadline)
        return reply

    async def drop_namespace(
        self, namespace_id: bytes, *, deadline_s: float | None = None
    ) -> pb.DropNamespaceReply:
        """Remove a namespace and everything in it."""
        request = pb.DropNamespaceRequest(namespace_id=_id(namespace_id))
        reply: pb.DropNamespaceReply = await self._ask("DropNamespace", request, deadline_s)
        return reply

    async def drain(self, *, deadline_s: float | None = None) -> bool:
        """Have the hub refuse new reservations; True once its write-behind is empty."""
        deadline = self.deadline(deadline_s)
        # The hub answers a little before this side stops listening.
        request = pb.DrainRequest(deadline_ms=max(1, int(deadline.seconds * 900)))
        return bool((await self._ask("Drain", request, deadline_s)).drained)

    def deadline(self, deadline_s: float | None, wait_s: float = 0.0) -> Deadline:
        """The deadline of a call: its own or the client's, and what it may wait on top."""
        seconds = self.session.options.deadline_s if deadline_s is None else deadline_s
        if not 0 < seconds <= 86_400:
            raise InvalidArgument.of("deadline_s", seconds, "above 0, at most 86400")
        return Deadline(seconds + wait_s)

    async def _ask(self, name: str, request: Message, deadline: Deadline | float | None) -> Message:
        async def make(_: Link) -> Message:
            return request

        if not isinstance(deadline, Deadline):
            deadline = self.deadline(deadline)
        _, reply = await self.session.call(name, make, deadline)
        return reply


def _id(namespace_id: bytes) -> bytes:
    if not isinstance(namespace_id, bytes) or len(namespace_id) != 32:
        raise InvalidArgument.of("namespace_id", namespace_id, "32 bytes")
    return namespace_id
