"""`kvserver pd-proxy` as a process: its ready line, its logs, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.contract.proxy.conftest import CHAT, COMPLETION
from tests.support.http_engine import HttpEngine
from tests.support.server import free_port


class Process:
    """One proxy process; its log is JSON lines on standard error."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[dict[str, Any]] = []

    async def wait_event(self, name: str) -> dict[str, Any]:
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while True:
                line = await self.process.stderr.readline()
                assert line, f"ended before {name}: {self.lines}"
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == name:
                    return self.lines[-1]

    async def end(self) -> int:
        """The exit status, after all that it still has to say."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while line := await self.process.stderr.readline():
                self.lines.append(json.loads(line))
            return await self.process.wait()


@pytest.fixture
async def launch() -> AsyncIterator[Callable[..., Any]]:
    """`await launch(p, d, "--drain-ms", "500")`: a process that is ready."""
    started: list[asyncio.subprocess.Process] = []

    async def start(p: HttpEngine, d: HttpEngine, *options: str) -> Process:
        port = free_port()
        words = ["pd-proxy", f"--listen=127.0.0.1:{port}", f"--prefill={p.url}"]
        words += [f"--decode={d.url}", *options]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvserver", *words, stderr=asyncio.subprocess.PIPE
        )
        started.append(process)
        proxy = Process(process, port)
        await proxy.wait_event("ready")
        return proxy

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _stream(gate: asyncio.Event):
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        await gate.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    return stream


async def test_sigterm_lets_running_requests_end_and_takes_no_new_ones(engine, launch) -> None:
    p, d = await engine(), await engine()
    gate = asyncio.Event()
    d.answer = _stream(gate)
    proxy = await launch(p, d)
    async with (
        aiohttp.ClientSession() as session,
        session.post(proxy.url + "/v1/chat/completions", json=CHAT) as response,
    ):
        assert await response.content.readuntil(b"\n\n") == b"data: first\n\n"
        proxy.process.send_signal(signal.SIGTERM)
        stopping = await proxy.wait_event("stopping")
        assert stopping["running"] == 1
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(proxy.url + "/healthz")
        gate.set()
        assert await response.content.read() == b"data: [DONE]\n\n"
    assert await proxy.end() == 0
    assert proxy.lines[-1]["event"] == "stopped"


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_a_drain_ends(engine, launch, how: str) -> None:
    p, d = await engine(), await engine()
    d.answer = _stream(asyncio.Event())
    proxy = await launch(p, d, "--drain-ms", "300" if how == "deadline" else "60000")
    async with (
        aiohttp.ClientSession() as session,
        session.post(proxy.url + "/v1/chat/completions", json=CHAT) as response,
    ):
        await response.content.readuntil(b"\n\n")
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.wait_event("stopping")
        if how != "deadline":
            proxy.process.send_signal(signal.SIGINT)
        with pytest.raises(aiohttp.ClientPayloadError):  # cut, and seen to be cut
            await response.content.read()
    await d.wait_gone()
    assert await proxy.end() == 0


async def test_an_idle_connection_is_closed_by_a_drain(engine, launch) -> None:
    p, d = await engine(), await engine()
    gate = asyncio.Event()
    d.answer = _stream(gate)
    proxy = await launch(p, d)
    port = int(proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await reader.readuntil(b"ok\n")
    async with (
        aiohttp.ClientSession() as session,
        session.post(proxy.url + "/v1/chat/completions", json=CHAT) as response,
    ):
        await response.content.readuntil(b"\n\n")
        proxy.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        gate.set()
        await response.read()
    writer.close()
    assert await proxy.end() == 0


async def test_logs_tell_who_failed_and_never_what_was_asked(engine, launch) -> None:
    p, d = await engine(), await engine()
    await p.stop()
    proxy = await launch(p, d, "--log-level=debug", "--prompt-tokens-min=0")
    secret = {**COMPLETION, "prompt": "secret prompt", "user": "secret user"}
    headers = {"Authorization": "Bearer secret key", "X-Request-Id": "r-17"}
    async with aiohttp.ClientSession(headers=headers) as session:
        url = proxy.url + "/v1/completions?token=secret"
        async with session.post(url, json=secret) as response:
            assert response.status == 200
    proxy.process.send_signal(signal.SIGTERM)
    assert await proxy.end() == 0
    events = {line["event"]: line for line in proxy.lines}
    assert events["engine_down"]["engine"] == p.url
    assert events["prefill_failed"].items() >= {"outcome": "unreachable", "request": "r-17"}.items()
    assert events["request"].items() >= {"outcome": "passed", "status": 200}.items()
    assert "secret" not in json.dumps(proxy.lines)


async def test_two_on_one_address_are_refused(engine, launch, tmp_path: Path) -> None:
    p, d = await engine(), await engine()
    proxy = await launch(p, d)
    listen = proxy.url.removeprefix("http://")
    words = ["pd-proxy", f"--listen={listen}", f"--prefill={p.url}", f"--decode={d.url}"]
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvserver", *words, stderr=asyncio.subprocess.PIPE
    )
    _, told = await asyncio.wait_for(second.communicate(), 20)
    assert second.returncode == 1
    assert told.decode().startswith(f"kvserver: listen: {listen}: ")
