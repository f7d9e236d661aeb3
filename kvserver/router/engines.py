"""The proxy as a client of engines: one leg at a time, and the watch over who is well.

Rule 1: a leg has a connection of its own, closed when the leg ends before its answer did. That is
how an engine learns that nobody waits any more; and no engine's idle time-out can meet a request.
Rule 2: a leg that could not be sent goes to the next engine; one that an engine has taken does
not, for a request that ends one engine might end them all.
Rule 3: an engine is blamed for what is its fault: no connection, no answer in time, 502 to 504.
Never for 4xx, nor for a client that went away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from kvserver.observe import logs
from kvserver.observe.proxy import ProxyMetrics
from kvserver.router.errors import ProxyError
from kvserver.router.legs import params_of
from kvserver.router.pool import Engine, Pool
from kvserver.router.settings import ProxySettings

PREFILL_REPLY_BYTES_MAX = 4 << 20
NOT_TAKEN = 503  # the engine (or what stands before it) has not begun with the request
# A 500 may be the request's own doing; whether the engine survived it, /health will tell.
UNWELL = frozenset({502, NOT_TAKEN, 504})
Part = Literal["prefill", "decode"]
PREFILL: Final = "prefill"
DECODE: Final = "decode"
log = logs.get_logger("proxy")

# No connection came about, so the engine has not seen the request.
_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


@dataclass(frozen=True)
class Leg:
    """One request to an engine: what goes out."""

    method: str
    target: str  # path and query, as the client wrote them
    headers: Sequence[tuple[str, str]]
    body: bytes = field(repr=False)
    name: str = ""  # of the request, in logs


class Engines:
    """Both pools, and the connections to them. Use as an asynchronous context."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        pause = {
            "backoff_s": settings.backoff_ms / 1000,
            "backoff_s_max": settings.backoff_ms_max / 1000,
        }
        self.prefill = Pool(settings.prefill, **pause)
        self.decode = Pool(settings.decode, **pause)
        self.metrics = ProxyMetrics(self._states)
        self._session: aiohttp.ClientSession
        self._probes: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Engines:
        settings = self._settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=settings.connect_ms / 1000,
                sock_read=settings.decode_silence_ms / 1000,
                ceil_threshold=60,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        self._probes = [
            asyncio.create_task(self._watch(part, engine))
            for part in (PREFILL, DECODE)
            for engine in self._pool(part).engines
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        await self._session.close()

    def _pool(self, part: Part) -> Pool:
        return self.prefill if part == PREFILL else self.decode

    def _states(self) -> list[tuple[str, str, bool, int]]:
        return [
            (part, engine.url, engine.up, engine.outstanding)
            for part in (PREFILL, DECODE)
            for engine in self._pool(part).engines
        ]

    # ---- the legs --------------------------------------------------------------------------

    async def run_prefill(self, leg: Leg) -> dict[str, Any]:
        """The kv_transfer_params that a P returned; empty when none did within `prefill_ms`, for
        whatever reason. Nothing but cancellation is raised."""
        deadline = asyncio.get_running_loop().time() + self._settings.prefill_ms / 1000
        tried: list[Engine] = []
        while (engine := self.prefill.choose(besides=tried)) is not None:
            tried.append(engine)
            started = time.monotonic()
            with self._account(PREFILL, engine) as account:
                try:
                    async with asyncio.timeout_at(deadline):
                        account.outcome, params = await self._prefill_at(engine, leg)
                except TimeoutError:
                    account.outcome = "late"
                    self._blame(PREFILL, engine, f"prefill_ms = {self._settings.prefill_ms}")
            seconds = time.monotonic() - started
            if account.outcome == "done":
                self.metrics.prefill_seconds.observe(seconds)
                return params
            logs.event(
                log,
                "prefill_failed",
                logging.WARNING,
                engine=engine.url,
                outcome=account.outcome,
                seconds=round(seconds, 3),
                request=leg.name,
            )
            if account.outcome not in ("unreachable", "not_taken"):
                break
        return {}

    async def _prefill_at(self, engine: Engine, leg: Leg) -> tuple[str, dict[str, Any]]:
        try:
            async with self._send(engine, leg) as response:
                reply = await _read_at_most(response, PREFILL_REPLY_BYTES_MAX)
        except _NOT_SENT as error:
            self._blame(PREFILL, engine, _reason(error))
            return "unreachable", {}
        except (aiohttp.ClientError, OSError) as error:
            self._blame(PREFILL, engine, _reason(error))
            return "broken", {}
        outcome = self._judge(PREFILL, engine, response.status)
        return outcome, params_of(reply) if outcome == "done" else {}

    @contextlib.asynccontextmanager
    async def open_decode(self, leg: Leg) -> AsyncIterator[aiohttp.ClientResponse]:
        """D's answer to this leg, its body still to be read. ProxyError when none answers, or when
        the answer breaks off."""
        tried: list[Engine] = []
        while (engine := self.decode.choose(besides=tried, desperate=not tried)) is not None:
            tried.append(engine)
            with self._account(DECODE, engine) as account:
                try:
                    async with self._send(engine, leg) as response:
                        outcome = self._judge(DECODE, engine, response.status)
                        if outcome == "not_taken" and self.decode.has_up(besides=tried):
                            account.outcome = outcome
                            continue
                        yield response
                        account.outcome = outcome
                        return
                except _NOT_SENT as error:
                    account.outcome = "unreachable"
                    self._blame(DECODE, engine, _reason(error))
                except TimeoutError:
                    account.outcome, limit = "late", self._settings.decode_silence_ms
                    self._blame(DECODE, engine, f"decode_silence_ms = {limit}")
                    text = f"the decode engine sent nothing (limit decode_silence_ms = {limit})"
                    raise ProxyError(504, "decode_silence_ms", text) from None
                except (aiohttp.ClientError, OSError) as error:
                    account.outcome = "broken"
                    self._blame(DECODE, engine, _reason(error))
                    text = "the decode engine closed the connection without an answer"
                    raise ProxyError(502, "decode_broken", text) from None
        text = f"no decode engine can be reached; tried {len(tried)} of {len(self.decode.engines)}"
        raise ProxyError(502, "decode_unreachable", text)

    def _send(self, engine: Engine, leg: Leg) -> Any:
        """The request as a context whose value is the response, headers read."""
        return self._session.request(
            leg.method,
            URL(engine.url + leg.target, encoded=True),
            headers=CIMultiDict(leg.headers),
            data=leg.body or None,
            allow_redirects=False,
        )

    @contextlib.contextmanager
    def _account(self, part: Part, engine: Engine) -> Iterator[_Account]:
        account = _Account()
        try:
            yield account
        finally:
            self._pool(part).done(engine)
            self.metrics.legs.labels(part, engine.url, account.outcome).inc()

    # ---- who is well -------------------------------------------------------------------------

    def _judge(self, part: Part, engine: Engine, status: int) -> str:
        """The outcome of a leg that was answered with `status`."""
        if status in UNWELL:
            self._blame(part, engine, f"status {status}")
            return "not_taken" if status == NOT_TAKEN else "error"
        if self._pool(part).succeeded(engine):
            logs.event(log, "engine_up", part=part, engine=engine.url)
        return "done" if status < 400 else "refused" if status < 500 else "error"

    def _blame(self, part: Part, engine: Engine, reason: str) -> None:
        if self._pool(part).failed(engine, time.monotonic()):
            self._tell_down(part, engine, reason)

    def _tell_down(self, part: Part, engine: Engine, reason: str) -> None:
        pause_ms = round(1000 * (engine.retry_at - time.monotonic()))
        logs.event(
            log,
            "engine_down",
            logging.WARNING,
            part=part,
            engine=engine.url,
            reason=reason,
            pause_ms=pause_ms,
        )

    async def _watch(self, part: Part, engine: Engine) -> None:
        """Ask one engine's /health for ever."""
        pool, interval_s = self._pool(part), self._settings.probe_ms / 1000
        while True:
            await asyncio.sleep(pool.probe_in_s(engine, time.monotonic(), interval_s))
            reason = await self._probe(engine)
            if pool.probed(engine, time.monotonic(), well=not reason):
                if engine.up:
                    logs.event(log, "engine_up", part=part, engine=engine.url)
                else:
                    self._tell_down(part, engine, reason)

    async def _probe(self, engine: Engine) -> str:
        """Why the engine is not well; empty when it is."""
        try:
            async with (
                asyncio.timeout(self._settings.connect_ms / 1000),
                self._session.get(URL(engine.url + "/health", encoded=True)) as response,
            ):
                return "" if response.status < 500 else f"/health says {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return _reason(error)


@dataclass
class _Account:
    """How a leg ended; as long as nobody says, whoever waited for it has gone."""

    outcome: str = "cancelled"


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body; of one beyond `limit`, nothing."""
    parts, left = [], limit
    async for part in response.content.iter_any():
        left -= len(part)
        if left < 0:
            return b""
        parts.append(part)
    return b"".join(parts)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
