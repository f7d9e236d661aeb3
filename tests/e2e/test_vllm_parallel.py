"""Tensor-parallel ranks are head regions: TP=1 and TP=2 engines share, each moving its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    flip_a_bit,
    page_complaints,
    the_spec,
    transports_of,
    wait_connected,
    wait_for,
    wait_pushed,
)
from tests.support.model_zoo import FAMILIES, ids, write_family
from tests.support.server import ServerProcess, start_server
from tests.support.severing import SeveringRelay
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import WAYS, Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS = 128, 12
ONE, OTHER, DAMAGED, CUT = prompt(11, 700), prompt(12, 500), prompt(13, 640), prompt(14, 640)
BLOCK_BYTES = BLOCK * TINY.kv_bytes_per_token


@dataclass
class Pair:
    way: Way
    server: ServerProcess
    single: Engine
    double: Engine
    single_log: Path
    double_log: Path

    def push(self, tokens: list[int]) -> Generated:
        """Computed on one rank, and at the hub."""
        before = pushed_blocks(self.single_log)
        answer = self.single.generate(tokens, tokens=TOKENS)
        want = before + len(tokens) // BLOCK
        wait_all_pushed(self.single_log, want)
        return answer

    def pull(self, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        """The answer of the two ranks, which have nothing of it themselves, and its events."""
        return pull(self.double, self.double_log, tokens)


def pull(engine: Engine, log: Path, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
    wait_for("a reset of the prefix cache", engine.reset_prefix_cache)
    before = len(read_events(log))
    answer = engine.generate(tokens, tokens=TOKENS)
    return answer, read_events(log)[before:]


def pushed_blocks(log: Path) -> int:
    return sum(event["event"] == "pushed" for event in read_events(log))


def wait_all_pushed(log: Path, blocks: int) -> None:
    wait_for("pushes", lambda: pushed_blocks(log) == blocks)


@pytest.fixture(scope="module")
def pair(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("parallel")
    model = write_model(path / "model", TINY)
    engines: list[Engine] = []
    with way.serve(path, host_bytes="128MiB") as server:
        try:
            for size in (1, 2):
                config = hub_config(
                    server.address,
                    event_log=path / f"tp{size}.jsonl",
                    **way.settings(server),
                    **PATIENT,
                )
                engines.append(Engine.launch(model, config=config, tensor_parallel=size))
            for engine in engines:
                engine.wait_ready()
                engine.generate(prompt(98, 40), tokens=2)
            wait_connected(path / "tp1.jsonl")
            wait_connected(path / "tp2.jsonl", 3)
            for size in (1, 2):
                assert transports_of(path / f"tp{size}.jsonl") == {way.transport}
            logs = (path / "tp1.jsonl", path / "tp2.jsonl")
            yield Pair(way, server, *engines, *logs)
        finally:
            for engine in engines:
                engine.end()  # ranks share memory segments that only they remove


def ranks_of(events: list[dict[str, Any]], kind: str, request: str) -> dict[int, list[Any]]:
    """Events by rank, of the requests whose id starts with the engine's name for it."""
    found: dict[int, list[Any]] = {}
    for event in events:
        if event["event"] == kind and event["request"].startswith(request):
            found.setdefault(event["rank"], []).append(event)
    return found


def check(
    computed: Generated, decoded: Generated, source: Path, target: Path, tokens: list[int]
) -> None:
    full = len(tokens) // BLOCK
    assert answer_complaints(decoded, computed) == []
    assert decoded.cached >= full * BLOCK - 1
    pushed, pulled = cells(read_events(source), "pushed"), cells(read_events(target), "pulled")
    assert len(pulled) == full * TINY.kv_heads
    assert page_complaints(pushed, pulled) == []


