"""Engines that are down, slow, refusing or breaking off: P never decides, D has a next one."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest
from aiohttp import web

from tests.contract.proxy.conftest import CHAT, COMPLETION, PARAMS, eventually
from tests.support.http_engine import answer_json, never

PATH = "/v1/completions"
ANSWER = {"choices": [{"text": "from d"}]}


async def _answer(rig) -> object:
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 200
        return await response.json()


async def _leg(rig, engine, leg: str, outcome: str) -> float:
    name = f'kvserver_proxy_legs_total{{engine="{engine.url}",leg="{leg}",outcome="{outcome}"}}'
    return (await rig.metrics()).get(name, 0.0)


async def _breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"half")
    request.transport.abort()
    return response


async def _too_much(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"[" + b"1," * (3 << 20) + b"1]")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (answer_json({"error": {}}, status=400), "refused"),
        (answer_json({"error": {}}, status=401), "refused"),
        (answer_json({"error": {}}, status=429), "refused"),
        (answer_json({"error": {}}, status=500), "error"),
        (answer_json({"error": {}}, status=503), "not_taken"),
        (answer_json(["nonsense"]), "done"),
        (_too_much, "done"),
        (_breaks_off, "broken"),
    ],
)
async def test_whatever_p_says_d_answers_the_request_as_it_came(
    engine, proxy, answer, outcome: str
) -> None:
    p, d = await engine(), await engine()
    p.answer, d.answer = answer, answer_json(ANSWER)
    rig = await proxy([p], [d])
    assert await _answer(rig) == ANSWER
    assert d.requests[0].json == COMPLETION
    assert await _leg(rig, p, "prefill", outcome) == 1


async def test_what_is_wrong_with_a_request_d_says_itself(engine, proxy) -> None:
    """A refusal of P's is not passed on: D refuses too, in words about the client's request."""
    p, d = await engine(), await engine()
    p.answer = answer_json({"error": {"message": "max_tokens 1"}}, status=400)
    d.answer = answer_json({"error": {"message": "max_tokens 5"}}, status=400)
    rig = await proxy([p], [d])
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "max_tokens 5"
    async with rig.session.get(rig.url + "/healthz") as response:
        assert response.status == 200  # neither engine is blamed for a bad request


async def test_a_p_that_is_down_costs_nothing_but_its_prefill(engine, proxy) -> None:
    p, d = await engine(), await engine()
    await p.stop()
    d.answer = answer_json(ANSWER)
    rig = await proxy([p], [d], backoff_ms=60_000, backoff_ms_max=60_000)
    assert await _answer(rig) == ANSWER
    assert await _answer(rig) == ANSWER
    assert await _leg(rig, p, "prefill", "unreachable") == 1  # and then left alone
    assert (await rig.metrics())['kvserver_proxy_alone_total{reason="no_prefill"}'] == 1


@pytest.mark.parametrize("how", ["stopped", "unwell"])
async def test_the_next_p_takes_what_the_first_could_not(engine, proxy, how: str) -> None:
    first, second, d = await engine(), await engine(), await engine()
    if how == "stopped":
        await first.stop()
    first.answer = answer_json({}, status=503)
    second.answer = answer_json({"kv_transfer_params": PARAMS})
    rig = await proxy([first, second], [d])
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 200
    assert d.requests[0].json["kv_transfer_params"] == PARAMS


async def test_a_p_that_is_slow_is_cut_at_its_deadline(engine, proxy) -> None:
    p, d = await engine(), await engine()
    p.answer, d.answer = never, answer_json(ANSWER)
    rig = await proxy([p], [d], prefill_ms=200)
    began = time.monotonic()
    assert await _answer(rig) == ANSWER
    assert 0.2 <= time.monotonic() - began < 10
    await p.wait_gone()  # its leg was cancelled
    assert await _leg(rig, p, "prefill", "late") == 1


async def test_an_engine_that_comes_back_is_used_again(engine, proxy) -> None:
    p, d = await engine(), await engine()
    await p.stop()
    rig = await proxy([p], [d], backoff_ms=20, backoff_ms_max=100, probe_ms=50)
    await _answer(rig)
    await p.start()

    async def is_used() -> bool:
        await _answer(rig)
        return bool(p.requests)

    await eventually(is_used)


async def test_an_engine_that_says_it_is_unwell_gets_no_requests(engine, proxy) -> None:
    p, d, other = await engine(), await engine(), await engine()
    d.well = False
    rig = await proxy([p], [d, other], probe_ms=20, backoff_ms=20)
    up = f'kvserver_proxy_engine_up{{engine="{d.url}",leg="decode"}}'

    async def is_down() -> bool:
        return not (await rig.metrics())[up]

    await eventually(is_down)
    for _ in range(4):
        await _answer(rig)
    assert (len(d.requests), len(other.requests)) == (0, 4)
    d.well = True

    async def is_used() -> bool:
        await _answer(rig)
        return bool(d.requests)

    await eventually(is_used)


async def test_a_d_that_is_down_has_a_next(engine, proxy) -> None:
    p, down, d = await engine(), await engine(), await engine()
    p.answer = answer_json({"kv_transfer_params": PARAMS})
    await down.stop()
    d.answer = answer_json(ANSWER)
    rig = await proxy([p], [down, d])
    assert await _answer(rig) == ANSWER
    assert d.requests[0].json == {**COMPLETION, "kv_transfer_params": PARAMS}
    assert len(p.requests) == 1


async def test_a_d_without_room_has_a_next_and_the_last_ones_word_is_passed_on(
    engine, proxy
) -> None:
    p, full, d = await engine(), await engine(), await engine()
    full.answer, d.answer = answer_json({"busy": 1}, status=503), answer_json(ANSWER)
    rig = await proxy([p], [full, d], backoff_ms=60_000, backoff_ms_max=60_000)
    assert await _answer(rig) == ANSWER
    d.answer = answer_json({"busy": 2}, status=503)
    async with rig.post(PATH, COMPLETION) as response:
        assert (response.status, await response.json()) == (503, {"busy": 2})


async def test_no_d_at_all_is_502(engine, proxy) -> None:
    p, first, second = await engine(), await engine(), await engine()
    await first.stop()
    await second.stop()
    rig = await proxy([p], [first, second], backoff_ms=60_000, backoff_ms_max=60_000)
    for tried in (2, 1):
        async with rig.post(PATH, COMPLETION) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (502, "decode_unreachable")
            assert f"tried {tried} of 2" in error["message"]
            assert str(first.port) not in error["message"]
    async with rig.session.get(rig.url + "/healthz") as response:
        assert response.status == 503


async def test_a_d_that_breaks_off_before_its_answer_is_not_asked_twice(engine, proxy) -> None:
    """It had the request, and may have died of it."""
    p, d, other = await engine(), await engine(), await engine()

    async def dies(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    d.answer = dies
    rig = await proxy([p], [d, other])
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "decode_broken"
    assert (len(d.requests), len(other.requests)) == (1, 0)


@pytest.mark.parametrize("length", [True, False])
async def test_an_answer_that_breaks_off_is_seen_to_break_off(engine, proxy, length: bool) -> None:
    p, d = await engine(), await engine()

    async def chunks(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(0.1)
        request.transport.abort()
        return response

    d.answer = _breaks_off if length else chunks
    rig = await proxy([p], [d])
    async with rig.post("/v1/chat/completions", CHAT) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert await _leg(rig, d, "decode", "broken") == 1


async def test_a_d_that_falls_silent_ends_at_its_deadline(engine, proxy) -> None:
    p, d = await engine(), await engine()
    d.answer = never
    rig = await proxy([p], [d], decode_silence_ms=200)
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 504
        assert "decode_silence_ms = 200" in (await response.json())["error"]["message"]
    await d.wait_gone()


async def test_a_request_ends_at_its_own_deadline(engine, proxy) -> None:
    p, d = await engine(), await engine()
    p.answer = d.answer = never
    rig = await proxy([p], [d], request_ms=800)
    async with rig.post(PATH, COMPLETION) as response:
        assert response.status == 504
        assert "request_ms = 800" in (await response.json())["error"]["message"]
    await p.wait_gone()
    assert d.requests == []


@pytest.mark.parametrize("status", [301, 308])
async def test_redirections_are_the_clients_affair(engine, proxy, status: int) -> None:
    p, d, elsewhere = await engine(), await engine(), await engine()

    async def moved(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": elsewhere.url})

    d.answer = moved
    rig = await proxy([p], [d])
    async with rig.post(PATH, COMPLETION, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (status, elsewhere.url)
    assert elsewhere.requests == []
