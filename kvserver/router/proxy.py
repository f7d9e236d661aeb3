"""The P/D proxy: what happens to a request.

    /v1/completions, /v1/chat/completions   P's leg, then D's with what P returned
    /healthz, /metrics                      the proxy's own
    everything else                         to a decode engine, unchanged

Rule 1: P never decides about a request. Refused, late, broken or absent: D goes alone.
Rule 2: D's answer is passed on byte for byte, as it comes; nothing of it is read.
Rule 3: a client that goes away ends the leg that runs for it (its task is cancelled, and with it
the connection to the engine). An answer that breaks off ends the client's connection, so that it
cannot be taken for a whole one.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from kvserver.observe import logs
from kvserver.observe.proxy import CONTENT_TYPE
from kvserver.router import legs
from kvserver.router.engines import Engines, Leg
from kvserver.router.errors import ProxyError, over
from kvserver.router.intake import Door, Intake, Share
from kvserver.router.settings import ProxySettings

CLIENT_GONE = "client_gone"
NAME_CHARS_MAX = 128  # of a request, in logs
log = logs.get_logger("proxy")


class Proxy:
    """The handler of all requests."""

    def __init__(self, settings: ProxySettings, engines: Engines) -> None:
        self._settings = settings
        self._engines = engines
        self._metrics = engines.metrics
        self.intake = Intake(settings)
        self.door: Door | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request; the response is complete when this returns."""
        assert self.door is not None
        with self.door.busy(request.protocol):
            if request.path == "/healthz":
                return self._health()
            if request.path == "/metrics":
                headers = {"Content-Type": CONTENT_TYPE}
                return web.Response(body=self._metrics.render(), headers=headers)
            return await self._forward(request)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        call = _Call(request)
        outcome = CLIENT_GONE
        try:
            with self.intake.request() as share, self._metrics.running.track_inprogress():
                async with asyncio.timeout(self._settings.request_ms / 1000):
                    await self._serve(call, share)
            outcome = "passed"
        except TimeoutError:
            limit = self._settings.request_ms
            error = over("request_ms", limit, "the request took too long", status=504)
            outcome = error.code
            self._fail(call, error)
        except ProxyError as error:
            outcome = error.code
            self._fail(call, error)
        except Exception:
            outcome = "internal"
            logs.event(log, "internal_error", logging.ERROR, request=call.name)
            self._fail(call, ProxyError(500, outcome, "the proxy failed; its log says how"))
        finally:
            self._metrics.requests.labels(outcome).inc()
            self._tell(call, outcome)
        assert call.response is not None
        return call.response

    def _health(self) -> web.Response:
        if self.intake.draining:
            return web.Response(status=503, text="draining\n")
        if not self._engines.decode.has_up():
            return web.Response(status=503, text="no decode engine is up\n")
        return web.Response(text="ok\n")

    def _fail(self, call: _Call, error: ProxyError) -> None:
        if call.started:
            call.cut()
        else:
            call.answer(error, close=self.intake.draining)

    def _tell(self, call: _Call, outcome: str) -> None:
        level = logging.DEBUG if outcome in ("passed", CLIENT_GONE) else logging.WARNING
        logs.event(
            log,
            "request",
            level,
            outcome=outcome,
            method=call.request.method,
            path=call.request.path,
            status=call.response.status if call.response is not None else 0,
            alone=call.alone,
            seconds=round(time.monotonic() - call.began, 3),
            request=call.name,
        )

    async def _serve(self, call: _Call, share: Share) -> None:
        request = call.request
        body = await self.intake.body(request, share)
        target = request.rel_url.raw_path_qs
        if not target.startswith("/"):
            raise ProxyError(400, "invalid_target", "the request's target must be a path")
        headers = legs.forwarded(request.headers.items(), request.headers.get("Connection", ""))
        leg = Leg(request.method, target, headers, body, call.name)
        if request.method == "POST" and request.path in legs.TWO_LEGS:
            leg = await self._prefilled(call, leg)
        await self._relay(call, leg)

    async def _prefilled(self, call: _Call, leg: Leg) -> Leg:
        """D's leg: as it came, or with what P returned for it."""
        path = call.request.path
        parsed = legs.parse(leg.body)
        call.alone = legs.why_alone(parsed, path, self._settings.prompt_tokens_min)
        if not call.alone and not self._engines.prefill.has_up():
            call.alone = "no_prefill"
        if call.alone:
            self._metrics.alone.labels(call.alone).inc()
            return leg
        headers = [*leg.headers]
        if "X-Request-Id" not in call.request.headers:
            call.name = str(parsed.get("request_id") or uuid.uuid4().hex)[:NAME_CHARS_MAX]
            if "request_id" not in parsed:
                headers.append(("X-Request-Id", call.name))
        prefill = Leg(
            "POST",
            leg.target,
            legs.for_prefill(headers),
            legs.encode(legs.prefill_request(parsed, path)),
            call.name,
        )
        params = await self._engines.run_prefill(prefill)
        decode = legs.encode(legs.decode_request(parsed, params)) if params else leg.body
        return Leg(leg.method, leg.target, headers, decode, call.name)

    async def _relay(self, call: _Call, leg: Leg) -> None:
        """Pass D's answer on."""
        async with self._engines.open_decode(leg) as answer:
            self._metrics.first_byte_seconds.observe(time.monotonic() - call.began)
            response = call.begin(answer, close=self.intake.draining)
            await self._to_client(response.prepare(call.request))
            async for part in answer.content.iter_any():
                await self._to_client(response.write(part))
        await self._to_client(response.write_eof())

    async def _to_client(self, sending: Awaitable[object]) -> None:
        """Wait until the client has taken what is sent, so that an engine is never read faster."""
        limit = self._settings.client_stall_ms
        try:
            async with asyncio.timeout(limit / 1000):
                await sending
        except TimeoutError:
            text = "the client does not take its answer"
            raise over("client_stall_ms", limit, text, status=504) from None
        except ConnectionError as error:
            raise ProxyError(499, CLIENT_GONE, str(error)) from None


class _Call:
    """One request and what has become of it."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self.began = time.monotonic()
        self.name = request.headers.get("X-Request-Id", "")[:NAME_CHARS_MAX]
        self.alone = ""
        self.response: web.StreamResponse | None = None

    @property
    def started(self) -> bool:
        return self.response is not None and self.response.prepared

    def begin(self, answer: aiohttp.ClientResponse, *, close: bool) -> web.StreamResponse:
        """The head of an engine's answer as the head of ours."""
        named = answer.headers.get("Connection", "")
        headers: CIMultiDict[str] = CIMultiDict(legs.forwarded(answer.headers.items(), named))
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if (length := answer.headers.get("Content-Length")) is not None:
            response.content_length = int(length)
        if close:
            response.force_close()
        self.response = response
        return response

    def answer(self, error: ProxyError, *, close: bool) -> None:
        headers: dict[str, Any] = {"Content-Type": "application/json", **error.headers}
        self.response = web.Response(status=error.status, body=error.body(), headers=headers)
        if close or error.status in (408, 413):  # the rest of its body is not waited for
            self.response.force_close()

    def cut(self) -> None:
        """End the connection at once; the client sees that its answer is not whole."""
        if self.request.transport is not None:
            self.request.transport.abort()
        if self.response is None:
            self.response = web.Response(status=502)
