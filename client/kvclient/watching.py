"""Watching a hub: which blocks are where, for whoever routes requests to engines or hubs.

    async with client.watch() as watch:
        cached = CacheMap()
        async for event in watch:
            cached.apply(event)

Theory of operation. The hub tells what it holds (RESET, then BLOCKS, then SYNCED), and from the
RESET on every change. Each residence says what holds now, so hearing one twice does no harm. What a
watcher that was too slow has missed is not kept for it: it is told RESET again, with the reason
"overflow".

Rules:
 1. Nothing is left out silently: a gap in the sequence counts as a broken stream.
 2. A stream that breaks, or is silent for three of the hub's idle periods, is LOST: what was told
    may be out of date from then on. It is opened again by itself, with pauses of 50 ms to 1 s, and
    begins with a RESET, which carries the epoch of the hub that answers.
 3. A refusal that will not change by itself (no such namespace, a limit) is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvclient.errors import TIMEOUTS, DeadlineExceeded, Gone, KVError, NotFound, Unavailable
from kvclient.results import Tier
from kvclient.session import Link, Session
from kvclient.timing import Backoff, Deadline
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import HASH_BYTES
from kvproto.v1 import kvserver_pb2 as pb

IDLE_PERIODS = 3
FIRST_S = 30.0  # how long the first message of a stream may take


class WatchKind(IntEnum):
    LOST = 0  # of this client: what was told may be out of date
    RESET = 1
    BLOCKS = 2
    SYNCED = 3
    FORGOTTEN = 4


@dataclass(frozen=True, slots=True)
class Residence:
    """Where a block is whole now. With no tier it is gone, and has no parent and no tokens."""

    hash: bytes
    parent: bytes  # 32 zero bytes for a first block
    tokens: int
    tiers: frozenset[Tier]


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One message of a hub.

    `epoch` is the hub process's, `tiers_up` the tiers that work: blocks that are on others only
    cannot be read now. `reason`: of a RESET "start" or "overflow", of LOST what happened.
    `namespace_id` and `spec` are of BLOCKS and FORGOTTEN; `spec` is None for one that this stream
    has told nothing about.
    """

    kind: WatchKind
    epoch: int = 0
    tiers_up: frozenset[Tier] = frozenset()
    reason: str = ""
    namespace_id: bytes = b""
    spec: NamespaceSpec | None = None
    blocks: tuple[Residence, ...] = ()


