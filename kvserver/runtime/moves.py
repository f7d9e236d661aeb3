"""Calls of Move: who may move what, and what stays guarded while anything of it runs.

    attach -> move* -> settle* -> released

The bytes are moved by a process of its own (`kvserver.transfer.nixl`). An Attachment is one client
whose memory its agent can reach. It outlives its session for as long
as a transfer of it is not terminal.

Rules:
 1. While a transfer of a client runs it is not `idle`: no slot that it reserved leaves quarantine,
    its word that its copies have drained does not count, and what it would write is not committed.
    The server holds the client's liveness lock meanwhile, so no other writer has its id.
 2. A slot is written only by the holder of a live reservation, while its directory entry is
    RESERVED, of the granted generation, and names the client. All of that is looked at on the
    loop's thread, where slots are freed, and its words again by the worker before each post.
 3. Bytes that arrived are hashed, by the worker, before they are answered as OK: a reader's
    mismatch must mean that something happened to the arena.
 4. A Move that is not terminal at its deadline is answered without its fence, stopped, and kept
    until it is. Until then the client is not idle, so its slots stay in quarantine.
 5. A move number is used once; `settle` also bars numbers that have not arrived yet.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvproto.arena import GENERATION_WORD, UNIT
from kvproto.frames import Op, Place, Status
from kvproto.grid import Region
from kvproto.nixlib import METADATA_BYTES_MAX, Memory, NixlError
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.driver import Driver
from kvserver.runtime.extents import Extents
from kvserver.runtime.orders import Bytes, Moved, Order
from kvserver.runtime.sessions import Session, Sessions
from kvserver.tiers.entry import ReservedEntry
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.base import TransferError
from kvserver.transfer.nixl.messages import Totals
from kvserver.transfer.nixl.process import AgentProcess
from kvserver.transfer.permits import Permits

KEY_BYTES = 16
MOVES_PER_CLIENT_MAX = 64
MOVE_BYTES_MAX = 256 << 20
MOVE_PIECES_MAX = 1 << 16
BARRED_MAX = 4096  # settled move numbers that are remembered one by one
SWEEP_S = 0.5
_STATUSES = np.array([Status.OK, Status.STALE, Status.STALE, Status.CORRUPT], np.uint8)  # by Ended
GRACE_S = 0.05  # a stopped Move's last posts are usually over by then
ATTACH_S = 10.0
START_S = 60.0  # an agent that registers a large arena for RDMA pins all of it


@dataclass(eq=False, slots=True)
class _Move:
    order: Order
    number: int  # of its Work
    admitted: list[int]  # the places that the Work is of
    outcomes: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))  # Ended, when `over`
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False, slots=True)
class Attachment:
    session: int
    client: int
    key: bytes
    lock_fd: int
    extents: Extents
    moves: dict[int, _Move] = field(default_factory=dict)
    barred: set[int] = field(default_factory=set)
    floor: int = 0  # every number up to here is barred as well
    lost: bool = False  # the agent was rebuilt: attach again

    def bar(self, numbers: Sequence[int]) -> None:
        """These start nothing from now on. Of too many the older half becomes the floor: a Move
        that is refused for it fails, which is safe.
        """
        self.barred.update(numbers)
        if len(self.barred) > BARRED_MAX:
            self.floor = max(self.floor, sorted(self.barred)[len(self.barred) // 2])
            self.barred = {number for number in self.barred if number > self.floor}

    def takes(self, number: int) -> bool:
        return number > self.floor and number not in self.barred and number not in self.moves


class Moves:
    """See the module's rules. On the loop's thread."""

    def __init__(
        self,
        driver: Driver,
        sessions: Sessions,
        *,
        host: HostArena,
        liveness: Liveness,
        permits: Permits,
        move_s_max: float,
    ) -> None:
        self._driver = driver
        self._sessions = sessions
        self._host = host
        self._liveness = liveness
        self._permits = permits
        self.move_s_max = move_s_max
        self._agent: AgentProcess | None = None
        self._attached: dict[int, Attachment] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self.moves = 0
        self.moves_late = 0
        self.items_stale = 0
        self.items_corrupt = 0
        self.items_denied = 0

    # ---- life ----------------------------------------------------------------------------

    async def start(self, agent: AgentProcess) -> None:
        self._agent = agent
        try:
            async with asyncio.timeout(START_S):
                await agent.start(self._lose_all)
        except TimeoutError as error:
            raise TransferError(f"nixl: no agent within {START_S} s") from error
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="nixl-sweep")

    async def close(self) -> None:
        """Every transfer is over when this returns, so locks and memory may go."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._agent is not None:
            await self._agent.close()
        for attachment in self._attached.values():
            os.close(attachment.lock_fd)
        self._attached.clear()

    def counters(self) -> dict[str, int]:
        agent = self._agent
        totals = agent.totals if agent else Totals()
        return {
            "nixl_attached": len(self._attached),
            "nixl_moves": self.moves,
            "nixl_moves_late": self.moves_late,
            "nixl_moves_running": sum(len(a.moves) for a in self._attached.values()),
            "nixl_items_stale": self.items_stale,
            "nixl_items_corrupt": self.items_corrupt,
            "nixl_items_denied": self.items_denied,
            "nixl_bytes_in": totals.bytes_read,
            "nixl_bytes_out": totals.bytes_written,
            "nixl_posts": totals.posts,
            "nixl_posts_failed": totals.posts_failed,
            "nixl_rebuilds": agent.rebuilds if agent else 0,
        }

    # ---- attaching -------------------------------------------------------------------------

    async def attach(
        self,
        session: Session,
        client: int,
        *,
        metadata: bytes,
        extents: Extents,
    ) -> bytes:
        """The key of the attachment. A client may attach again: what it tells then replaces what it
        told before. What runs goes on."""
        if self._agent is None:
            raise CoreError(ErrorKind.INVALID, "this hub has no nixl", field="transport")
        if not 0 < len(metadata) <= METADATA_BYTES_MAX:
            raise _invalid("metadata", f"{len(metadata)} bytes, at most {METADATA_BYTES_MAX}")
        found = self._attached.get(client)
        if found is not None and found.session != session.id:
            raise _invalid("client", "it belongs to another session")
        lock_fd = found.lock_fd if found is not None else self._lock(client)
        attachment = Attachment(
            session.id, client, secrets.token_bytes(KEY_BYTES), lock_fd, extents
        )
        if found is None:
            self._attached[client] = attachment
        prefix = agent_prefix(session.id, client)
        try:
            async with asyncio.timeout(ATTACH_S):
                await self._agent.attach(client, metadata, prefix)
        except (NixlError, TimeoutError) as error:
            if found is None:
                self._release(attachment)
            text = f"the memory of client {client} cannot be reached: {str(error) or 'in time'}"
            raise CoreError(ErrorKind.UNAVAILABLE, text, field="metadata") from error
        except asyncio.CancelledError:
            if found is None:
                self._release(attachment)
            raise
        if found is not None:
            found.extents = extents
            found.lost = False
            attachment = found
        session.remote.add(client)
        session.transports.add("nixl")
        return attachment.key

    def _lock(self, client: int) -> int:
        try:
            return self._liveness.grant(client)
        except FileExistsError as error:
            text = f"client {client} already maps the arena, or has attached"
            raise CoreError(ErrorKind.CONFLICT, text, field="client") from error

    def _release(self, attachment: Attachment) -> None:
        """Nothing of the client runs and nothing can begin: let its lock go, if it is gone."""
        assert not attachment.moves
        if self._attached.get(attachment.client) is attachment:
            del self._attached[attachment.client]
        os.close(attachment.lock_fd)
        if self._agent is not None:
            self._agent.detach(attachment.client)

    def idle(self, client: int) -> bool | None:
        """Whether no transfer of an attached client runs; None of one that has not attached."""
        found = self._attached.get(client)
        return None if found is None else not found.moves

    def check_commit(
        self, client: int, reservation: int, indices: list[int], region: Region
    ) -> None:
        """CoreError when a transfer into these cells still runs: they are not what was sent yet,
        and a block that is complete may leave its slot to others."""
        found = self._attached.get(client)
        for move in found.moves.values() if found is not None else ():
            order = move.order
            if order.op is not Op.WRITE or not order.region.intersects(region):
                continue
            written = {place.offset for place in order.places}
            if written & self._driver.hub.offsets_of(reservation, indices):
                text = f"move {order.number} into these cells still runs"
                raise CoreError(ErrorKind.CONFLICT, text, field="indices")

    async def _sweep(self) -> None:
        """Let go of attachments whose client is gone, once nothing of them runs."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for attachment in list(self._attached.values()):
                session = self._sessions.find(attachment.session)
                if session is not None and attachment.client in session.clients:
                    continue
                for move in attachment.moves.values():
                    self._stop(move)
                if not attachment.moves:
                    self._release(attachment)

    # ---- moving ----------------------------------------------------------------------------

    async def move(self, session: Session, client: int, order: Order) -> Moved:
        """Carry out one Move. CoreError when nothing was begun."""
        attachment = self._attached.get(client)
        if self._agent is None or attachment is None or attachment.lost:
            text = f"client {client} is not attached: attach, then move"
            raise CoreError(ErrorKind.UNAVAILABLE, text, field="attach")
        self._check(attachment, order)
        kind = order.memory(attachment.extents)
        statuses = self._admit(session, client, attachment, order)
        move = self._begin(attachment, order, statuses, kind)
        self.moves += 1
        try:
            async with asyncio.timeout(min(order.deadline_s or self.move_s_max, self.move_s_max)):
                await move.over.wait()
        except TimeoutError:
            self._stop(move)
            await _briefly(move.over)
        except asyncio.CancelledError:  # the caller has gone; its Settle tells it the rest
            self._stop(move)
            raise
        if attachment.lost:
            text = "the hub had to rebuild its agent: attach again"
            raise CoreError(ErrorKind.UNAVAILABLE, text, field="attach")
        terminal = move.over.is_set()
        self.moves_late += not terminal
        statuses[move.admitted] = _STATUSES[move.outcomes] if terminal else Status.STALE
        self.items_corrupt += int((statuses == Status.CORRUPT).sum())
        trailers = self._trailers(order, statuses) if order.op is Op.READ else b""
        self.items_stale += int((statuses == Status.STALE).sum())
        return Moved(statuses, trailers, terminal)

    def _check(self, attachment: Attachment, order: Order) -> None:
        if not attachment.takes(order.number):
            raise _invalid("move", f"number {order.number} is settled or in use")
        if len(attachment.moves) >= MOVES_PER_CLIENT_MAX:
            text = f"{MOVES_PER_CLIENT_MAX} moves of client {attachment.client} run already"
            raise CoreError(
                ErrorKind.LIMIT, text, field="moves_per_client_max", limit=MOVES_PER_CLIENT_MAX
            )
        if order.payload_bytes > MOVE_BYTES_MAX:
            text = f"{order.payload_bytes} bytes in one move, at most {MOVE_BYTES_MAX}"
            raise CoreError(ErrorKind.LIMIT, text, field="move_bytes_max", limit=MOVE_BYTES_MAX)
        if order.addresses.size > MOVE_PIECES_MAX:
            text = f"{order.addresses.size} pieces in one move, at most {MOVE_PIECES_MAX}"
            raise CoreError(ErrorKind.LIMIT, text, field="move_pieces_max", limit=MOVE_PIECES_MAX)

    def _admit(self, session: Session, client: int, attachment: Attachment, order: Order) -> Bytes:
        """OK, STALE or DENIED for each item, before anything moves (rule 2)."""
        statuses = np.zeros(len(order.places), np.uint8)
        for at, place in enumerate(order.places):
            used = place.payload_bytes + place.trailer_bytes
            if not self._permits.check(order.op, client, place):
                statuses[at] = Status.DENIED
                self.items_denied += 1
            elif place.offset % UNIT or place.offset + used > self._host.data_bytes:
                statuses[at] = Status.DENIED  # a permit of ours never says so
            elif not self._granted(session, client, order.op, place):
                statuses[at] = Status.STALE
        return statuses

    def _granted(self, session: Session, client: int, op: Op, place: Place) -> bool:
        if not self._current(place):
            return False
        if op is Op.READ:
            return True
        if not self._driver.hub.may_write(place.hold, session.id, client):
            return False
        entry = self._host.read_entry(place.offset)
        return isinstance(entry, ReservedEntry) and client in entry.clients

    def _current(self, place: Place) -> bool:
        words = self._host.entries.words[place.offset // UNIT]
        return int(words[GENERATION_WORD]) == place.generation

    def _begin(
        self, attachment: Attachment, order: Order, statuses: Bytes, kind: tuple[Memory, int]
    ) -> _Move:
        assert self._agent is not None
        admitted = np.flatnonzero(statuses == Status.OK).tolist()
        move = _Move(order, next(self._numbers), admitted)
        if not admitted:
            move.over.set()
            return move

        def ended(outcomes: Bytes) -> None:
            del attachment.moves[order.number]
            move.outcomes = outcomes
            move.over.set()

        attachment.moves[order.number] = move
        work = order.work(move.number, attachment.client, admitted, kind)
        self._agent.submit(work, ended)
        return move

    def _stop(self, move: _Move) -> None:
        """Post no more of it."""
        if self._agent is not None:
            self._agent.stop(move.number)

    def _trailers(self, order: Order, statuses: Bytes) -> bytes:
        """Each slot's trailer, read while its generation stands; zeros where it does not."""
        parts = []
        for at, place in enumerate(order.places):
            trailer = bytes(place.trailer_bytes)
            if statuses[at] == Status.OK:
                start = place.offset + place.payload_bytes
                trailer = self._host.slot(start, place.trailer_bytes).tobytes()
                if not self._current(place):
                    statuses[at] = Status.STALE
            parts.append(trailer)
        return b"".join(parts)

    # ---- settling --------------------------------------------------------------------------

    async def settle(self, client: int, key: bytes, numbers: Sequence[int]) -> list[bool]:
        """Which of these still run, after a moment to end. They start nothing from now on.

        A client that is not known any more has nothing running: it is forgotten only then.
        """
        attachment = self._attached.get(client)
        if attachment is None:
            return [False] * len(numbers)
        if not hmac.compare_digest(attachment.key, key):
            raise _invalid("key", "not the one of this client's Attach")
        attachment.bar(numbers)
        running = [attachment.moves[n] for n in numbers if n in attachment.moves]
        for move in running:
            self._stop(move)
        for move in running:
            await _briefly(move.over)
        return [number in attachment.moves for number in numbers]

    # ---- the worker's end --------------------------------------------------------------------

    def _lose_all(self) -> None:
        """There is a new agent, or will be: everybody has to attach again."""
        for attachment in self._attached.values():
            attachment.lost = True


async def _briefly(event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(GRACE_S):
            await event.wait()
    except TimeoutError:
        return


def agent_prefix(session: int, client: int) -> str:
    """What the name of a client's agent begins with; the rest is the client's secret."""
    return f"kvclient-{session:x}-{client}-"


def _invalid(field_name: str, text: str) -> CoreError:
    return CoreError(ErrorKind.INVALID, f"{field_name}: {text}", field=field_name)
