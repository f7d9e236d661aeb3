"""Calls of clients on this host, over a connection of the `shm` socket (`kvproto.calls`).

They run the very handlers that gRPC runs, so limits, errors, metrics and everything that a call
leaves behind are the same; only the way of the message is shorter.

Rules:
 1. A connection speaks for one session, the one whose token its handshake showed. A message that
    names another is refused.
 2. A connection that ends ends its calls: each is cancelled as gRPC cancels those of a client that
    went away. A call past its deadline is cancelled too, and not answered.
 3. A call is begun at once, where it arrived; it becomes a task when it has to wait. Of calls that
    come together only the first is, the others are tasks from the beginning: so a peer holds the
    loop up for one call. Nor is one with a cancellation right behind it, which then cancels it.
    Handlers must not ask for the current task (asyncio.timeout does): before they first wait there
    is none.
 4. Who cancels a call that was answered already has not seen the answer, and nobody writes or reads
    under what it granted: the reservation is aborted (fenced, if it has expired), the lease given
    back, by the calls that do that for a client. Of so many answers that is known, of older ones it
    expires.
 5. What a peer can make us hold is bounded: one frame that has not come to its end, CALLS_MAX calls
    that run, and OUT_BYTES_MAX of answers that it does not read. While answers wait, nothing more
    is read; a peer that takes none for `stall_s` is hung up on, and so is one that sends garbage.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import socket
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kvproto import calls
from kvproto.calls import FrameError, Method, Refusal
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.service import convert
from kvserver.service.convert import Status

CONNECTIONS_MAX = 1024
OUT_BYTES_HIGH = 1 << 20  # of answers that wait: from here on nothing is read
OUT_BYTES_MAX = 2 * calls.REPLY_BODY_BYTES_MAX
ANSWERS_MAX = 256  # of a connection, that are remembered for rule 4
STALL_S = 30.0
_TOO_MANY = grpc.StatusCode.RESOURCE_EXHAUSTED
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


Undo = tuple[Method, Any]


class _Refused(Exception):
    """How `context.abort` ends a handler here."""

    def __init__(self, status: Status) -> None:
        super().__init__(status[1])
        self.status = status


class _Context:
    """What a handler is given in the place of gRPC's context."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: tuple[tuple[str, str], ...] = (),
    ) -> NoReturn:
        raise _Refused((code, details, trailing_metadata))


_CONTEXT = _Context()


class LocalCalls:
    """All such connections. `servicer` has the handlers; `knows(session, client)`: both live."""

    def __init__(
        self,
        servicer: object,
        *,
        knows: Callable[[int, int], bool],
        report: Callable[[str, BaseException], object],
        log: logging.Logger,
        connections_max: int = CONNECTIONS_MAX,
        stall_s: float = STALL_S,
    ) -> None:
        self.handlers: dict[Method, Callable[[Any, Any], Any]] = {
            method: getattr(servicer, method.rpc) for method in calls.MESSAGES
        }
        self.stall_s = stall_s
        self.report = report
        self.log = log
        self._knows = knows
        self._connections_max = connections_max
        self._open: set[_Connection] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._open)

    def full(self) -> bool:
        """Whether no further connection may be taken; hangs up on clients that have left."""
        if len(self._open) >= self._connections_max:
            for connection in list(self._open):
                if not self._knows(connection.session, connection.client):
                    connection.hang_up("its client has left")
        return self._closing or len(self._open) >= self._connections_max

    async def take(self, connection: socket.socket, session: int, client: int) -> None:
        """Serve a connection behind its handshake; it is ours from now on."""
        protocol = _Connection(self, session, client)
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection)
        except BaseException:
            connection.close()
            raise

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)

    def gone(self, connection: _Connection) -> None:
        self._open.discard(connection)

    async def close(self, grace_s: float) -> None:
        """Take no calls any more, let those that run end within `grace_s`, and hang up."""
        self._closing = True
        for connection in self._open:
            connection.stop_reading()
        running = [task for connection in self._open for task in connection.running()]
        if running:
            await asyncio.wait(running, timeout=grace_s)
        for connection in list(self._open):
            connection.hang_up("the server stops")
        running = [task for task in running if not task.done()]
        await asyncio.gather(*running, return_exceptions=True)


