"""Whole vLLM engines on a card around one hub: what one has prefilled, another decodes from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvproto.prefix import prefix_hashes
from tests.contract.conftest import chosen
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    corrupt_a_page,
    page_complaints,
    transports_of,
    wait_connected,
    wait_pushed,
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import MEDIUM, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK = 128
TOKENS = 16
LENGTHS = (100, 230, 300, 420, 512, 650, 777, 900)
PROMPTS = [prompt(seed, length, MEDIUM) for seed, length in enumerate(LENGTHS)]
# Three engines share the card. Triton's products of float32 are to be exact enough to compare; and
# CUDA does not outlive a fork: a variable of OpenMP asks for an interpreter of its own.
OPTIONS = {"gpu_memory_utilization": 0.05}
VARIABLES = {"TRITON_F32_DEFAULT": "ieee", "OMP_NUM_THREADS": "4"}


@pytest.fixture(scope="module", autouse=True)
def _cuda_build() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.platforms import current_platform

        if not current_platform.is_cuda():
            pytest.skip("this vLLM is no build for CUDA")


@pytest.fixture(scope="module", params=["v2", "v1"])
def variables(request: pytest.FixtureRequest) -> dict[str, str]:
    """With each of vLLM's two model runners."""
    return {**VARIABLES, "VLLM_USE_V2_MODEL_RUNNER": str(int(request.param == "v2"))}


@pytest.fixture(scope="module", params=["shm", "tcp"])
def way(request: pytest.FixtureRequest) -> Way:
    return chosen(request)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), MEDIUM)


@pytest.fixture(scope="module")
def baseline(model: Path, variables: dict[str, str]) -> list[Generated]:
    """The answers of an engine that never heard of a hub."""
    with Engine.start(model, environment=variables, **OPTIONS) as engine:
        return [engine.generate(tokens, tokens=TOKENS) for tokens in PROMPTS]


@dataclass
class Cluster:
    way: Way
    server: ServerProcess
    decode: Engine
    prefill_log: Path
    decode_log: Path
    answers: list[Generated]


@pytest.fixture(scope="module")
def cluster(
    way: Way,
    model: Path,
    variables: dict[str, str],
    baseline: list[Generated],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """Each prompt prefilled by one engine and decoded by another."""
    path = tmp_path_factory.mktemp("cluster")
    logs = {"kv_producer": path / "p.jsonl", "kv_consumer": path / "d.jsonl"}
    engines = []
    with way.serve(path, host_bytes="256MiB") as server:
        try:
            for role, log in logs.items():
                config = hub_config(
                    server.address, role=role, event_log=log, **way.settings(server), **PATIENT
                )
                engines.append(
                    Engine.launch(model, config=config, environment=variables, **OPTIONS)
                )
            for engine, log in zip(engines, logs.values(), strict=True):
                engine.wait_ready()
                engine.generate(prompt(98, 40, MEDIUM), tokens=2)
                wait_connected(log)
            prefill, decode = engines
            for tokens in PROMPTS:
                prefill.generate(tokens, tokens=1)
            wait_pushed(logs["kv_producer"], sum(length // BLOCK for length in LENGTHS))
            answers = [decode.generate(tokens, tokens=TOKENS) for tokens in PROMPTS]
            yield Cluster(way, server, decode, *logs.values(), answers)
        finally:
            for engine in engines:
                engine.close()


def test_answers_are_those_of_an_engine_without_a_hub(
    cluster: Cluster, baseline: list[Generated]
) -> None:
    for length, got, want in zip(LENGTHS, cluster.answers, baseline, strict=True):
        assert answer_complaints(got, want) == [], f"prompt of {length} tokens"
        assert length - got.cached <= BLOCK, "only an unfinished block is computed"


def test_pulled_pages_are_the_pushed_ones_byte_for_byte(cluster: Cluster) -> None:
    pushed = cells(read_events(cluster.prefill_log), "pushed")
    pulled = cells(read_events(cluster.decode_log), "pulled")
    want = sum(length // BLOCK for length in LENGTHS) * MEDIUM.kv_heads
    assert len(pushed) == len(pulled) == len(set(pushed.values())) == want
    assert page_complaints(pushed, pulled) == []
    commits = [e for e in read_events(cluster.prefill_log) if e["event"] == "commit"]
    assert [e for e in commits if e["lost"]] == []
    for log in (cluster.prefill_log, cluster.decode_log):
        assert transports_of(log) == {cluster.way.transport}


def test_all_at_once_are_answered_the_same(cluster: Cluster, baseline: list[Generated]) -> None:
    assert cluster.decode.reset_prefix_cache()
    for got, want in zip(
        cluster.decode.generate_many(PROMPTS, tokens=TOKENS), baseline, strict=True
    ):
        assert answer_complaints(got, want) == []


def test_the_oracle_sees_one_corrupted_page(cluster: Cluster, baseline: list[Generated]) -> None:
    number = LENGTHS.index(512)
    hashes = prefix_hashes(PROMPTS[number], BLOCK)
    with cluster.way.blocking(cluster.server) as client:
        corrupt_a_page(client, hashes)
    assert cluster.decode.reset_prefix_cache()
    seen = len(read_events(cluster.decode_log))
    got = cluster.decode.generate(PROMPTS[number], tokens=TOKENS)
    pushed = cells(read_events(cluster.prefill_log), "pushed")
    pulled = cells(read_events(cluster.decode_log)[seen:], "pulled")
    assert len(page_complaints(pushed, pulled)) == 1
    assert answer_complaints(got, baseline[number]) != []
