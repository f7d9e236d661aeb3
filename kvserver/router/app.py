"""Lifecycle of one proxy process.

    start: signals -> engines' probes -> port -> ready
    stop:  no new requests -> running ones end, within `drain_ms` -> the rest is cut

Rule: SIGTERM and SIGINT drain; a second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from aiohttp import web

import kvserver
from kvserver.observe import logs
from kvserver.router.engines import Engines
from kvserver.router.intake import Door
from kvserver.router.proxy import Proxy
from kvserver.router.settings import ProxySettings

KEEPALIVE_S = 75.0
LINGER_S = 2.0  # for the rest of a request that was refused while it came
CUT_S = 0.2  # what cancelled requests have left to end
log = logs.get_logger("proxy")


class StartError(Exception):
    """The proxy cannot start; the message says what is in the way."""


async def run(settings: ProxySettings) -> int:
    """Serve until a signal; the process's exit status. StartError when it cannot start."""
    logs.configure(level=settings.log_level, style=settings.log_format)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = ProxyServer(settings)
    await server.start()
    await stopping.wait()
    stopping.clear()
    logs.event(log, "stopping", drain_ms=settings.drain_ms, running=server.proxy.intake.running)
    again = loop.create_task(stopping.wait())
    await server.drain(until=again)
    again.cancel()
    await server.close()
    logs.event(log, "stopped")
    return 0


class ProxyServer:
    """One proxy. `start` once, then `drain` and `close`; `close` alone is an abrupt end."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.engines = Engines(settings)
        self.proxy = Proxy(settings, self.engines)
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Serve from now on. StartError when the address cannot be had."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.proxy.handle)
        options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,  # a body goes on as it came
            "handler_cancellation": True,
            "keepalive_timeout": KEEPALIVE_S,
            "lingering_time": LINGER_S,
        }
        runner = web.AppRunner(app, shutdown_timeout=CUT_S, **options)
        await runner.setup()
        assert runner.server is not None
        self.proxy.door = Door(runner.server, self._settings)
        host, _, port = self._settings.listen.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(
                self.proxy.door, host.strip("[]"), int(port), backlog=1024
            )
        except OSError as error:
            await runner.cleanup()
            raise StartError(f"listen: {self._settings.listen}: {error.strerror}") from error
        self._runner = runner
        self._watch = asyncio.create_task(self.proxy.door.watch())
        self.address = f"{host}:{self._listener.sockets[0].getsockname()[1]}"
        await self.engines.__aenter__()
        logs.event(
            log,
            "ready",
            listen=self.address,
            prefill=list(self._settings.prefill),
            decode=list(self._settings.decode),
            pid=os.getpid(),
            version=kvserver.__version__,
        )

    async def drain(self, *, until: asyncio.Future[Any]) -> None:
        """Take no new requests, and wait for those that run: at most `drain_ms`, and not beyond
        `until`."""
        assert self._listener is not None
        assert self.proxy.door is not None
        self.proxy.intake.draining = True
        self._listener.close()
        self.proxy.door.close_idle()
        idle = asyncio.ensure_future(self.proxy.intake.idle.wait())
        await asyncio.wait(
            {idle, until},
            timeout=self._settings.drain_ms / 1000,
            return_when=asyncio.FIRST_COMPLETED,
        )
        idle.cancel()

    async def close(self) -> None:
        """End everything now."""
        if self._watch is not None:
            self._watch.cancel()
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.engines.__aexit__()
