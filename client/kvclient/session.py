"""A client's connection to the hub: one gRPC channel, one live session, and their renewal.

A Link is one session with one server process: its ids, its limits, its transfer. Everything that a
call was granted belongs to the Link it was granted under.

Rules:
 1. A Link that is lost stays lost. Reservations, leases and streams under it are Gone; its transfer
    is closed at once: no new view of an arena exists, and it is unmapped with its last view.
 2. One task renews: it beats the heart, notices a new epoch or an ended session, and says Hello
    again with pauses of 50 ms to 1 s. Calls never dial.
 3. A call that fails because its session ended is repeated once under the next Link, if nothing
    that it names belongs to the old one.
 4. While there is no Link, calls fail at once with Unavailable and the reason.
 5. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import grpc.aio

from kvclient.errors import (
    TIMEOUTS,
    Gone,
    InvalidArgument,
    KVError,
    NotFound,
    Unavailable,
    Unsupported,
    from_rpc,
    late,
)
from kvclient.local import LocalCalls, open_calls
from kvclient.options import Options
from kvclient.results import Limits
from kvclient.streams import GrpcStream, Stream
from kvclient.timing import BACKOFF_FIRST_S, BACKOFF_LAST_S, Backoff, Deadline
from kvclient.transfer import choose
from kvclient.transfer.base import Transfer
from kvclient.transfer.ring import orphans
from kvclient.transfer.settling import settle_orphans
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc as rpc

PROTOCOL_VERSION = 1
MESSAGE_BYTES_MAX = 64 << 20
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", int(BACKOFF_FIRST_S * 1000)),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", int(BACKOFF_LAST_S * 1000)),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A pool of its own: the backoff of another client's channel must not hold this one back.
    ("grpc.use_local_subchannel_pool", 1),
]

Message = Any  # a protobuf message; its classes are generated and untyped here
Make = Callable[["Link"], Awaitable[Message]]


@dataclass(slots=True, eq=False)
class Link:
    """One session with one server process. `lost` says why it ended; None while it lives."""

    address: str
    session: int
    client: int
    token: bytes
    epoch: int
    limits: Limits
    transfer: Transfer
    local: LocalCalls | None = None  # the short way, where the hub is on this host
    handles: dict[bytes, int] = field(default_factory=dict)  # namespace id -> handle
    lost: str | None = None

    def gone(self) -> Gone:
        reason = self.lost or "the hub was restarted"
        return Gone(f"the session with {self.address} ended: {reason}")


class Session:
    """See the module. Lives on one event loop; `open` before use, `close` after."""

    def __init__(self, options: Options, log: logging.Logger) -> None:
        self.options = options.check()
        self._log = log
        self._join_token = options.join_token
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._link: Link | None = None
        self._failure: KVError | None = None
        self._attempt: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._beating = True
        self._closed = False
        self.reconnects = 0

    @property
    def address(self) -> str:
        return self.options.address

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def healthy(self) -> bool:
        """A live Link whose last heartbeat was answered."""
        return self._link is not None and self._link.lost is None and self._beating

    @property
    def current(self) -> Link | None:
        """The live Link, None when there is none."""
        return self._link if self._link is not None and self._link.lost is None else None

    @property
    def link(self) -> Link:
        """The live Link. Unavailable with the reason when there is none."""
        if self._link is None or self._link.lost is not None:
            reason = "closed" if self._closed else self._failure or "not connected"
            raise Unavailable(f"no session with {self.address}: {reason}")
        return self._link

    # ---- life ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Dial, say Hello, open a transport. Every error names the address and the reason."""
        tls = self.options.tls
        if tls is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        else:
            credentials = tls.credentials()
            self._channel = grpc.aio.secure_channel(
                self.address, credentials, options=[*_CHANNEL_OPTIONS, *tls.channel_options()]
            )
        for stub in (rpc.CacheStub, rpc.AdminStub):
            self._stubs.update(vars(stub(self._channel)))
        try:
            self._link = await self._hello(Deadline(self.options.deadline_s))
        except BaseException:
            self._closed = True
            await self._channel.close()
            raise
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="kvclient-keep")
        self._keeper.add_done_callback(self._keeper_ended)

    async def close(self) -> None:
        """Say goodbye and hang up. The caller's copies have ended before."""
        if self._closed:
            return
        self._closed = True
        tasks = [*self._background, *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        link = self._link
        if link is not None and link.lost is None:
            self._lose(link, "closed")
            goodbye = pb.GoodbyeRequest(
                session=link.session, client=link.client, drained=link.transfer.drained
            )
            with suppress(KVError):
                await self.rpc("Goodbye", goodbye, Deadline(min(1.0, self.options.deadline_s)))
        if link is not None and link.local is not None:
            link.local.close()
        if self._channel is not None:
            await self._channel.close()

    async def attach(self, deadline: Deadline) -> None:
        """Tell the hub what memory is registered, where it moves that. A later session does so by
        itself."""
        link = self._link
        if link is not None and link.lost is None and link.transfer.direct:
            await link.transfer.attach(deadline)

    def rejoin(self, token: bytes) -> None:
        """Belong to the session of `token` from now on; the link to the present one is dropped."""
        if len(token) != 16:
            raise InvalidArgument.of("join_token", len(token), "16 bytes")
        self._join_token = token
        if self._link is not None and self._link.token != token:
            self._lose(self._link, "joining another session")

    # ---- calls ---------------------------------------------------------------------------

    async def call(
        self, name: str, make: Make, deadline: Deadline, *, link: Link | None = None
    ) -> tuple[Link, Message]:
        """Call `name` with the message that `make` builds; the Link it ran under, and its reply.

        With `link`, the call stands on something granted under it: Gone once it is lost.
        """
        for attempt in (0, 1):
            at = link or await self.ready(deadline)
            if at.lost is not None:
                raise at.gone()
            try:
                return at, await self.rpc(name, await make(at), deadline, link=at)
            except NotFound as error:
                if not self._ended(at, error):
                    raise
                if link is not None or attempt:
                    raise at.gone() from error
            except Unavailable as error:
                if at.lost is not None and link is not None:
                    raise at.gone() from error
                self._wake.set()
                raise
        raise AssertionError("unreachable")

    def _ended(self, at: Link, error: NotFound) -> bool:
        """Whether the hub does not know the session; then the Link is lost. Notes stale handles."""
        if error.field in ("session", "client"):
            self._lose(at, str(error))
            return True
        if isinstance(error, Gone):
            return at.lost is not None
        return False

    async def ready(self, deadline: Deadline) -> Link:
        """The live Link; waits for an attempt under way, never for a hub that is not there."""
        if self._link is not None and self._link.lost is None:
            return self._link
        if not self._closed and self._failure is None and self._attempt is not None:
            with suppress(*TIMEOUTS):
                async with asyncio.timeout(deadline.left()):
                    await asyncio.shield(self._attempt)
        return self.link

    async def rpc(
        self, name: str, request: Message, deadline: Deadline, *, link: Link | None = None
    ) -> Message:
        """One unary call. KVErrors only; DeadlineExceeded at the deadline. The short way, if `link`
        has one that takes it.
        """
        left = deadline.left()
        if left <= 0:
            raise late(name, self.address, deadline.seconds)
        if link is not None and link.local is not None and link.local.takes(name, request):
            return await link.local.call(name, request, deadline)
        try:
            return await self._stubs[name](request, timeout=left)
        except grpc.RpcError as error:
            raise from_rpc(error, what=name, address=self.address) from None
        except grpc.aio.UsageError as error:
            raise Unavailable(f"{name} at {self.address}: the client is closed") from error
        except asyncio.CancelledError:
            self.cancelled(name)
            raise

    def stream(self, link: Link, name: str, request: Message) -> Stream:
        """A server-streaming call."""
        if link.local is not None and link.local.takes(name, request):
            return link.local.stream(name, request)
        try:
            return GrpcStream(self, name, self._stubs[name](request))
        except grpc.aio.UsageError as error:
            raise Unavailable(f"{name} at {self.address}: the client is closed") from error

    def cancelled(self, name: str) -> None:
        """A channel that closes cancels its calls: for them that is Unavailable."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise Unavailable(f"{name} at {self.address}: the client was closed") from None

    def stream_failed(self, link: Link, error: KVError) -> KVError:
        """What a broken stream means; looks at once whether the hub is still there."""
        if isinstance(error, NotFound) and self._ended(link, error):
            return link.gone()
        if isinstance(error, Unavailable):
            self._wake.set()
        return error

    def look(self) -> None:
        """See soon whether the hub is still there."""
        self._wake.set()

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that no caller waits for; it is cancelled by `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- renewal -------------------------------------------------------------------------

    def _lose(self, link: Link, reason: str) -> None:
        """From now on nothing is granted or written under `link`."""
        if link.lost is not None:
            return
        link.lost = reason
        link.transfer.close()
        if link.local is not None:
            link.local.retire()
        if self._closed or link is not self._link:
            return
        self._log.warning("session with %s ended: %s", self.address, reason)
        self._failure = None
        self._attempt = asyncio.get_running_loop().create_future()
        self._wake.set()

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """Only `close` ends it. Anything else is a bug of ours, and is not to go unseen."""
        if not keeper.cancelled() and keeper.exception() is not None:
            self._log.error("the session's keeper failed", exc_info=keeper.exception())

    async def _keep(self) -> None:
        backoff = Backoff()
        while True:
            link = self._link
            if link is None or link.lost is not None:
                if not await self._renew():
                    await asyncio.sleep(backoff.next())
                    continue
            elif not await self._beat(link):
                if link.lost is None:
                    await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            self._wake.clear()
            if self._link is not None and self._link.lost is None:
                # Not `wait_for`: in Python 3.11 it forgets a cancellation that meets its result.
                with suppress(*TIMEOUTS):
                    async with asyncio.timeout(self._link.limits.heartbeat_s / 2):
                        await self._wake.wait()

    async def _beat(self, link: Link) -> bool:
        """One heartbeat; False when it failed or told that the Link is lost."""
        request = pb.HeartbeatRequest(session=link.session, client=link.client)
        limit_s = min(self.options.deadline_s, max(link.limits.session_ttl_s / 3, 0.1))
        try:
            reply = await self.rpc("Heartbeat", request, Deadline(limit_s))
        except NotFound as error:
            self._lose(link, str(error))
            return False
        except KVError as error:
            if self._beating:
                self._log.warning("heartbeat unanswered: %s", error)
            self._beating = False
            if not link.transfer.alive():
                self._lose(link, "the hub was restarted")
            return False
        self._beating = True
        if reply.epoch != link.epoch:
            self._lose(link, f"epoch {reply.epoch} after {link.epoch}")
            return False
        return True

    async def _renew(self) -> bool:
        try:
            self._link = await self._hello(Deadline(self.options.deadline_s))
        except KVError as error:
            if self._failure is None:
                self._log.warning("reconnecting: %s", error)
            self._failure = error
            self._beating = False
        else:
            self._failure = None
            self._beating = True
            self.reconnects += 1
        if self._attempt is not None and not self._attempt.done():
            self._attempt.set_result(None)
        return self._failure is None

    async def _hello(self, deadline: Deadline) -> Link:
        options = self.options
        request = pb.HelloRequest(
            protocol_version=PROTOCOL_VERSION,
            client_name=options.name,
            client_version=_version(),
            tenant=options.tenant,
            join_token=self._join_token,
            rank=options.rank,
        )
        try:
            reply = await self.rpc("Hello", request, deadline)
        except NotFound:
            if not self._join_token or self._link is None:
                raise
            # The hub forgot the session that this rank belonged to. It works on in one of its own
            # until `rejoin` tells of the next.
            self._join_token = b""
            return await self._hello(deadline)
        if reply.protocol_version != PROTOCOL_VERSION:
            raise Unsupported(
                f"the hub at {options.address} speaks protocol {reply.protocol_version}, "
                f"this client {PROTOCOL_VERSION}"
            )
        opening = self.background(self._keep_alive(reply))
        try:
            transfer = await choose.open_transfer(options, reply, deadline, self.rpc)
        except KVError:
            goodbye = pb.GoodbyeRequest(session=reply.session, client=reply.client, drained=True)
            with suppress(KVError):  # unheard, the session ends by its own clock
                await self.rpc("Goodbye", goodbye, Deadline(1.0))
            raise
        finally:
            opening.cancel()
        local = None
        offer = next((o for o in reply.transports if o.name == transfer.transport), None)
        if offer is not None and offer.options.get("calls") == "1":
            local = await open_calls(
                offer.address,
                address=options.address,
                session=reply.session,
                client=reply.client,
                token=reply.token,
                deadline=deadline,
            )
        self._log.info(
            "connected to %s (kvserver %s, epoch %d): session %x, transport %s at %s",
            *(options.address, reply.server_version, reply.epoch, reply.session),
            *(transfer.transport, transfer.address),
        )
        if orphans.kept:
            self.background(settle_orphans(reply, self.rpc, once=False))
        return Link(
            address=options.address,
            session=reply.session,
            client=reply.client,
            token=reply.token,
            epoch=reply.epoch,
            limits=_limits(reply.limits),
            transfer=transfer,
            local=local,
        )

    async def _keep_alive(self, hello: Message) -> None:
        """Heartbeats while a transfer is opened: NIXL's staging can take longer than sessions live.
        What a failure means is told by the calls that the opening makes itself."""
        request = pb.HeartbeatRequest(session=hello.session, client=hello.client)
        while True:
            await asyncio.sleep(hello.limits.heartbeat_ms / 1000)
            with suppress(KVError):
                await self.rpc("Heartbeat", request, Deadline(1.0))


def _limits(told: Message) -> Limits:
    return Limits(
        keys_per_call_max=told.keys_per_call_max,
        reservation_s_max=told.reservation_ms_max / 1000,
        lease_s_max=told.lease_ms_max / 1000,
        wait_s_max=told.wait_ms_max / 1000,
        window_bytes_max=told.window_bytes_max,
        heartbeat_s=told.heartbeat_ms / 1000,
        session_ttl_s=told.session_ttl_ms / 1000,
        announce_ttl_s_max=told.announce_ttl_ms_max / 1000,
        writers_per_block_max=told.writers_per_block_max,
        slot_bytes_max=told.slot_bytes_max,
        commit_names=told.commit_names,
    )


def _version() -> str:
    try:
        return version("kvserver")
    except PackageNotFoundError:
        return "unknown"
