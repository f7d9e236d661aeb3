"""Clients that go away, send too much or too slowly, or do not read; and the limits they meet."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.contract.proxy.conftest import CHAT, COMPLETION, LONG, eventually
from tests.support.http_engine import answer_json, never


def _request(body: bytes, *, length: int | None = None, path: str = "/v1/completions") -> bytes:
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + body


async def _open(rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", rig.port)


async def _idle(rig) -> None:
    """Wait until no request runs, and nothing is held for one."""
    intake = rig.server.proxy.intake
    async with asyncio.timeout(10):
        await intake.idle.wait()
    assert (intake.running, intake.bodies_bytes) == (0, 0)
    for pool in (rig.server.engines.prefill, rig.server.engines.decode):
        assert [engine.outstanding for engine in pool.engines] == [0] * len(pool.engines)


# ---- clients that go away ----------------------------------------------------------------------


async def test_a_client_gone_while_p_works_ends_ps_leg_and_starts_no_other(engine, proxy) -> None:
    p, d = await engine(), await engine()
    p.answer = never
    rig = await proxy([p], [d])
    _, writer = await _open(rig)
    writer.write(_request(json.dumps(COMPLETION).encode()))
    await p.wait_requests(1)
    assert p.gone == 0
    writer.close()
    await p.wait_gone()
    await _idle(rig)
    assert d.requests == []
    async with rig.session.get(rig.url + "/healthz") as response:
        assert response.status == 200
    assert rig.server.engines.prefill.has_up()  # the client left, P did nothing wrong


async def test_a_client_gone_before_ds_first_byte_ends_ds_leg(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = never
    rig = await proxy([p], [d])
    _, writer = await _open(rig)
    writer.write(_request(json.dumps(COMPLETION).encode()))
    await d.wait_requests(1)
    writer.close()
    await d.wait_gone()
    await _idle(rig)
    assert p.gone == 0
    assert rig.server.engines.decode.has_up()


async def test_a_client_gone_in_mid_stream_ends_ds_leg(engine, proxy) -> None:
    p, d = await engine(), await engine()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"data: x\n\n")
            await asyncio.sleep(0.01)

    d.answer = stream
    rig = await proxy([p], [d])
    reader, writer = await _open(rig)
    writer.write(_request(json.dumps(CHAT).encode(), path="/v1/chat/completions"))
    await reader.readuntil(b"data: x")
    writer.close()
    await d.wait_gone()
    await _idle(rig)
    assert rig.server.engines.decode.has_up()


async def test_a_client_gone_while_it_sends_reaches_no_engine(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])
    _, writer = await _open(rig)
    writer.write(_request(b'{"prompt": "', length=5000))
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await _idle(rig)
    assert p.requests == d.requests == []


async def test_a_client_that_does_not_read_holds_d_back_and_is_dropped(engine, proxy) -> None:
    p, d = await engine(), await engine()
    written = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)
            written += 65536

    d.answer = flood
    rig = await proxy([p], [d], client_stall_ms=300)
    reader, writer = await _open(rig)
    writer.write(_request(json.dumps(CHAT).encode(), path="/v1/chat/completions"))
    await d.wait_gone()
    await _idle(rig)
    assert written < 32 << 20  # what the kernel's buffers hold, not what D can make
    assert (await rig.metrics())['kvserver_proxy_requests_total{outcome="client_stall_ms"}'] == 1
    writer.close()
    del reader


# ---- limits ------------------------------------------------------------------------------------


async def _error(response) -> tuple[int, str, str]:
    error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert response.headers["Content-Type"] == "application/json"
    return response.status, error["code"], error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_beyond_its_limit_is_refused(engine, proxy, path: str, chunked: bool) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d], body_bytes_max=2048)

    async def parts():
        for _ in range(8):
            yield b"x" * 1024

    body = parts() if chunked else b"x" * 2049
    async with rig.session.post(rig.url + path, data=body) as response:
        status, code, message = await _error(response)
    assert (status, code) == (413, "body_bytes_max")
    assert "limit body_bytes_max = 2048" in message
    await _idle(rig)
    assert p.requests == d.requests == []


async def test_a_body_of_exactly_its_limit_passes(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d], body_bytes_max=2048)
    async with rig.session.post(rig.url + "/v1/embeddings", data=b"x" * 2048) as response:
        assert response.status == 200


async def test_bodies_beyond_their_common_limit_are_refused(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = never
    rig = await proxy([p], [d], body_bytes_max=4096, bodies_bytes_max=6000)
    first = asyncio.create_task(_status(rig, b"x" * 4096))
    await d.wait_requests(1)
    async with rig.session.post(rig.url + "/v1/embeddings", data=b"x" * 2048) as response:
        status, code, _ = await _error(response)
        assert response.headers["Retry-After"] == "1"
    assert (status, code) == (429, "bodies_bytes_max")
    first.cancel()
    await asyncio.wait([first])
    await _idle(rig)


async def _status(rig, body: bytes) -> int:
    async with rig.session.post(rig.url + "/v1/embeddings", data=body) as response:
        return response.status


async def test_requests_beyond_their_limit_are_refused_at_once(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = never
    rig = await proxy([p], [d], requests_max=2)
    held = [asyncio.create_task(_status(rig, b"{}")) for _ in range(2)]
    await d.wait_requests(2)
    async with rig.post("/v1/completions", COMPLETION) as response:
        status, code, message = await _error(response)
    assert (status, code) == (429, "requests_max")
    assert "limit requests_max = 2" in message
    async with rig.session.get(rig.url + "/healthz") as response:
        assert response.status == 200  # what watches it gets through
    for task in held:
        task.cancel()
    await asyncio.wait(held)
    await _idle(rig)


async def test_connections_beyond_their_limit_are_refused_at_once(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d], connections_max=2)
    two = [await _open(rig) for _ in range(2)]
    await asyncio.sleep(0.05)
    reader, writer = await _open(rig)
    answer = await asyncio.wait_for(reader.read(), 10)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["code"] == "connections_max"
    for _, other in (*two, (reader, writer)):
        other.close()

    async def has_room() -> bool:
        return not rig.server._runner.server.connections

    await eventually(has_room)
    assert await _status(rig, b"{}") == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHo"])
async def test_a_silent_connection_is_closed(engine, proxy, sent: bytes) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d], body_ms=200)
    reader, writer = await _open(rig)
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d], body_ms=200)
    reader, writer = await _open(rig)
    writer.write(_request(b'{"prompt": "', length=5000))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"body_ms = 200" in await reader.readuntil(b"}}")
    writer.close()
    await _idle(rig)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff" * 40, b"[" * 100_000])
async def test_garbage_is_refused_in_openais_shape(engine, proxy, body: bytes) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])
    async with rig.session.post(rig.url + "/v1/chat/completions", data=body) as response:
        status, code, _ = await _error(response)
    assert (status, code) == (400, "invalid_json")
    assert p.requests == d.requests == []


async def test_a_bug_of_ours_is_500_in_openais_shape(engine, proxy, monkeypatch) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])

    async def fails(leg) -> dict[str, object]:
        raise ZeroDivisionError

    monkeypatch.setattr(rig.server.engines, "run_prefill", fails)
    async with rig.post("/v1/completions", COMPLETION) as response:
        status, code, message = await _error(response)
    assert (status, code) == (500, "internal")
    assert "ZeroDivision" not in message
    await _idle(rig)


async def test_a_requests_name_is_short_in_logs(engine, proxy, caplog) -> None:
    p, d = await engine(), await engine()
    await p.stop()
    rig = await proxy([p], [d])
    with caplog.at_level("DEBUG", logger="kvserver"):
        body = {**COMPLETION, "request_id": "r" * 5000}
        async with rig.post("/v1/completions", body) as response:
            assert response.status == 200
    names = [r.fields["request"] for r in caplog.records if "request" in r.fields]
    assert names
    assert {len(name) for name in names} == {128}
    assert d.requests[0].json["request_id"] == "r" * 5000


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 100])
async def test_what_is_no_http_ends_its_connection_only(engine, proxy, garbage: bytes) -> None:
    p, d = await engine(), await engine()
    d.answer = answer_json({})
    rig = await proxy([p], [d])
    reader, writer = await _open(rig)
    writer.write(garbage + b"\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer == b"" or answer.startswith(b"HTTP/1.0 400 ") or b" 400 " in answer[:20]
    writer.close()
    assert await _status(rig, b"{}") == 200


async def test_http_1_0_clients_get_their_answer(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = answer_json({"text": "right"})
    rig = await proxy([p], [d])
    reader, writer = await _open(rig)
    body = json.dumps({"prompt": LONG}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.endswith(b'\r\n\r\n{"text": "right"}')
    writer.close()
