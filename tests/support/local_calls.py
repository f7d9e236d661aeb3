"""A client of the calls over the shm socket that is nothing but a socket."""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Any, Self

from kvproto import calls
from kvproto.calls import Method, ReplySplitter
from kvproto.handshake import (
    ANSWER_HEAD_BYTES,
    Answer,
    Mode,
    Request,
    Status,
    answer_bytes,
    decode_answer,
    encode_request,
)
from kvproto.v1 import kvserver_pb2 as pb

WAIT_S = 10.0


class Peer:
    """One connection: says each byte itself. Every wait ends after WAIT_S."""

    def __init__(self, path: str, hello: pb.HelloReply, **changes: Any) -> None:
        told = {"session": hello.session, "client": hello.client, "token": hello.token}
        self._path = path
        self._request = Request(Mode.CALLS, **{**told, **changes})
        self._replies = ReplySplitter()
        self._ready: list[calls.Reply] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)

    async def __aenter__(self) -> Self:
        answer = await self.shake()
        assert answer.status is Status.OK, answer
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.sock.close()

    async def shake(self) -> Answer:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.sock, self._path)
        await loop.sock_sendall(self.sock, encode_request(self._request))
        raw = await self._receive(ANSWER_HEAD_BYTES)
        return decode_answer(raw + await self._receive(answer_bytes(raw) - len(raw)))

    async def _receive(self, count: int) -> bytes:
        raw = b""
        while len(raw) < count:
            part = await self._some(count - len(raw))
            assert part, "the server hung up"
            raw += part
        return raw

    async def _some(self, count: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, count)

    async def send(self, raw: bytes) -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, raw)

    async def begin(
        self, method: Method, message: Any, *, call: int = 1, deadline_ms: int = 5000
    ) -> None:
        raw = message.SerializeToString()
        await self.send(calls.encode_request(method, call, deadline_ms, raw))

    async def reply(self) -> calls.Reply:
        while not self._ready:
            part = await self._some(1 << 16)
            assert part, "the server hung up"
            self._ready += self._replies.feed(part)
        return self._ready.pop(0)

    async def call(self, method: Method, message: Any) -> Any:
        await self.begin(method, message)
        reply = await self.reply()
        assert reply.status == calls.OK, calls.decode_refusal(reply.body)
        return calls.MESSAGES[method][1].FromString(reply.body)

    async def refused(self, method: Method, message: Any) -> tuple[int, calls.Refusal]:
        await self.begin(method, message)
        reply = await self.reply()
        assert reply.status != calls.OK
        return reply.status, calls.decode_refusal(reply.body)

    async def hung_up(self) -> bool:
        """Whether the server ends the connection; what it says before is dropped."""
        try:
            while await self._some(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True
