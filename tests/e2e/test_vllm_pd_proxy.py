"""The P/D proxy over vLLM's own OpenAI servers: one prefill and one decode engine.

What an answer must be is what the prefill engine says when it is asked for all of it, under a salt
that keeps its blocks from the decode engine. That one never computes a prompt: it would measure how
fast it does so with this tiny model, and wait for no more than 1.5 times as long for a push.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, hub_config, read_events
from tests.support.kv_oracle import (
    cells,
    corrupt_a_page,
    page_complaints,
    wait_connected,
    wait_for,
)
from tests.support.openai_cases import (
    CHAT,
    COMPLETIONS,
    SHORT,
    TOOLS,
    call,
    cases,
    chat,
    complaints,
    completion,
    joined,
    raw,
    scheduled,
    usage,
)
from tests.support.proxy import ProxyProcess
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, prompt, write_model, write_tokenizer
from tests.support.vllm_server import VllmServer
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

BLOCK = 128
CASES = {name: case for name, case in cases().items() if name in SHORT}


@dataclass
class Cluster:
    way: Way
    hub: ServerProcess
    p: VllmServer
    d: VllmServer
    proxy: ProxyProcess
    alone: dict[str, Any]
    path: Path

    def cells(self, engine: str, kind: str) -> dict[tuple[str, int], str]:
        return cells(read_events(self.path / f"{engine}.jsonl"), kind)

    def lone(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of an engine that has nothing from the hub."""
        return call(self.p.url, path, {**body, "cache_salt": "lone"})

    def scheduled(self, answer: Any, engine: str = "d") -> list[int]:
        """Prompt tokens that an engine computed for an answer."""
        return scheduled(answer, read_events(self.path / f"{engine}.jsonl"))