@dataclass
class CacheMap:
    """The table as a watcher knows it: feed it each event, in order."""

    synced: bool = False  # it is what the hub holds, as far as its word has arrived
    epoch: int = 0
    tiers_up: frozenset[Tier] = frozenset()
    blocks: dict[bytes, dict[bytes, Residence]] = field(default_factory=dict)
    specs: dict[bytes, NamespaceSpec] = field(default_factory=dict)

    def apply(self, event: WatchEvent) -> None:
        if event.kind is WatchKind.LOST:
            self.synced = False
            return
        self.epoch, self.tiers_up = event.epoch, event.tiers_up
        if event.kind is WatchKind.RESET:
            self.synced = False
            self.blocks.clear()
            self.specs.clear()
        elif event.kind is WatchKind.SYNCED:
            self.synced = True
        elif event.kind is WatchKind.FORGOTTEN:
            self.blocks.pop(event.namespace_id, None)
            self.specs.pop(event.namespace_id, None)
        else:
            if event.spec is not None:
                self.specs[event.namespace_id] = event.spec
            known = self.blocks.setdefault(event.namespace_id, {})
            for block in event.blocks:
                if block.tiers:
                    known[block.hash] = block
                else:
                    known.pop(block.hash, None)

    def prefix(self, namespace_id: bytes, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a chain stand on tiers that work."""
        known = self.blocks.get(namespace_id, {})
        for count, key in enumerate(hashes):
            block = known.get(key)
            if block is None or not block.tiers & self.tiers_up:
                return count
        return len(hashes)


class Watch:
    """An iterator of WatchEvents without end; `aclose` (or `async with`) ends it.

    `prepare` makes sure that the hub knows the namespace, under a Link that may be new.
    """

    def __init__(
        self,
        session: Session,
        namespace_id: bytes = b"",
        prepare: Callable[[Link, Deadline], Awaitable[object]] | None = None,
    ) -> None:
        self._session = session
        self._namespace_id = namespace_id
        self._prepare = prepare
        self._call: Any = None
        self._link: Link | None = None
        self._sequence = 0
        self._idle_s = FIRST_S
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._backoff = Backoff()
        self._lost = False
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def ended(self) -> bool:
        """Closed, or its client is: nothing will come any more."""
        return self._closed or self._session.closed

    async def aclose(self) -> None:
        self._closed = True
        self._hang_up()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchEvent:
        """The next event; StopAsyncIteration once the watch or its client is closed."""
        while not self.ended:
            try:
                if self._call is None:
                    await self._dial()
                event = await self._read()
            except KVError as error:
                self._hang_up()
                if not _passes(error):
                    raise
                if self.ended:
                    break
                if not self._lost:
                    self._lost = True
                    return WatchEvent(WatchKind.LOST, reason=str(error))
                await asyncio.sleep(self._backoff.next())
            else:
                if event is not None:
                    return event
        raise StopAsyncIteration

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _dial(self) -> None:
        deadline = Deadline(self._session.options.deadline_s)
        link = self._link = await self._session.ready(deadline)
        if self._prepare is not None:
            await self._prepare(link, deadline)
        request = pb.WatchRequest(session=link.session, namespace_id=self._namespace_id)
        self._call = self._session.stream(link, "Watch", request)
        self._sequence, self._idle_s = 0, FIRST_S
        self._specs.clear()

    async def _read(self) -> WatchEvent | None:
        """The next message; None for one that tells nothing."""
        assert self._link is not None
        try:
            async with asyncio.timeout(self._idle_s):
                reply = await self._call.read()
        except TIMEOUTS:
            raise Unavailable(
                f"Watch at {self._session.address}: silent for {self._idle_s:.3g} s"
            ) from None
        except KVError as error:
            raise self._session.stream_failed(self._link, error) from None
        if reply is None:
            raise Unavailable(f"Watch at {self._session.address}: the hub ended the stream")
        self._sequence += 1
        if reply.sequence != self._sequence:
            raise Unavailable(f"Watch: message {reply.sequence} where {self._sequence} was due")
        self._idle_s = max(0.1, IDLE_PERIODS * reply.idle_ms / 1000)
        return self._event(reply)

    def _event(self, reply: pb.WatchReply) -> WatchEvent | None:
        tiers_up = _tiers(reply.tiers_up)
        if reply.kind == pb.WATCH_KIND_IDLE:
            return None
        kind = WatchKind(reply.kind)
        if kind is WatchKind.RESET:
            self._lost = False
            self._backoff.reset()
            self._specs.clear()
        identity = bytes(reply.namespace_id)
        if reply.HasField("spec"):
            self._specs[identity] = _spec(reply.spec)
        spec = self._specs.get(identity)
        if kind is WatchKind.FORGOTTEN:
            self._specs.pop(identity, None)
        return WatchEvent(
            kind, reply.epoch, tiers_up, reply.reason, identity, spec, _residences(reply)
        )


def _passes(error: KVError) -> bool:
    """Whether it may be otherwise with the next session."""
    if isinstance(error, NotFound) and error.field in ("session", "client"):
        return True
    return isinstance(error, Unavailable | DeadlineExceeded | Gone)


def _residences(reply: pb.WatchReply) -> tuple[Residence, ...]:
    def keys(packed: bytes) -> list[bytes]:
        return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]

    tokens: npt.NDArray[np.uint32] = np.frombuffer(reply.tokens, "<u4")
    tiers = [_tiers(bits) for bits in reply.tiers]
    fields = (keys(reply.hashes), keys(reply.parents), tokens.tolist(), tiers)
    return tuple(Residence(*one) for one in zip(*fields, strict=True))


_BY_BITS = [
    frozenset(tier for tier in Tier if tier and bits >> (tier - 1) & 1) for bits in range(256)
]


def _tiers(bits: int) -> frozenset[Tier]:
    return _BY_BITS[bits & 255]


def _spec(message: pb.NamespaceSpec) -> NamespaceSpec:
    values = {one.name: getattr(message, one.name) for one in message.DESCRIPTOR.fields}
    return NamespaceSpec(**{**values, "attributes": dict(message.attributes)})
