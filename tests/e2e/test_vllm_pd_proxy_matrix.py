"""The P/D proxy over two prefill and two decode servers: every pair, all at once, and with one
engine of each side killed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import PATIENT, hub_config, read_events
from tests.support.kv_oracle import cells, page_complaints, wait_connected
from tests.support.openai_cases import SETS, call, cases, complaints, joined, scheduled
from tests.support.proxy import ProxyProcess
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, write_model, write_tokenizer
from tests.support.vllm_server import VllmServer
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

# Where a step computes a part only of a seeded request's prompt, vLLM 0.32 dies on CPUs: "CPU
# Generator does not use offset" (`gpu_model_runner._bookkeeping_sync`), without a connector too.
UNCHUNKED = ("--max-num-batched-tokens=16384",)

PAIRS = [(p, d) for p in (0, 1) for d in (0, 1)]
TOGETHER, LEFT = len(PAIRS), len(PAIRS) + 1  # the sets of cases after those of the pairs


@dataclass
class Cluster:
    hub: ServerProcess
    p: list[VllmServer]
    d: list[VllmServer]
    alone: list[dict[str, Any]]
    path: Path


@pytest.fixture(scope="module")
def cluster(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("matrix")
    model = write_model(path / "model", TINY)
    write_tokenizer(model, TINY)
    with VllmServer.launch(model, log_path=path / "alone.log") as lone:
        lone.wait_ready()
        sets = range(LEFT + 1)
        alone = [{n: call(lone.url, *c) for n, c in cases(s * SETS).items()} for s in sets]
    engines: list[VllmServer] = []
    with way.serve(path, host_bytes="512MiB") as hub:
        try:
            for number, (name, role) in enumerate([("p", "producer"), ("d", "consumer")] * 2):
                more = {**way.settings(hub), **PATIENT}
                log = path / f"{name}.jsonl"
                config = hub_config(hub.address, role=f"kv_{role}", event_log=log, **more)
                engine = VllmServer.launch(
                    model, log_path=path / f"{number}.log", config=config, arguments=UNCHUNKED
                )
                engines.append(engine)
            for engine in engines:
                engine.wait_ready()
            for name in "pd":
                wait_connected(path / f"{name}.jsonl", 2)
            yield Cluster(hub, engines[0::2], engines[1::2], alone, path)
        finally:
            for engine in engines:
                engine.close()


def _wrong(got: dict[str, Any], want: dict[str, Any]) -> dict[str, list[str]]:
    found = {name: complaints(got[name], want[name]) for name in want}
    return {name: told for name, told in found.items() if told}


@pytest.mark.parametrize(("p", "d"), PAIRS)
def test_each_pair_answers_as_a_lone_engine(cluster: Cluster, p: int, d: int) -> None:
    number = PAIRS.index((p, d))
    log = cluster.path / f"proxy-{number}.log"
    with ProxyProcess([cluster.p[p].url], [cluster.d[d].url], log_path=log) as proxy:
        got = {n: call(proxy.url, *case) for n, case in cases(number * SETS).items()}
        assert proxy.legs("prefill", "done") == len(got)
    assert _wrong(got, cluster.alone[number]) == {}
    events = read_events(cluster.path / "d.jsonl")
    for name, answer in got.items():
        assert scheduled(answer, events) == [1] * len(joined(answer)["choices"]), name


def test_all_kinds_at_once_over_all_four(cluster: Cluster) -> None:
    urls = [e.url for e in cluster.p], [e.url for e in cluster.d]
    wanted = cases(TOGETHER * SETS)
    with (
        ProxyProcess(*urls, log_path=cluster.path / "proxy-all.log") as proxy,
        ThreadPoolExecutor(len(wanted)) as threads,
    ):
        running = {n: threads.submit(call, proxy.url, *case) for n, case in wanted.items()}
        got = {name: future.result() for name, future in running.items()}
        loads = proxy.metrics()
        for leg, engines in (("prefill", cluster.p), ("decode", cluster.d)):
            for engine in engines:
                labels = f'engine="{engine.url}",leg="{leg}",outcome="done"'
                assert (
                    loads[f"kvserver_proxy_legs_total{{{labels}}}"] >= 1
                )  # the least loaded is next, not each in turn
    assert _wrong(got, cluster.alone[TOGETHER]) == {}


def test_every_pulled_page_is_a_pushed_one(cluster: Cluster) -> None:
    pushed = cells(read_events(cluster.path / "p.jsonl"), "pushed")
    pulled = cells(read_events(cluster.path / "d.jsonl"), "pulled")
    assert len(pulled) > 100
    assert page_complaints(pushed, pulled) == []


def test_the_engines_that_are_left_answer_as_before(cluster: Cluster) -> None:
    """Last in this file: it kills."""
    urls = [e.url for e in cluster.p], [e.url for e in cluster.d]
    with ProxyProcess(*urls, log_path=cluster.path / "proxy-left.log") as proxy:
        for engine in (cluster.p[0], cluster.d[0]):
            engine.kill()
        got = {n: call(proxy.url, *case) for n, case in cases(LEFT * SETS).items()}
        assert proxy.legs("prefill", "done") == len(got)
    assert _wrong(got, cluster.alone[LEFT]) == {}
