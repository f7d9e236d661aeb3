"""A proxy in this process, over engines that the test answers for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from kvserver.router.app import ProxyServer
from kvserver.router.settings import ProxySettings
from tests.support.http_engine import HttpEngine

PARAMS = {"do_remote_prefill": True, "do_remote_decode": False, "chain": "ab" * 32}
LONG = "x" * 4096
COMPLETION = {"model": "m", "prompt": LONG, "max_tokens": 5, "seed": 7}
CHAT = {"model": "m", "messages": [{"role": "user", "content": LONG}], "stream": True}


class Rig:
    """The proxy, a client of it, and the engines behind."""

    def __init__(self, server: ProxyServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    @property
    def url(self) -> str:
        return f"http://{self.server.address}"

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    def post(self, path: str, body: object, **options: Any) -> Any:
        return self.session.post(self.url + path, data=json.dumps(body), **options)

    async def metrics(self) -> dict[str, float]:
        """`name{labels}` -> value."""
        async with self.session.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `condition` holds; TimeoutError after ten seconds."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.01)


Start = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def engine() -> AsyncIterator[Callable[[], Awaitable[HttpEngine]]]:
    """Starts engines that end with the test."""
    async with AsyncExitStack() as stack:

        async def start() -> HttpEngine:
            return await stack.enter_async_context(HttpEngine())

        yield start


@pytest.fixture
async def proxy() -> AsyncIterator[Start]:
    """`await proxy(prefill=[...], decode=[...], **options)`: a running proxy with a client."""
    async with AsyncExitStack() as stack:

        async def start(prefill: list[HttpEngine], decode: list[HttpEngine], **options: Any) -> Rig:
            server = ProxyServer(
                ProxySettings(
                    listen="127.0.0.1:0",
                    prefill=tuple(engine.url for engine in prefill),
                    decode=tuple(engine.url for engine in decode),
                    **options,
                )
            )
            await server.start()
            stack.push_async_callback(server.close)
            timeout = aiohttp.ClientTimeout(total=20)
            session = aiohttp.ClientSession(
                timeout=timeout, headers={"Content-Type": "application/json"}
            )
            await stack.enter_async_context(session)
            return Rig(server, session)

        yield start
