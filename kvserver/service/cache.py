"""The data path's handlers: check the message, ask the core, pack the answer.

Rule 1: a handler validates every field before it asks for anything, so a refused call changes
nothing.
Rule 2: handlers hold no state. Sessions are in `runtime.sessions`, all else is the core's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import starmap
from typing import Any

import kvserver
from kvproto import frames
from kvproto.errors import FieldError
from kvproto.grid import Grid, Region
from kvproto.namespace import NAMESPACE_ID_BYTES, TEXT_BYTES_MAX
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.core import events, instructions
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime import failpoints
from kvserver.runtime.driver import AcquireStep
from kvserver.runtime.node import Node
from kvserver.runtime.roles import Follower
from kvserver.runtime.sessions import TOKEN_BYTES, Session
from kvserver.service import convert
from kvserver.service.calls import streaming, unary
from kvserver.service.remote import RemoteCalls

PROTOCOL_VERSION = 1
Offers = Callable[[Session], list[pb.TransportOffer]]


class CacheService(RemoteCalls, kvserver_pb2_grpc.CacheServicer):
    """`offers(session)` names the transports that a session may use."""

    def __init__(self, node: Node, *, limits: pb.Limits, offers: Offers, **base: Any) -> None:
        super().__init__(**base)
        self._node = node
        self._driver = node.driver
        self._limits = limits
        self._offers = offers

    # ---- sessions --------------------------------------------------------------------------

    @unary
    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        if request.protocol_version != PROTOCOL_VERSION:
            raise CoreError(
                ErrorKind.CONFLICT,
                f"the client speaks protocol {request.protocol_version}, this server"
                f" (kvserver {kvserver.__version__}) speaks {PROTOCOL_VERSION}",
                field="protocol_version",
                limit=PROTOCOL_VERSION,
            )
        name = convert.text_from("client_name", request.client_name)
        version = convert.text_from("client_version", request.client_version)
        tenant = convert.text_from("tenant", request.tenant, bytes_max=TEXT_BYTES_MAX)
        if request.join_token:
            session = await self._join(request, tenant)
        else:
            session = await self._node.open_session(tenant=tenant, name=name, version=version)
        client = await self._node.join_session(session)
        return pb.HelloReply(
            session=session.id,
            client=client,
            token=session.token,
            epoch=self._node.epoch,
            arena_id=self._node.arena_id,
            server_version=kvserver.__version__,
            protocol_version=PROTOCOL_VERSION,
            limits=self._limits,
            transports=self._offers(session),
        )

    async def _join(self, request: pb.HelloRequest, tenant: str) -> Session:
        token = convert.id_from("join_token", request.join_token, length=TOKEN_BYTES)
        session = self._node.sessions.by_token(token)
        if tenant != session.tenant:
            raise FieldError("tenant", tenant, "the tenant of the session that is joined")
        return session

    @unary
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        session = self._session(request.session)
        if request.client:
            session.check_client(request.client)
        ticket = self._driver.ticket()
        await self._driver.ask(events.Heartbeat(ticket, session.id), type(None))
        return pb.HeartbeatReply(epoch=self._node.epoch, draining=self._node.draining)

    @unary
    async def Goodbye(self, request: pb.GoodbyeRequest, context: Any) -> pb.GoodbyeReply:
        session = self._session(request.session)
        client = session.check_client(request.client)
        drained = request.drained and self._own_hands(session, client)
        await self._node.leave_session(session, client, drained=drained)
        return pb.GoodbyeReply()

    def _own_hands(self, session: Session, client: int) -> bool:
        """Whether a client's word counts that its copies have drained. Those of a remote transport
        are the server's: they have when its data worker has let go, which the driver's poll sees,
        or when no transfer of nixl runs, which is known here.
        """
        moves = self._node.moves
        return client not in session.remote or bool(moves and moves.idle(client))

    def _session(self, session: int) -> Session:
        return self._node.sessions.get(session)

    # ---- namespaces ------------------------------------------------------------------------

    @unary
    async def OpenNamespace(
        self, request: pb.OpenNamespaceRequest, context: Any
    ) -> pb.OpenNamespaceReply:
        session = self._session(request.session)
        spec = convert.spec_from(request.spec)
        handle, near_misses = await self._node.open_namespace(session, spec)
        slot_bytes = self._node.slot_bytes(spec)
        return pb.OpenNamespaceReply(
            handle=handle,
            namespace_id=spec.id,
            geometry=convert.geometry_to(spec.grid, slot_bytes),
            near_misses=near_misses,
        )

    # ---- lookup and announce ---------------------------------------------------------------

    @unary
    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupReply:
        session = self._session(request.session)
        spec = session.spec(request.namespace)
        event = events.Lookup(
            self._driver.ticket(),
            session.id,
            request.namespace,
            self._hashes("hashes", request.hashes),
            need=convert.needs_from(request.need, spec.grid),
            pin=self._seconds("lease_ms_max", request.pin_ms),
        )
        result = await self._driver.ask(event, instructions.LookupResult)
        return pb.LookupReply(
            usable_blocks=result.usable_blocks,
            live_blocks=result.live_blocks,
            states=result.states,
            tiers=result.tiers,
            lease=result.lease,
            lease_ms=convert.milliseconds(result.lease_seconds),
            committed_cells=result.committed_cells,
        )

    @unary
    async def Announce(self, request: pb.AnnounceRequest, context: Any) -> pb.AnnounceReply:
        session = self._session(request.session)
        session.spec(request.namespace)
        event = events.Announce(
            self._driver.ticket(),
            session.id,
            request.namespace,
            self._hashes("hashes", request.hashes),
            ttl=self._seconds("announce_ttl_ms_max", request.ttl_ms, zero_is_max=True),
            withdraw=request.withdraw,
        )
        return pb.AnnounceReply(announced=await self._driver.ask(event, int))

    # ---- writing -----------------------------------------------------------------------------

    @unary
    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveReply:
        session = self._session(request.session)
        spec = session.spec(request.namespace)
        hashes = self._hashes("hashes", request.hashes)
        parents = self._hashes("parents", request.parents)
        if len(parents) != len(hashes):
            raise FieldError("parents", len(parents), f"as many as hashes ({len(hashes)})")
        tokens: list[int] = []
        if request.tokens:
            tokens = convert.numbers_from(
                "tokens", request.tokens, "<u4", count=len(hashes)
            ).tolist()
            if not 1 <= min(tokens) <= max(tokens) <= spec.block_tokens:
                wrong = next(t for t in tokens if not 1 <= t <= spec.block_tokens)
                raise FieldError("tokens", wrong, f"from 1 to {spec.block_tokens} (block_tokens)")
        event = events.Reserve(
            self._driver.ticket(),
            session.id,
            session.check_client(request.client),
            request.namespace,
            hashes,
            parents,
            tokens,
            convert.region_within(request.region, spec.grid),
            ttl=self._seconds("reservation_ms_max", request.ttl_ms, zero_is_max=True),
            wait=self._seconds("wait_ms_max", request.wait_ms),
            durable=request.durable,
        )
        result = await self._driver.ask(event, instructions.ReserveResult)
        offsets, generations = convert.places_to(result.places)
        permits = b""
        if event.client in session.remote and result.reservation:
            sizes = tokens or [spec.block_tokens] * len(hashes)
            granted = zip(result.places, sizes, strict=True)
            permits = self._permits(
                frames.Op.WRITE, event.client, result.reservation, spec.grid, event.region, granted
            )
        return pb.ReserveReply(
            permits=permits,
            reservation=result.reservation,
            ttl_ms=convert.milliseconds(result.ttl),
            verdicts=bytes(result.verdicts),
            offsets=offsets,
            generations=generations,
        )

    @unary
    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitReply:
        session = self._session(request.session)
        session.check_client(request.client)
        indices = convert.numbers_from(
            "indices", request.indices, "<u4", count_max=self._limits.keys_per_call_max
        ).tolist()
        if len(set(indices)) != len(indices):
            raise FieldError("indices", indices, "positions that differ from each other")
        region = convert.region_from(request.region)
        checksums = convert.numbers_from(
            "checksums", request.checksums, "<u8", count=len(indices) * region.cells
        ).reshape(len(indices), region.cells)
        names: list[list[bytes]] = []
        if request.hashes or request.parents:
            for field in ("hashes", "parents"):
                names.append(self._hashes(field, getattr(request, field)))
                if len(names[-1]) != len(indices):
                    limit = f"as many as indices ({len(indices)})"
                    raise FieldError(field, len(names[-1]), limit)
        moves = self._node.moves

        def check(some: list[int]) -> None:
            if moves is not None:
                moves.check_commit(request.client, request.reservation, some, region)

        event = events.Commit(
            self._driver.ticket(), session.id, request.reservation, indices, region, *names
        )
        result = await self._driver.commit(event, checksums, check=check)
        failpoints.hit("commit.after_valid")
        return pb.CommitReply(verdicts=bytes(result.verdicts), completed=result.completed)

    @unary
    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:
        session = self._session(request.session)
        client = session.check_client(request.client)
        drained = request.drained and self._own_hands(session, client)
        ticket = self._driver.ticket()
        event = events.Abort(ticket, session.id, request.reservation, drained=drained)
        await self._driver.ask(event, type(None))
        return pb.AbortReply()

    @unary
    async def Fence(self, request: pb.FenceRequest, context: Any) -> pb.FenceReply:
        session = self._session(request.session)
        if not self._own_hands(session, session.check_client(request.client)):
            return pb.FenceReply()
        event = events.Fence(self._driver.ticket(), session.id, request.reservation)
        return pb.FenceReply(slots_freed=await self._driver.ask(event, int))

    # ---- reading -----------------------------------------------------------------------------

    @streaming
    async def Acquire(
        self, request: pb.AcquireRequest, context: Any
    ) -> AsyncIterator[pb.AcquireReply]:
        session = self._session(request.session)
        client = session.check_client(request.client)
        spec = session.spec(request.namespace)
        window_max = self._limits.window_bytes_max
        if request.window_bytes > window_max:
            raise convert.limit_error("window_bytes_max", request.window_bytes, window_max)
        event = events.Acquire(
            self._driver.ticket(),
            session.id,
            request.namespace,
            self._hashes("hashes", request.hashes),
            convert.region_within(request.region, spec.grid),
            wait=self._seconds("wait_ms_max", request.wait_ms),
            window=request.window_bytes or window_max,
            lease=self._seconds("lease_ms_max", request.lease_ms, zero_is_max=True),
            inherit=request.inherit_lease,
        )
        released = self._released(session, "release", request.release)
        if released.leases:
            self._driver.tell(released)
        async with contextlib.aclosing(self._driver.acquire(event)) as stream:
            async for step in stream:
                reply = self._acquired(step, spec.grid, event.region)
                if step.granted is not None and client in session.remote:
                    leased = [(block.place, block.tokens) for block in step.granted.blocks]
                    reply.grant.permits = self._permits(
                        frames.Op.READ, client, step.granted.lease, spec.grid, event.region, leased
                    )
                yield reply

    def _acquired(self, step: AcquireStep, grid: Grid, region: Region) -> pb.AcquireReply:
        missing: list[int] = []
        if step.granted is not None:
            missing += step.granted.missing
        if step.result is not None:
            missing += step.result.missing
        return pb.AcquireReply(
            grant=self._grant(step.granted, grid, region) if step.granted else None,
            missing=convert.pack(missing, "<u4"),
            done=step.result is not None,
        )

    def _grant(self, item: instructions.Granted, grid: Grid, region: Region) -> pb.Grant | None:
        blocks = item.blocks
        if not blocks:
            return None
        sizes = {tokens: grid.region_bytes(region, tokens) for tokens in {b.tokens for b in blocks}}
        self._node.bytes_granted += sum(sizes[b.tokens] for b in blocks)
        offsets, generations = convert.places_to([b.place for b in blocks])
        entries = self._driver.entries
        roots = (entries.root(b.place) if b.complete else 0 for b in blocks)
        return pb.Grant(
            lease=item.lease,
            indices=convert.pack((b.index for b in blocks), "<u4"),
            offsets=offsets,
            generations=generations,
            tokens=convert.pack((b.tokens for b in blocks), "<u4"),
            roots=convert.pack(roots, "<u8"),
            tiers=bytes(b.came_from for b in blocks),
            lease_ms=convert.milliseconds(item.lease_seconds),
        )

    def _permits(
        self,
        op: frames.Op,
        client: int,
        hold: int,
        grid: Grid,
        region: Region,
        granted: Iterable[tuple[events.Place | None, int]],
    ) -> bytes:
        """A permit for each place and the tokens of its block, packed."""
        cell_bytes = functools.cache(grid.cell_bytes)

        def sealed(place: events.Place | None, tokens: int) -> frames.Place | None:
            if place is None:
                return None
            where = (hold, place.offset, place.generation, cell_bytes(tokens))
            return frames.Place(*where, grid.layers, grid.heads, region)

        return self._node.permits.mint_all(op, client, starmap(sealed, granted))

    @unary
    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseReply:
        session = self._session(request.session)
        event = self._released(session, "leases", request.leases)
        return pb.ReleaseReply(released=await self._driver.ask(event, int))

    def _released(self, session: Session, field: str, packed: bytes) -> events.Release:
        limit = self._limits.keys_per_call_max
        leases = convert.numbers_from(field, packed, "<u8", count_max=limit).tolist()
        return events.Release(self._driver.ticket(), session.id, leases)

    @unary
    async def ReportCorrupt(
        self, request: pb.ReportCorruptRequest, context: Any
    ) -> pb.ReportCorruptReply:
        session = self._session(request.session)
        session.spec(request.namespace)
        event = events.ReportCorrupt(
            self._driver.ticket(),
            session.id,
            request.namespace,
            self._hashes("hashes", request.hashes),
        )
        return pb.ReportCorruptReply(dropped=await self._driver.ask(event, int))

    # ---- watching ----------------------------------------------------------------------------

    @streaming
    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchReply]:
        session = self._session(request.session)
        namespace_id = request.namespace_id
        if namespace_id:
            convert.id_from("namespace_id", namespace_id, length=NAMESPACE_ID_BYTES)
        watches = self._node.watches
        introduced: set[bytes] = set()  # namespaces whose spec was told
        steps = watches.steps(session.id, session.tenant, namespace_id)
        sequence = 0
        async with contextlib.aclosing(steps):
            async for step in steps:
                sequence += 1
                reply = convert.watch_to(step, introduced)
                reply.sequence, reply.epoch = sequence, self._node.epoch
                reply.tiers_up = self._driver.hub.tiers_up
                reply.idle_ms = convert.milliseconds(watches.idle_s)
                yield reply

    # ---- roles -------------------------------------------------------------------------------

    @streaming
    async def Orders(
        self, request: pb.OrdersRequest, context: Any
    ) -> AsyncIterator[pb.OrdersReply]:
        session = self._session(request.session)
        follower = Follower(
            now=convert.role_from(request.role), ceiling=convert.role_from(request.ceiling)
        )
        if session.follower is not None:
            session.follower.end()  # the engine has lost that stream
        session.follower = follower
        async with contextlib.aclosing(follower.orders()) as orders:
            async for number, role in orders:
                yield pb.OrdersReply(order=number, role=convert.role_to(role))

    @unary
    async def Obey(self, request: pb.ObeyRequest, context: Any) -> pb.ObeyReply:
        follower = self._session(request.session).follower
        if follower is None:
            raise CoreError(ErrorKind.NOT_FOUND, "the session takes no orders", field="session")
        follower.obeyed(request.order, convert.role_from(request.role))
        return pb.ObeyReply()

    # ---- fields ------------------------------------------------------------------------------

    def _hashes(self, field: str, raw: bytes) -> list[bytes]:
        return convert.some_hashes_from(field, raw, count_max=self._limits.keys_per_call_max)

    def _seconds(self, limit: str, value_ms: int, *, zero_is_max: bool = False) -> float:
        maximum: int = getattr(self._limits, limit)
        zero = maximum if zero_is_max else 0
        return convert.seconds_from(limit, value_ms, maximum_ms=maximum, zero=zero)