class _Connection(asyncio.Protocol):
    def __init__(self, owner: LocalCalls, session: int, client: int) -> None:
        self.session = session
        self.client = client
        self._owner = owner
        self._requests = calls.RequestSplitter()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answered: dict[int, Undo] = {}  # the latest, by call
        self._loop = asyncio.get_running_loop()
        self._writable = asyncio.Event()
        self._writable.set()
        self._stalled: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def running(self) -> list[asyncio.Task[None]]:
        return list(self._running.values())

    # ---- what the transport tells ----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.opened(self)
        transport.set_write_buffer_limits(high=OUT_BYTES_HIGH)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.gone(self)
        if self._stalled is not None:
            self._stalled.cancel()
        self._writable.set()
        for task in self.running():
            task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()
        self._transport.pause_reading()
        self._stalled = self._loop.call_later(
            self._owner.stall_s, self.hang_up, "it does not read its answers"
        )

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._writable.set()
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        try:
            requests = self._requests.feed(data)
            first = next(requests, None)
            if first is None:
                return
            second = next(requests, None)
            self._begin(first, at_once=second is None or second.method is not Method.CANCEL)
            if second is not None:
                for request in itertools.chain([second], requests):
                    self._begin(request, at_once=False)
        except FrameError as error:
            self.hang_up(str(error))

    def stop_reading(self) -> None:
        self._transport.pause_reading()

    def hang_up(self, reason: str) -> None:
        self._owner.log.info(
            "calls_ended", extra={"fields": {"client": self.client, "reason": reason}}
        )
        self._transport.abort()

    # ---- calls -----------------------------------------------------------------------------

    def _begin(self, request: calls.Request, *, at_once: bool) -> None:
        number = request.call
        if request.method is Method.CANCEL:
            if number in self._running:
                self._running[number].cancel()
            elif number in self._answered and len(self._running) < calls.CALLS_MAX:
                task = self._loop.create_task(self._take_back(*self._answered.pop(number)))
                self._running[number] = task
                task.add_done_callback(functools.partial(self._ended, number, None))
            return
        if number in self._running:
            raise FrameError(f"call {number} was begun twice")
        if len(self._running) >= calls.CALLS_MAX:
            text = f"{len(self._running) + 1} calls at once on a connection"
            self._refuse(number, _limit("calls_max", text, calls.CALLS_MAX))
            return
        try:
            message = calls.MESSAGES[request.method][0].FromString(request.body)
        except DecodeError:
            text = f"{request.method.rpc}: its message cannot be read"
            self._refuse(number, (_INVALID, text, (("kv-kind", "invalid"),)))
            return
        if message.session != self.session:
            text = "session: another than this connection's"
            metadata = (("kv-kind", "invalid"), ("kv-field", "session"))
            self._refuse(number, (_INVALID, text, metadata))
            return
        work: Coroutine[Any, Any, None] = self._answer(request, message)
        if at_once:
            try:
                awaited = work.send(None)
            except StopIteration:
                return
            except Exception as error:
                self._failed(error)
                return
            work = rest_of(work, awaited)
        task = self._loop.create_task(work)
        late = None
        if request.deadline_ms:
            late = self._loop.call_later(request.deadline_ms / 1000, task.cancel)
        self._running[number] = task
        task.add_done_callback(functools.partial(self._ended, number, late))

    def _ended(
        self, number: int, late: asyncio.TimerHandle | None, task: asyncio.Task[None]
    ) -> None:
        if late is not None:
            late.cancel()
        del self._running[number]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._owner.report("local calls", error)
        self.hang_up("an answer could not be sent")

    async def _answer(self, request: calls.Request, message: Any) -> None:
        handler = self._owner.handlers[request.method]
        try:
            if request.method in calls.STREAMING:
                await self._stream(request.call, handler(message, _CONTEXT))
            else:
                reply = await handler(message, _CONTEXT)
                self._remember(request, message, reply)
                self._send(calls.encode_reply(request.call, reply.SerializeToString(), last=True))
        except _Refused as refused:
            self._refuse(request.call, refused.status)

    def _remember(self, request: calls.Request, message: Any, reply: Any) -> None:
        undo = _undo(request.method, message, reply)
        if undo is not None:
            self._answered[request.call] = undo
            if len(self._answered) > ANSWERS_MAX:
                del self._answered[next(iter(self._answered))]

    async def _take_back(self, method: Method, message: Any) -> None:
        handlers = self._owner.handlers
        with contextlib.suppress(_Refused):
            try:
                await handlers[method](message, _CONTEXT)
            except _Refused:  # it has ended meanwhile; its slots may be fenced off
                if method is Method.ABORT:
                    ids = {"session": message.session, "client": message.client}
                    fence = pb.FenceRequest(**ids, reservation=message.reservation)
                    await handlers[Method.FENCE](fence, _CONTEXT)

    async def _stream(self, number: int, replies: AsyncGenerator[Any, None]) -> None:
        async with contextlib.aclosing(replies):
            async for reply in replies:
                body = reply.SerializeToString()
                self._send(calls.encode_reply(number, body, last=reply.done))
                await self._writable.wait()

    def _refuse(self, number: int, status: Status) -> None:
        code, message, metadata = status
        told = dict(metadata)
        refusal = Refusal(
            message, told.get("kv-kind", ""), told.get("kv-field", ""), told.get("kv-limit", "")
        )
        self._send(calls.encode_refusal(number, code.value[0], refusal))

    def _send(self, frame: bytes) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > OUT_BYTES_MAX:
            self.hang_up("it does not read its answers")


def _undo(method: Method, message: Any, reply: Any) -> Undo | None:
    """The call that takes back what an answer granted."""
    if method is Method.RESERVE and reply.reservation:
        ids = {"session": message.session, "client": message.client}
        abort = pb.AbortRequest(**ids, reservation=reply.reservation, drained=True)
        return Method.ABORT, abort
    if method is Method.LOOKUP and reply.lease:
        leases = convert.pack([reply.lease], "<u8")
        return Method.RELEASE, pb.ReleaseRequest(session=message.session, leases=leases)
    return None


def rest_of(work: Coroutine[Any, Any, None], awaited: object) -> Coroutine[Any, Any, None]:
    """What is left of a coroutine that was begun by hand and waits for `awaited`, for a task. This
    one has been begun, too: a task that is cancelled before its first step must reach `work`.
    """

    async def rest() -> None:
        await _handed_over(work, awaited)

    coroutine = rest()
    coroutine.send(None)
    return coroutine


@types.coroutine
def _handed_over(work: Coroutine[Any, Any, None], awaited: object) -> Generator[Any, Any, None]:
    taken = False
    waits: object = None  # at first for the task that takes it over
    while True:
        try:
            try:
                told = yield waits
            except BaseException as error:
                waits = work.throw(error)
            else:
                waits = work.send(told) if taken else awaited
        except StopIteration:
            return
        taken = True


def _limit(name: str, text: str, limit: int) -> Status:
    metadata = (("kv-kind", "limit"), ("kv-field", name), ("kv-limit", str(limit)))
    return _TOO_MANY, f"{text} is over the limit {name} = {limit}", metadata
