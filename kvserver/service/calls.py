"""What surrounds every handler: error mapping, incidents, and one measurement.

Rule 1: a handler raises CoreError or FieldError and knows no gRPC status.
Rule 2: any other exception is a bug of ours: INTERNAL with an incident's number, which the log
line carries too. It never ends the server.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, Self

import grpc

from kvproto.errors import FieldError
from kvserver.core.errors import CoreError
from kvserver.service.convert import Status, limit_error, status_of


class Meter(Protocol):
    """Counts calls and their seconds (`kvserver.observe.metrics`)."""

    def observe(self, rpc: str, seconds: float, code: str) -> None: ...


class Incidents:
    """Logs what must not happen, each under a number that the caller gets to see."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.count = 0

    def report(self, where: str, error: BaseException) -> str:
        self.count += 1
        incident = secrets.token_hex(4)
        self._log.error(
            "incident",
            exc_info=(type(error), error, error.__traceback__),
            extra={"fields": {"incident": incident, "where": where, "error": repr(error)}},
        )
        return incident


class Gate:
    """Bounds how many calls run at once. Heartbeats and goodbyes pass: they free things. Streams
    that stay open for a session's life have bounds of their own, and are not counted.
    """

    FREE = frozenset({"Heartbeat", "Goodbye", "Release", "Abort", "Fence", "Settle"})
    STANDING = frozenset({"Watch", "Orders"})

    def __init__(self, rpcs_max: int) -> None:
        self.rpcs_max = rpcs_max
        self.running = 0

    def enter(self, rpc: str) -> None:
        if self.running >= self.rpcs_max and rpc not in self.FREE:
            raise limit_error("rpcs_max", f"{self.running + 1} calls at once", self.rpcs_max)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1


class Servicer:
    """Base of the servicers: what the wrappers below need."""

    def __init__(self, *, meter: Meter, incidents: Incidents, gate: Gate) -> None:
        self.meter = meter
        self.incidents = incidents
        self.gate = gate

    def status(self, rpc: str, error: Exception) -> Status:
        """What the client is told of an exception; a bug of ours is logged as an incident."""
        if isinstance(error, CoreError | FieldError):
            return status_of(error)
        incident = self.incidents.report(rpc, error)
        return grpc.StatusCode.INTERNAL, f"internal error, incident {incident}", ()


Unary = Callable[[Any, Any, Any], Awaitable[Any]]
Streaming = Callable[[Any, Any, Any], AsyncIterator[Any]]


def unary(method: Unary) -> Unary:
    """Wraps a unary handler."""
    rpc = method.__name__

    @functools.wraps(method)
    async def handler(self: Servicer, request: Any, context: Any) -> Any:
        with _Call(self, rpc) as call:
            try:
                call.enter()
                return await method(self, request, context)
            except Exception as error:
                status = call.failed(error)
            return await context.abort(*status)

    return handler


def streaming(method: Streaming) -> Streaming:
    """Wraps a handler that yields replies. It is closed when the client goes away."""
    rpc = method.__name__

    @functools.wraps(method)
    async def handler(self: Servicer, request: Any, context: Any) -> AsyncIterator[Any]:
        with _Call(self, rpc) as call:
            try:
                call.enter()
                async with contextlib.aclosing(_generator(method(self, request, context))) as all_:
                    async for reply in all_:
                        yield reply
                return
            except Exception as error:
                status = call.failed(error)
            await context.abort(*status)

    return handler


def _generator(replies: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    assert isinstance(replies, AsyncGenerator)
    return replies


class _Call:
    """One running call: its place at the gate, its time and its outcome."""

    def __init__(self, servicer: Servicer, rpc: str) -> None:
        self._servicer = servicer
        self._rpc = rpc
        self._entered = False
        self._code = ""
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def enter(self) -> None:
        if self._rpc not in Gate.STANDING:
            self._servicer.gate.enter(self._rpc)
            self._entered = True

    def failed(self, error: Exception) -> Status:
        status = self._servicer.status(self._rpc, error)
        self._code = status[0].name
        return status

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._entered:
            self._servicer.gate.leave()
        code = self._code or ("OK" if kind is None else "CANCELLED")
        self._servicer.meter.observe(self._rpc, time.perf_counter() - self._started, code)
