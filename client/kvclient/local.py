"""Calls to a hub on this host, over its Unix socket (`kvproto.calls`): the short way for the calls
that stand on the path of a push or a pull. gRPC has the others, and is there when this way is not.

Rules:
 1. A LocalCalls belongs to one Link. One that broke stays broken: what it carried fails with
    Unavailable, what comes next goes by gRPC.
 2. Who stops waiting says so: a call that was cancelled, or came to its deadline, is cancelled at
    the hub.
 3. Retired, it takes nothing new and hangs up when the last call has ended.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any

from google.protobuf.message import DecodeError

from kvclient.errors import KVError, Unavailable, from_refusal, late
from kvclient.timing import Deadline
from kvclient.transfer.shm import dial
from kvproto import calls
from kvproto.calls import FrameError
from kvproto.handshake import Mode, Request, Status

Message = Any


class _Unary:
    """A call that waits for its one reply."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.future: asyncio.Future[calls.Reply] = loop.create_future()

    def tell(self, reply: calls.Reply) -> None:
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: KVError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class LocalStream:
    """A call that has replies until the last one."""

    def __init__(self, owner: LocalCalls, name: str, request: Message) -> None:
        self.name = name
        self._owner = owner
        self._ready: deque[calls.Reply | KVError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._done = False
        self._number = owner.begin(self, request, 0)

    def done(self) -> bool:
        return self._done

    async def read(self, deadline: Deadline | None = None) -> Message | None:
        """The next message, None behind the last. KVErrors only; at the deadline, if there is one,
        the call is cancelled.
        """
        while not self._ready:
            if self._done:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(None if deadline is None else deadline.left()):
                    await self._waiter
            except TimeoutError:
                self.cancel()
                raise late(self.name, self._owner.address, _seconds(deadline)) from None
        told = self._ready.popleft()
        if isinstance(told, KVError):
            raise told
        return read_reply(self.name, told, self._owner.address)

    def cancel(self) -> None:
        if not self._done:
            self._done = True
            self._owner.cancel(self._number)

    def tell(self, reply: calls.Reply) -> None:
        self._ready.append(reply)
        if reply.last:
            self._done = True
            self._owner.end(self._number)
        self._wake()

    def fail(self, error: KVError) -> None:
        self._ready.append(error)
        self._done = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class LocalCalls(asyncio.Protocol):
    """One connection. Built by `open_calls`; lives on one event loop."""

    def __init__(self, address: str, path: str) -> None:
        self.address = address
        self.path = path  # of the socket
        self._loop = asyncio.get_running_loop()
        self._replies = calls.ReplySplitter()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Unary | LocalStream] = {}
        self._transport: asyncio.Transport | None = None
        self._retired = False

    # ---- what the transport tells ----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for reply in self._replies.feed(data):
                waiting = self._waiting.get(reply.call)
                if waiting is not None:  # else it was cancelled meanwhile
                    waiting.tell(reply)
        except FrameError as error:
            self._break(f"the hub sent garbage: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._break(f"the hub hung up ({error})" if error else "the hub hung up")

    def _break(self, reason: str) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            call.fail(Unavailable(f"{call.name} at {self.address}: {reason}"))

    # ---- life ------------------------------------------------------------------------------

    def retire(self) -> None:
        """See rule 3."""
        self._retired = True
        if not self._waiting:
            self.close()

    def close(self) -> None:
        self._break("the client was closed")

    # ---- calls -----------------------------------------------------------------------------

    def takes(self, name: str, request: Message) -> bool:
        """Whether a call may go this way now."""
        usable = self._transport is not None and not self._retired
        return (
            usable
            and name in calls.BY_RPC
            and len(self._waiting) < calls.CALLS_MAX
            and request.ByteSize() <= calls.REQUEST_BODY_BYTES_MAX
        )

    async def call(self, name: str, request: Message, deadline: Deadline) -> Message:
        """One unary call. KVErrors only; DeadlineExceeded at the deadline."""
        left = deadline.left()
        call = _Unary(name, self._loop)
        number = self.begin(call, request, left)
        timer = self._loop.call_later(left, self._expire, call, deadline.seconds)
        try:
            reply = await call.future
        except BaseException:
            self.cancel(number)
            raise
        finally:
            timer.cancel()
        self.end(number)
        return read_reply(name, reply, self.address)

    def _expire(self, call: _Unary, seconds: float) -> None:
        call.fail(late(call.name, self.address, seconds))

    def stream(self, name: str, request: Message) -> LocalStream:
        """A call with many replies. Its reader keeps the deadline, and cancels."""
        return LocalStream(self, name, request)

    def begin(self, call: _Unary | LocalStream, request: Message, seconds: float) -> int:
        assert self._transport is not None, "takes() comes first"
        number = next(self._numbers)
        raw = request.SerializeToString()
        milliseconds = int(1000 * seconds) + 1 if seconds else 0
        method = calls.BY_RPC[call.name]
        self._waiting[number] = call
        self._transport.write(calls.encode_request(method, number, milliseconds, raw))
        return number

    def cancel(self, number: int) -> None:
        if number in self._waiting and self._transport is not None:
            self._transport.write(calls.encode_cancel(number))
        self.end(number)

    def end(self, number: int) -> None:
        self._waiting.pop(number, None)
        if self._retired and not self._waiting:
            self.close()


def read_reply(name: str, reply: calls.Reply, address: str) -> Message:
    """What a reply of the hub at `address` says: its message, or the error raised."""
    try:
        if reply.status == calls.OK:
            return calls.MESSAGES[calls.BY_RPC[name]][1].FromString(reply.body)
        refusal = calls.decode_refusal(reply.body)
    except (DecodeError, FrameError) as error:
        raise KVError(f"{name} at {address}: unreadable answer: {error}") from error
    raise from_refusal(reply.status, refusal, what=name, address=address)


def _seconds(deadline: Deadline | None) -> float:
    return 0.0 if deadline is None else deadline.seconds


async def open_calls(
    path: str, *, address: str, session: int, client: int, token: bytes, deadline: Deadline
) -> LocalCalls | None:
    """Calls over the hub's socket at `path`; None when it takes none: gRPC has them all."""
    request = Request(Mode.CALLS, session, client, token)
    try:
        connection, answer = await asyncio.to_thread(dial, path, request, [], deadline.left())
    except (OSError, ValueError):  # also HandshakeError
        return None
    if answer.status is not Status.OK:
        connection.close()
        return None
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        _, protocol = await loop.create_unix_connection(
            lambda: LocalCalls(address, path), sock=connection
        )
    except BaseException:
        connection.close()
        raise
    return protocol
