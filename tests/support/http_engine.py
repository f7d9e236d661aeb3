"""An HTTP server that stands where an engine would, and says what it saw.

    async with HttpEngine() as engine:
        engine.answer = answer_json({"choices": []})
        ... a proxy with engine.url ...
        (seen,) = engine.requests

`answer` is a handler of aiohttp; each request is recorded before it runs, and `gone` counts those
whose client went away while it ran. /health is answered 200 unless `well` is false.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from tests.support.server import free_port

WAIT_S = 10.0
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def answer_json(body: object, *, status: int = 200) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return answer


def answer_bytes(*parts: bytes, content_type: str = "text/event-stream") -> Answer:
    """Each part as a chunk of its own."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    return answer


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class HttpEngine:
    """One such server, on a port that it keeps when it is stopped and started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.answer: Answer = answer_json({"kv_transfer_params": None})
        self.requests: list[Seen] = []
        self.gone = 0
        self.well = True
        self._runner: web.AppRunner | None = None
        self._changed = asyncio.Condition()

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health" and "X-From-Client" not in request.headers:
            return web.Response(status=200 if self.well else 503)
        body = await request.read()
        seen = Seen(request.method, request.raw_path, request.headers.copy(), body)
        await self._note(lambda: self.requests.append(seen))
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._note(self._one_gone)))
            raise

    def _one_gone(self) -> None:
        self.gone += 1

    async def _note(self, change: Callable[[], object]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    async def wait_requests(self, count: int) -> None:
        await self._wait(lambda: len(self.requests) >= count)

    async def wait_gone(self, count: int = 1) -> None:
        await self._wait(lambda: self.gone >= count)

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)