@pytest.fixture(scope="module")
def cluster(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("proxy")
    model = write_model(path / "model", TINY)
    write_tokenizer(model, TINY)
    engines: list[VllmServer] = []
    with way.serve(path, host_bytes="256MiB") as hub:
        try:
            for name, role in (("p", "kv_producer"), ("d", "kv_consumer")):
                log = path / f"{name}.jsonl"
                more = {**way.settings(hub), **PATIENT}
                config = hub_config(hub.address, role=role, event_log=log, **more)
                engine = VllmServer.launch(model, log_path=path / f"{name}.log", config=config)
                engines.append(engine)
            for name, engine in zip("pd", engines, strict=True):
                engine.wait_ready()
                wait_connected(path / f"{name}.jsonl")
            p, d = engines
            with ProxyProcess([p.url], [d.url], log_path=path / "proxy.log") as proxy:
                cluster = Cluster(way, hub, p, d, proxy, {}, path)
                cluster.alone = {name: cluster.lone(*case) for name, case in CASES.items()}
                assert hub.stats().counters["hits"] == 0
                yield cluster
        finally:
            for engine in engines:
                engine.close()


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> dict[str, Any]:
    return {name: call(cluster.proxy.url, *case) for name, case in CASES.items()}


def test_every_kind_of_answer_is_a_lone_engines(cluster: Cluster, answers: dict[str, Any]) -> None:
    wrong = {name: complaints(got, cluster.alone[name]) for name, got in answers.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_all_of_them_took_both_legs_and_d_pulled_what_p_computed(
    cluster: Cluster, answers: dict[str, Any]
) -> None:
    proxy = cluster.proxy

    def both_legs() -> bool:
        return (proxy.legs("prefill", "done"), proxy.legs("decode", "done")) == (len(CASES),) * 2

    wait_for("two legs a request", both_legs)
    counters = cluster.hub.stats().counters
    assert counters["hits"] >= sum(usage(a)["prompt_tokens"] // BLOCK for a in answers.values())
    for name, answer in answers.items():
        sequences = len(joined(answer)["choices"])
        prompt_tokens = usage(answer)["prompt_tokens"]
        assert cluster.scheduled(cluster.alone[name], "p") == [prompt_tokens] * sequences, name
        assert cluster.scheduled(answer) == [1] * sequences, name
    pushed, pulled = cluster.cells("p", "pushed"), cluster.cells("d", "pulled")
    assert len(pulled) >= len(CASES) * 2 * TINY.kv_heads
    assert page_complaints(pushed, pulled) == []
    assert cluster.cells("d", "pushed") == {}


def test_constraints_are_ds_alone_and_hold(cluster: Cluster, answers: dict[str, Any]) -> None:
    """P ran without the grammar; D's first token, and all after it, are within it."""
    message = answers["JSON schema"]["choices"][0]["message"]
    assert json.loads(message["content"]).keys() == {"ok", "colour", "size"}
    (constrained,) = answers["structured outputs"]["choices"]
    assert len(constrained["text"]) == 16
    assert set(constrained["text"]) <= set("abcd")
    (named,) = answers["named tool"]["choices"]
    (tool,) = named["message"]["tool_calls"]
    assert tool["function"]["name"] == "pick"
    assert json.loads(tool["function"]["arguments"]).keys() == {"ok", "colour", "size"}
    four = {choice["text"] for choice in answers["n=4"]["choices"]}
    assert len(four) == 4


def test_a_stream_reaches_the_client_as_d_wrote_it(cluster: Cluster) -> None:
    stream = raw(cluster.proxy.url, *chat(40, stream=True, ignore_eos=True))
    events = stream.decode().split("\n\n")
    assert len(events) > 4  # it came in pieces, how many tokens each the machine decides
    assert events[-2:] == ["data: [DONE]", ""]


def test_other_requests_go_to_the_decode_engine(cluster: Cluster) -> None:
    body = {"model": "tiny", "prompt": "to be cut into tokens"}
    for url in (cluster.proxy.url, cluster.d.url):
        assert call(url, "/tokenize", body)["count"] > 4


def test_a_request_that_is_wrong_is_refused_in_ds_words(cluster: Cluster) -> None:
    path, body = completion(41, max_tokens=-3)
    with pytest.raises(AssertionError) as through_the_proxy:
        raw(cluster.proxy.url, path, body)
    with pytest.raises(AssertionError) as asked_directly:
        raw(cluster.d.url, path, body)
    assert str(through_the_proxy.value) == str(asked_directly.value)
    assert " 400 " in str(asked_directly.value)


# ---- vLLM's own proxies ---------------------------------------------------------------------


def toy_proxy(p: str, d: str, path: str, request: dict[str, Any], name: str) -> Any:
    """Both legs exactly as vLLM's toy_proxy_server.py sends them."""
    headers = {"Authorization": "Bearer None", "X-Request-Id": name}
    leg = dict(request)
    leg["kv_transfer_params"] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    leg["stream"] = False
    leg["max_tokens"] = 1
    if "max_completion_tokens" in leg:
        leg["max_completion_tokens"] = 1
    leg.pop("stream_options", None)
    leg.pop("min_tokens", None)
    prefilled = call(p, path, leg, **headers)
    params = prefilled.get("kv_transfer_params", {})
    if params:
        request = {**request, "kv_transfer_params": params}
    return call(d, path, request, **headers)


TOY = {
    "completion": completion(50, logprobs=5, return_token_ids=True),
    "streamed completion": completion(
        51, logprobs=3, stream=True, return_token_ids=True, stream_options={"include_usage": True}
    ),
    "chat": chat(52, return_token_ids=True),
    "tools": chat(53, tools=TOOLS, return_token_ids=True),
}


@pytest.mark.parametrize("name", TOY)
def test_vllms_toy_proxy_works_unmodified(cluster: Cluster, name: str) -> None:
    path, body = TOY[name]
    want = cluster.lone(path, body)
    before = len(cluster.cells("d", "pulled"))
    got = toy_proxy(cluster.p.url, cluster.d.url, path, body, f"toy-{name.replace(' ', '-')}")
    assert complaints(got, want) == []
    assert cluster.scheduled(got) == [1]
    assert len(cluster.cells("d", "pulled")) > before


# ---- clients that go away -------------------------------------------------------------------


def _send(cluster: Cluster, path: str, body: dict[str, Any], name: str) -> socket.socket:
    """A client that has sent its request."""
    connection = socket.create_connection(("127.0.0.1", cluster.proxy.port), timeout=30)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def _idle(cluster: Cluster) -> None:
    def idle() -> bool:
        return cluster.proxy.metrics()["kvserver_proxy_running"] == 0

    wait_for("the proxy to be idle", idle)


def test_a_client_gone_during_ps_leg_aborts_it_and_d_hears_nothing(cluster: Cluster) -> None:
    with cluster.p.frozen():
        with _send(cluster, *completion(60), "gone-at-p"):
            cluster.p.wait_log("Received request", "gone-at-p")
        _idle(cluster)
    cluster.p.wait_log("gone-at-p", "aborted")
    assert "gone-at-p" not in cluster.d.log_path.read_text(errors="replace")


def test_a_client_gone_before_ds_first_byte_aborts_ds_leg(cluster: Cluster) -> None:
    with cluster.d.frozen():
        with _send(cluster, *completion(61), "gone-at-d"):
            cluster.d.wait_log("Received request", "gone-at-d")
        _idle(cluster)
    cluster.d.wait_log("gone-at-d", "aborted")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_gone_in_mid_stream_aborts_ds_leg(cluster: Cluster, path: str) -> None:
    make = completion if path == COMPLETIONS else chat
    name = f"gone-in-stream-{make.__name__}"
    target, body = make(62, max_tokens=600, ignore_eos=True, stream=True)
    with _send(cluster, target, body, name) as client:
        head = b""
        while b"data: " not in head:
            head += client.recv(4096)
    _idle(cluster)
    cluster.d.wait_log(name, "aborted")


def test_both_engines_serve_on_after_that(cluster: Cluster) -> None:
    path, body = completion(63, logprobs=5, return_token_ids=True)
    want = cluster.lone(path, body)
    got = call(cluster.proxy.url, path, body)
    assert complaints(got, want) == []
    assert cluster.scheduled(got) == [1]


# ---- the oracle -----------------------------------------------------------------------------


def test_the_oracle_sees_one_corrupted_page(cluster: Cluster) -> None:
    ids = prompt(70, 400)
    path, body = completion(70, prompt=ids, logprobs=5, return_token_ids=True)
    want = cluster.lone(path, body)
    assert complaints(call(cluster.proxy.url, path, body), want) == []
    hashes = prefix_hashes(ids, BLOCK)
    with cluster.way.blocking(cluster.hub) as client:
        corrupt_a_page(client, hashes)
    got = call(cluster.proxy.url, path, body)
    assert cluster.scheduled(got) == [1]
    assert complaints(got, want) != []
    names = {digest.hex() for digest in hashes}
    pulled = {k: v for k, v in cluster.cells("d", "pulled").items() if k[0] in names}
    assert len(page_complaints(cluster.cells("p", "pushed"), pulled)) == 1
