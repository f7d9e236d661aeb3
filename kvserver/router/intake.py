"""What the proxy takes in at once: requests, bytes of bodies, connections. Beyond it, refusals.

Rule 1: every refusal is immediate and names the option whose limit was reached.
Rule 2: what was taken is given back when the request ends, in whatever way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from aiohttp import web

from kvserver.router.errors import ProxyError, over
from kvserver.router.settings import ProxySettings

WATCH_S = 1.0


class Intake:
    """The books of what runs."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.running = 0
        self.bodies_bytes = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    @contextlib.contextmanager
    def request(self) -> Iterator[Share]:
        """Room for one request; ProxyError when there is none."""
        if self.draining:
            raise ProxyError(503, "draining", "the proxy is being shut down")
        limit = self._settings.requests_max
        if self.running >= limit:
            raise over("requests_max", limit, "too many requests are running")
        self.running += 1
        self.idle.clear()
        share = Share(self)
        try:
            yield share
        finally:
            self.running -= 1
            self.bodies_bytes -= share.taken_bytes
            if not self.running:
                self.idle.set()

    def take(self, count: int) -> None:
        limit = self._settings.bodies_bytes_max
        if self.bodies_bytes + count > limit:
            raise over("bodies_bytes_max", limit, "the running requests' bodies are too large")
        self.bodies_bytes += count

    async def body(self, request: web.BaseRequest, share: Share) -> bytes:
        """The whole body of a request. ProxyError when it is too large or too slow."""
        settings, parts, read = self._settings, [], 0
        limit = settings.body_bytes_max
        too_large = over("body_bytes_max", limit, "the request's body is too large", status=413)
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            async with asyncio.timeout(settings.body_ms / 1000):
                async for part in request.content.iter_any():
                    read += len(part)
                    if read > limit:
                        raise too_large
                    share.take(len(part))
                    parts.append(part)
        except TimeoutError:
            text = "the request's body did not come in time"
            raise over("body_ms", settings.body_ms, text, status=408) from None
        return b"".join(parts)


class Share:
    """What one request holds of the intake."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.taken_bytes = 0

    def take(self, count: int) -> None:
        self._intake.take(count)
        self.taken_bytes += count


class Door:
    """Makes a protocol for each connection: aiohttp's, or one that only refuses. A connection on
    which no whole request comes within `body_ms` is closed, as long as `watch` runs."""

    def __init__(self, server: web.Server, settings: ProxySettings) -> None:
        self._server = server
        self._connections_max = settings.connections_max
        self._first_request_s = settings.body_ms / 1000
        self._spoke: set[asyncio.BaseProtocol] = set()
        self._busy: set[asyncio.BaseProtocol] = set()

    def __call__(self) -> asyncio.Protocol:
        if len(self._server.connections) >= self._connections_max:
            return _Refusal(self._connections_max)
        return self._server()

    @contextlib.contextmanager
    def busy(self, protocol: asyncio.BaseProtocol) -> Iterator[None]:
        """A request has come on this connection, and is being answered."""
        self._spoke.add(protocol)
        self._busy.add(protocol)
        try:
            yield
        finally:
            self._busy.discard(protocol)

    def close_idle(self) -> None:
        """Close the connections on which no request is being answered."""
        for protocol in self._server.connections:
            if protocol not in self._busy:
                protocol.force_close()

    async def watch(self) -> None:
        """Close silent connections, for ever."""
        loop = asyncio.get_running_loop()
        since: dict[web.RequestHandler, float] = {}
        while True:
            await asyncio.sleep(min(WATCH_S, self._first_request_s))
            live, now = set(self._server.connections), loop.time()
            self._spoke &= live
            since = {p: since.get(p, now) for p in live if p not in self._spoke}
            for protocol, began in since.items():
                if now - began >= self._first_request_s:
                    protocol.force_close()


class _Refusal(asyncio.Protocol):
    def __init__(self, connections_max: int) -> None:
        self._error = over(
            "connections_max", connections_max, "too many connections are open", status=503
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        body = self._error.body()
        head = {**self._error.headers, "Content-Type": "application/json", "Connection": "close"}
        head["Content-Length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body)
        transport.close()
