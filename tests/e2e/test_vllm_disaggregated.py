"""Two prefill and two decode engines meet at one hub: XpYd, layer by layer, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvproto.prefix import prefix_hashes
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
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK = 128
TOKENS = 16
LENGTHS = (100, 230, 300, 420, 512, 650, 777, 900)
PROMPTS = [prompt(seed, length, MEDIUM) for seed, length in enumerate(LENGTHS)]


@dataclass
class Cluster:
    way: Way
    server: ServerProcess
    prefill: list[Engine]
    decode: list[Engine]
    prefill_log: Path
    decode_log: Path
    baseline: list[Generated]
    seconds: list[float]

    def pulled_for(self, block_hashes: list[bytes]) -> list[dict[str, Any]]:
        names = {digest.hex() for digest in block_hashes}
        events = read_events(self.decode_log)
        return [e for e in events if e["event"] == "pulled" and e["hash"] in names]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), MEDIUM)


@pytest.fixture(scope="module")
def baseline(model: Path) -> list[Generated]:
    """The answers of an engine that never heard of a hub."""
    with Engine.start(model) as engine:
        return [engine.generate(tokens, tokens=TOKENS) for tokens in PROMPTS]


@pytest.fixture(scope="module")
def cluster(
    way: Way, model: Path, baseline: list[Generated], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("cluster")
    engines: list[Engine] = []
    with way.serve(path, host_bytes="256MiB") as server:
        try:
            for name, role in [("p", "kv_producer"), ("d", "kv_consumer")] * 2:
                config = hub_config(
                    server.address,
                    role=role,
                    event_log=path / f"{name}.jsonl",
                    **way.settings(server),
                    **PATIENT,
                )
                engines.append(Engine.launch(model, config=config))
            for engine in engines:
                engine.wait_ready()
                engine.generate(prompt(98, 40, MEDIUM), tokens=2)
            wait_connected(path / "p.jsonl", 2)
            wait_connected(path / "d.jsonl", 2)
            yield Cluster(
                way,
                server,
                engines[0::2],
                engines[1::2],
                path / "p.jsonl",
                path / "d.jsonl",
                baseline,
                [],
            )
        finally:
            for engine in engines:
                engine.close()


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> list[Generated]:
    """Each prompt prefilled on one of the two and decoded on one of the two, all four pairs."""
    blocks = 0
    for number, tokens in enumerate(PROMPTS):
        cluster.prefill[number % 2].generate(tokens, tokens=1)
        blocks += len(tokens) // BLOCK
    wait_pushed(cluster.prefill_log, blocks)
    return [
        cluster.decode[number // 2 % 2].generate(tokens, tokens=TOKENS)
        for number, tokens in enumerate(PROMPTS)
    ]


def test_answers_are_those_of_an_engine_without_a_hub(
    cluster: Cluster, answers: list[Generated]
) -> None:
    for length, got, want in zip(LENGTHS, answers, cluster.baseline, strict=True):
        assert answer_complaints(got, want) == [], f"prompt of {length} tokens"


def test_engines_and_hub_agree_on_the_transport(cluster: Cluster, answers: list[Generated]) -> None:
    for log in (cluster.prefill_log, cluster.decode_log):
        assert transports_of(log) == {cluster.way.transport}
    for session in cluster.server.stats().sessions:
        assert list(session.transports) == [cluster.way.transport]


def test_pulled_pages_are_the_pushed_ones_byte_for_byte(
    cluster: Cluster, answers: list[Generated]
) -> None:
    pushed = cells(read_events(cluster.prefill_log), "pushed")
    pulled = cells(read_events(cluster.decode_log), "pulled")
    want = sum(length // BLOCK for length in LENGTHS) * MEDIUM.kv_heads
    assert len(pushed) == len(pulled) == len(set(pushed.values())) == want
    assert page_complaints(pushed, pulled) == []


def test_a_decode_engine_computes_at_most_one_unfinished_block(
    cluster: Cluster, answers: list[Generated]
) -> None:
    for tokens, got in zip(PROMPTS, answers, strict=True):
        full = len(tokens) // BLOCK
        hashes = prefix_hashes(tokens, BLOCK)
        assert len({e["hash"] for e in cluster.pulled_for(hashes)}) == full
        assert len(tokens) - got.cached <= BLOCK
        assert got.cached >= full * BLOCK - 1
    assert [e for e in read_events(cluster.decode_log) if e["event"] == "failed_block"] == []


def test_the_first_layer_is_at_the_hub_before_the_last_is_computed(
    cluster: Cluster, answers: list[Generated]
) -> None:
    events = read_events(cluster.prefill_log)
    largest = max((e for e in events if e["event"] == "push_done"), key=lambda e: e["blocks"])
    mine = [e for e in events if (e["pid"], e.get("rank")) == (largest["pid"], 0)]
    first = next(e for e in mine if e["event"] == "commit" and e["job"] == largest["job"])
    last = next(
        e
        for e in mine
        if e["event"] == "save_layer"
        and largest["job"] in e["jobs"]
        and e["layer"] == MEDIUM.layers - 1
    )
    assert first["layers"][0] == 0
    assert first["t"] < last["t"]
    commits = [e for e in mine if e["event"] == "commit" and e["job"] == largest["job"]]
    stretches = [e["layers"] for e in commits]
    assert [a[1] for a, _ in pairwise(stretches)] == [b[0] for _, b in pairwise(stretches)]
    assert (stretches[0][0], stretches[-1][1]) == (0, MEDIUM.layers)
    assert len(stretches) >= 3


def test_every_prefilled_block_was_pushed(cluster: Cluster, answers: list[Generated]) -> None:
    """Each prompt of a block or more made one push, and none of them was dropped."""
    events = read_events(cluster.prefill_log)
    jobs = {(e["pid"], j) for e in events if e["event"] == "save_layer" for j in e["jobs"]}
    assert len(jobs) == len([length for length in LENGTHS if length >= BLOCK])
    dropped = [e for e in events if e["event"] == "commit" and e["lost"]]
    assert dropped == []


def test_the_oracle_sees_one_corrupted_page(cluster: Cluster, answers: list[Generated]) -> None:
    number = LENGTHS.index(512)
    hashes = prefix_hashes(PROMPTS[number], BLOCK)
    with cluster.way.blocking(cluster.server) as client:
        corrupt_a_page(client, hashes)
    engine = cluster.decode[1 - number // 2 % 2]
    got = engine.generate(PROMPTS[number], tokens=TOKENS)
    pushed = cells(read_events(cluster.prefill_log), "pushed")
    pulled = cells(cluster.pulled_for(hashes), "pulled")
    assert len(page_complaints(pushed, pulled)) == 1
    assert answer_complaints(got, cluster.baseline[number]) != []