def test_what_one_rank_pushed_two_ranks_pull_each_its_own_heads(pair: Pair) -> None:
    computed = pair.single.generate(ONE, tokens=TOKENS)
    wait_pushed(pair.single_log, len(ONE) // BLOCK)
    decoded = pair.double.generate(ONE, tokens=TOKENS)
    check(computed, decoded, pair.single_log, pair.double_log, ONE)
    ranks = ranks_of(read_events(pair.double_log), "pulled", "")
    assert sorted(ranks) == [0, 1]
    for rank, events in ranks.items():
        assert {tuple(e["heads"]) for e in events} == {(rank, rank + 1)}
        assert {e["bytes"] for e in events} == {BLOCK_BYTES // 2}
        assert len(events) == len(ONE) // BLOCK


def test_what_two_ranks_pushed_one_rank_pulls_whole(pair: Pair) -> None:
    before = len(cells(read_events(pair.single_log), "pulled"))
    assert before == 0
    computed = pair.double.generate(OTHER, tokens=TOKENS)
    wait_pushed(pair.double_log, len(OTHER) // BLOCK, ranks=2)
    decoded = pair.single.generate(OTHER, tokens=TOKENS)
    check(computed, decoded, pair.double_log, pair.single_log, OTHER)
    pushed = ranks_of(read_events(pair.double_log), "pushed", "")
    for rank, events in pushed.items():
        assert {tuple(e["heads"]) for e in events} == {(rank, rank + 1)}
        assert {e["bytes"] for e in events} == {BLOCK_BYTES // 2}
    (pulled,) = ranks_of(read_events(pair.single_log), "pulled", "").values()
    assert {tuple(e["heads"]) for e in pulled} == {(0, 2)}
    assert {e["bytes"] for e in pulled} == {BLOCK_BYTES}


def failed_of(events: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Blocks that did not arrive, by rank."""
    return {
        rank: sorted(event["index"] for event in found)
        for rank, found in ranks_of(events, "failed_block", "").items()
    }


def recomputed_from(events: list[dict[str, Any]], tokens: list[int]) -> set[int]:
    """Where steps that compute some of the prompt began."""
    return {len(tokens) - e["left"] for e in events if e["event"] == "scheduled"}


def check_failed(
    events: list[dict[str, Any]], tokens: list[int], first: int, *, alone: bool
) -> None:
    """The second rank lacks the blocks from `first` on: both compute again from there, and the hub
    is asked once. `alone`: the other rank lacks nothing."""
    failed, blocks = failed_of(events), len(tokens) // BLOCK
    assert failed[1][0] == first
    pulled = ranks_of(events, "pulled", "")[0]
    if alone:
        assert sorted(failed) == [1]
        assert len(pulled) == blocks
    else:
        assert failed.get(0, [first])[0] >= first
        assert len(pulled) >= first
    assert recomputed_from(events, tokens) == {first * BLOCK}
    assert len([e for e in events if e["event"] == "lookup"]) == 1


def test_one_rank_whose_cells_are_damaged_has_both_compute_again_from_there(pair: Pair) -> None:
    computed = pair.push(DAMAGED)
    with pair.way.blocking(pair.server) as client:
        digest = prefix_hashes(DAMAGED, BLOCK)[2]
        flip_a_bit(pair.server, client, the_spec(client), digest, layer=1, head=1)
    decoded, events = pair.pull(DAMAGED)
    assert answer_complaints(decoded, computed) == []
    # What the second rank finds damaged the hub drops at once, and the first may come too late.
    check_failed(events, DAMAGED, 2, alone=False)
    again, events = pair.pull(DAMAGED)
    assert answer_complaints(again, computed) == []


@pytest.mark.slow
def test_one_rank_that_is_cut_off_has_both_compute_again(tmp_path: Path) -> None:
    """The other rank and the scheduler half still reach the hub, which says that all is there. Over
    tcp: on the hub's host the shm socket would stand in."""
    way, log = WAYS["tcp"], tmp_path / "log.jsonl"
    model = write_model(tmp_path / "model", TINY)
    with way.serve(tmp_path, host_bytes="128MiB") as hub, SeveringRelay(hub.address) as relay:
        config = hub_config(relay.address, event_log=log, **way.settings(hub), **PATIENT)
        with Engine.start(model, config=config, tensor_parallel=2) as engine:
            wait_connected(log, 3)
            computed = engine.generate(CUT, tokens=TOKENS)
            wait_pushed(log, len(CUT) // BLOCK, ranks=2)
            connected = [e for e in read_events(log) if e["event"] == "connected"]
            (pid,) = {e["pid"] for e in connected if e.get("rank") == 1}
            assert relay.sever(pid) > 0
            try:
                decoded, events = pull(engine, log, CUT)
            finally:
                relay.mend()
            assert answer_complaints(decoded, computed) == []
            assert decoded.total_s < 20
            check_failed(events, CUT, 0, alone=True)

            def whole() -> bool:
                answer, found = pull(engine, log, CUT)
                assert answer_complaints(answer, computed) == []
                pulled = ranks_of(found, "pulled", "")
                return sorted(pulled) == [0, 1] and len(pulled[1]) == len(CUT) // BLOCK

            wait_for("a hit of both ranks", whole, 30.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_hold_the_same_head_push_it_once(tmp_path: Path) -> None:
    """Two ranks, one KV head: each pulls it, and one of them pushes it."""
    shape = replace(TINY, kv_heads=1)
    model = write_model(tmp_path / "model", shape)
    logs = {size: tmp_path / f"tp{size}.jsonl" for size in (1, 2)}
    engines: dict[int, Engine] = {}
    with start_server(tmp_path, host_bytes="128MiB") as hub:
        try:
            for size, log in logs.items():
                config = hub_config(hub.address, event_log=log, **PATIENT)
                engines[size] = Engine.launch(model, config=config, tensor_parallel=size)
            for size, engine in engines.items():
                engine.wait_ready()
                wait_connected(logs[size], {1: 1, 2: 3}[size])
            for source, target, tokens in ((2, 1, ONE), (1, 2, OTHER)):
                before = pushed_blocks(logs[source])
                computed = engines[source].generate(tokens, tokens=TOKENS)
                full = len(tokens) // BLOCK
                wait_all_pushed(logs[source], before + full)
                decoded = engines[target].generate(tokens, tokens=TOKENS)
                assert answer_complaints(decoded, computed) == []
                assert decoded.cached >= full * BLOCK - 1
                pushed = ranks_of(read_events(logs[source]), "pushed", "")
                assert {rank: len(found) for rank, found in pushed.items()} == {0: full}
                pulled = ranks_of(read_events(logs[target]), "pulled", "")
                want = dict.fromkeys(range(target), full)
                assert {rank: len(found) for rank, found in pulled.items()} == want
                for found in (*pushed.values(), *pulled.values()):
                    assert {tuple(e["heads"]) for e in found} == {(0, 1)}
                moved = [cells(read_events(logs[source]), "pushed")]
                moved.append(cells(read_events(logs[target]), "pulled"))
                assert page_complaints(*moved) == []
        finally:
            for engine in engines.values():
                engine.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_latent_that_two_ranks_hold_is_pushed_once(tmp_path: Path) -> None:
    """Bytes are compared: with latent attention vLLM's CPU build answers differently with two ranks
    than with one, also without a hub."""
    family = FAMILIES["deepseek2"]
    model = write_family(tmp_path / "model", family.name)
    logs = {size: tmp_path / f"tp{size}.jsonl" for size in (1, 2)}
    engines: dict[int, Engine] = {}
    tokens, full = ids(3, 500), 500 // BLOCK
    with start_server(tmp_path, host_bytes="128MiB") as hub:
        try:
            for size, log in logs.items():
                config = hub_config(hub.address, event_log=log, **PATIENT)
                engines[size] = Engine.launch(
                    model, config=config, tensor_parallel=size, **family.options
                )
            for size, engine in engines.items():
                engine.wait_ready()
                wait_connected(logs[size], {1: 1, 2: 3}[size])
            engines[2].generate(tokens, tokens=1)
            wait_all_pushed(logs[2], full)
            wait_for("a reset of the prefix cache", engines[2].reset_prefix_cache)
            answers = [engines[size].generate(tokens, tokens=TOKENS) for size in (1, 2)]
        finally:
            for engine in engines.values():
                engine.end()
    assert min(answer.cached for answer in answers) >= full * BLOCK - 1
    pushed = cells(read_events(logs[2]), "pushed")
    assert set(ranks_of(read_events(logs[2]), "pushed", "")) == {0}
    for size, log in logs.items():
        pulled = ranks_of(read_events(log), "pulled", "")
        assert {rank: len(found) for rank, found in pulled.items()} == dict.fromkeys(
            range(size), full
        )
        assert page_complaints(pushed, cells(read_events(log), "pulled")) == []
