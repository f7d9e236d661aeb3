"""What engines receive and what a client gets back, when all goes well."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from aiohttp import web

from tests.contract.proxy.conftest import CHAT, COMPLETION, LONG, PARAMS, eventually
from tests.support.http_engine import answer_bytes, answer_json


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
)
async def test_p_prefills_and_d_answers_with_what_p_returned(engine, proxy, path, body) -> None:
    p, d = await engine(), await engine()
    p.answer = answer_json({"choices": [{"text": "wrong"}], "kv_transfer_params": PARAMS})
    d.answer = answer_json({"choices": [{"text": "right"}]})
    rig = await proxy([p], [d])
    async with rig.post(path, body, headers={"Authorization": "Bearer k"}) as response:
        assert await response.json() == {"choices": [{"text": "right"}]}
    (to_p,), (to_d,) = p.requests, d.requests
    assert to_p.json["kv_transfer_params"] == {"do_remote_decode": True}
    assert (to_p.json["max_tokens"], to_p.json["stream"], to_p.json["n"]) == (1, False, 1)
    assert to_d.json == {**body, "kv_transfer_params": PARAMS}
    for seen in (to_p, to_d):
        assert (seen.method, seen.target) == ("POST", path)
        assert seen.headers["Authorization"] == "Bearer k"
        assert seen.headers["Content-Type"] == "application/json"
        assert seen.headers["Host"] != f"127.0.0.1:{rig.port}"
    assert to_p.headers["X-Request-Id"] == to_d.headers["X-Request-Id"]


async def test_a_p_that_returns_nothing_leaves_the_request_as_it_came(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])
    text = json.dumps(COMPLETION, indent=3).encode()
    headers = {"X-Request-Id": "mine"}
    async with rig.session.post(f"{rig.url}/v1/completions", data=text, headers=headers):
        pass
    assert len(p.requests) == 1
    assert d.requests[0].body == text
    assert d.requests[0].headers["X-Request-Id"] == "mine"


ODD = (b": ping\r\n\r\n", b'data: {"a": "\xc3', b'\xa9"}\n\n', b"\x00\xff", b"data: [DONE]\n\n")


async def test_a_stream_is_passed_on_byte_for_byte(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = answer_bytes(*ODD)
    rig = await proxy([p], [d])
    async with rig.post("/v1/chat/completions", CHAT) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert await response.read() == b"".join(ODD)


async def test_chunks_come_when_they_are_made(engine, proxy) -> None:
    """D makes a chunk only after the client has the one before it."""
    p, d = await engine(), await engine()
    taken = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(20):
            await response.write(b"data: %d\n\n" % number)
            await asyncio.wait_for(taken.wait(), 10)
            taken.clear()
        return response

    d.answer = answer
    rig = await proxy([p], [d])
    got = []
    async with rig.post("/v1/chat/completions", CHAT) as response:
        async for chunk in response.content.iter_any():
            got.append(chunk)
            taken.set()
    assert got == [b"data: %d\n\n" % number for number in range(20)]


async def test_a_compressed_answer_stays_compressed(engine, proxy) -> None:
    p, d = await engine(), await engine()
    packed = gzip.compress(b"hello")

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip", "X-Own": "1"})

    d.answer = answer
    rig = await proxy([p], [d])
    session = rig.session
    session._auto_decompress = False
    headers = {"Accept-Encoding": "gzip, x"}
    async with rig.post("/v1/completions", COMPLETION, headers=headers) as response:
        assert await response.read() == packed
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Content-Length"] == str(len(packed))
        assert response.headers["X-Own"] == "1"
    assert d.requests[0].headers["Accept-Encoding"] == "gzip, x"
    assert p.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/v1/models", b""),
        ("GET", "/health", b""),
        ("HEAD", "/health", b""),
        ("POST", "/v1/embeddings", b'{"input": "x"}'),
        ("POST", "/tokenize?a=%2Fb&c=%20d", b"\x00\xffno json"),
        ("DELETE", "/v1/responses/a%2Fb", b""),
        ("OPTIONS", "/v1/chat/completions", b""),
        ("POST", "/v1/completions/", b"{}"),
        ("GET", "//elsewhere/x", b""),
    ],
)
async def test_what_a_proxy_does_not_understand_goes_to_d(
    engine, proxy, method: str, target: str, body: bytes
) -> None:
    from yarl import URL

    p, d = await engine(), await engine()
    d.answer = answer_json({"error": "who knows"}, status=418)
    rig = await proxy([p], [d])
    url = URL(rig.url + target, encoded=True)
    headers = {"X-From-Client": "yes", "Content-Type": "x/y", "Accept": "a/b"}
    async with rig.session.request(method, url, data=body or None, headers=headers) as response:
        assert response.status == 418
        assert await response.read() == (b"" if method == "HEAD" else b'{"error": "who knows"}')
    (seen,) = d.requests
    assert (seen.method, seen.target, seen.body) == (method, target, body)
    assert {"X-From-Client": "yes", "Content-Type": "x/y", "Accept": "a/b"}.items() <= dict(
        seen.headers
    ).items()
    assert "X-Request-Id" not in seen.headers
    assert p.requests == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "short"}, "short"),
        ({"prompt": LONG, "kv_transfer_params": {"do_remote_prefill": True}}, "own_params"),
        ({"prompt": LONG, "prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
async def test_what_p_is_of_no_use_to_goes_to_d_alone(engine, proxy, body, reason: str) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])
    async with rig.post("/v1/completions", body) as response:
        assert response.status == 200
    assert p.requests == []
    assert d.requests[0].body == json.dumps(body).encode()
    assert (await rig.metrics())[f'kvserver_proxy_alone_total{{reason="{reason}"}}'] == 1


async def test_requests_go_round_and_to_the_idle(engine, proxy) -> None:
    ps, ds = [await engine() for _ in range(2)], [await engine() for _ in range(2)]
    rig = await proxy(ps, ds)
    for _ in range(8):
        async with rig.post("/v1/completions", COMPLETION) as response:
            assert response.status == 200
    assert [len(e.requests) for e in (*ps, *ds)] == [4, 4, 4, 4]
    held = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await held.wait()
        return web.json_response({})

    busy = ds[0]
    busy.answer = hold
    first = asyncio.create_task(_status(rig))
    second = asyncio.create_task(_status(rig))
    await busy.wait_requests(5)

    async def other_is_idle() -> bool:
        decode = rig.server.engines.decode.engines
        return sorted(engine.outstanding for engine in decode) == [0, 1]

    await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
    await eventually(other_is_idle)
    for _ in range(3):
        assert await _status(rig) == 200
    assert len(busy.requests) == 5
    held.set()
    assert await asyncio.gather(first, second) == [200, 200]


async def _status(rig) -> int:
    async with rig.post("/v1/completions", COMPLETION) as response:
        await response.read()
        return response.status


async def test_metrics_and_health_are_the_proxys_own(engine, proxy) -> None:
    p, d = await engine(), await engine()
    rig = await proxy([p], [d])
    assert await _status(rig) == 200
    async with rig.session.get(rig.url + "/healthz") as response:
        assert (response.status, await response.text()) == (200, "ok\n")
    metrics = await rig.metrics()
    leg = 'kvserver_proxy_legs_total{{engine="{}",leg="{}",outcome="done"}}'
    assert metrics[leg.format(p.url, "prefill")] == 1
    assert metrics[leg.format(d.url, "decode")] == 1
    assert metrics['kvserver_proxy_requests_total{outcome="passed"}'] == 1
    assert metrics["kvserver_proxy_prefill_seconds_count"] == 1
    assert metrics["kvserver_proxy_first_byte_seconds_count"] == 1
    assert metrics["kvserver_proxy_running"] == 0
    assert metrics[f'kvserver_proxy_engine_up{{engine="{p.url}",leg="prefill"}}'] == 1
    assert [len(p.requests), len(d.requests)] == [1, 1]
