"""Real engines over the transports that leave the host: prefill, decode, TP 1 and 2, kill -9.

Engines A and B have one rank, C has two; A and C prefill, B and C decode, so that blocks go from
TP=1 to TP=2 and back. Then the hub is killed and started again over the same memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    wait_for,
    wait_pushed,
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import WAYS, Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS = 128, 12
FROM_A, FROM_C = prompt(51, 700), prompt(52, 600)
BLOCK_BYTES = BLOCK * TINY.kv_bytes_per_token
RANKS = {"a": 1, "b": 1, "c": 2}
# The scheduler half and the one rank of an engine in one process share a session.
PROCESSES = {"a": 1, "b": 1, "c": 3}
RESUME_S = 5.0


def full(tokens: list[int]) -> int:
    return len(tokens) // BLOCK


@dataclass
class World:
    way: Way
    server: ServerProcess
    engines: dict[str, Engine]
    path: Path

    def log(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.log(name)) if e["event"] == kind]

    def pushed(self) -> dict[tuple[str, int], str]:
        """Pages as the engines that computed them pushed them."""
        return cells([e for name in RANKS for e in self.events(name, "pushed")], "pushed")

    def bytes_of(self, kind: str) -> int:
        return sum(e["bytes"] for name in RANKS for e in self.events(name, kind))

    def forget(self, name: str) -> None:
        """Empty an engine's own cache, once no push pins its blocks any more."""
        engine = self.engines[name]

        def done() -> bool:
            engine.idle(0.1)
            return engine.reset_prefix_cache()

        wait_for("a reset of the prefix cache", done)

    def pull(self, name: str, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        """The answer to a prompt that the engine has not in its own cache, and what it pulled."""
        before = len(self.events(name, "pulled"))
        got = self.engines[name].generate(tokens, tokens=TOKENS)
        return got, self.events(name, "pulled")[before:]


@pytest.fixture(scope="module", params=["tcp", pytest.param("nixl", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest) -> Way:
    """`make test` has time for one of these."""
    way = WAYS[request.param]
    if way.missing:
        pytest.skip(way.missing)
    return way


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture(scope="module")
def baseline(model: Path) -> dict[int, Generated]:
    """Answers of an engine that never heard of a hub, by the prompt's length."""
    with Engine.start(model) as engine:
        return {len(p): engine.generate(p, tokens=TOKENS) for p in (FROM_A, FROM_C)}


@pytest.fixture(scope="module")
def world(
    way: Way,
    model: Path,
    baseline: dict[int, Generated],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    path = tmp_path_factory.mktemp("world")
    engines: dict[str, Engine] = {}
    with way.serve(path, host_bytes="128MiB") as server:
        world = World(way, server, engines, path)
        try:
            for name, ranks in RANKS.items():
                config = hub_config(
                    server.address, event_log=world.log(name), **way.settings(server), **PATIENT
                )
                engines[name] = Engine.launch(model, config=config, tensor_parallel=ranks)
            for engine in engines.values():
                engine.wait_ready()
            for name, engine in engines.items():
                engine.generate(prompt(98, 40), tokens=2)
                wait_connected(world.log(name), PROCESSES[name])
            yield world
        finally:
            for name, engine in engines.items():
                if RANKS[name] > 1:
                    engine.end()  # ranks share memory segments that only they remove
                engine.close()


def check_pulled(
    world: World, got: Generated, want: Generated, fresh: list[dict[str, Any]], tokens: list[int]
) -> None:
    """The answer is the one without a hub, and rests on all full blocks, as they were pushed."""
    assert answer_complaints(got, want) == []
    assert got.cached >= full(tokens) * BLOCK - 1
    pulled = cells(fresh, "pulled")
    names = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
    assert set(pulled) == {(name, head) for name in names for head in range(TINY.kv_heads)}
    assert page_complaints(world.pushed(), pulled) == []


def test_1_one_rank_prefills_for_one_and_for_two(
    world: World, baseline: dict[int, Generated]
) -> None:
    want = baseline[len(FROM_A)]
    assert answer_complaints(world.engines["a"].generate(FROM_A, tokens=TOKENS), want) == []
    wait_pushed(world.log("a"), full(FROM_A))
    for name, ranks in (("b", [0]), ("c", [0, 1])):
        got, fresh = world.pull(name, FROM_A)
        check_pulled(world, got, want, fresh, FROM_A)
        assert sorted({e["rank"] for e in fresh}) == ranks
        assert {e["bytes"] for e in fresh} == {BLOCK_BYTES // len(ranks)}


def test_2_two_ranks_prefill_for_one(world: World, baseline: dict[int, Generated]) -> None:
    want = baseline[len(FROM_C)]
    assert answer_complaints(world.engines["c"].generate(FROM_C, tokens=TOKENS), want) == []
    wait_pushed(world.log("c"), full(FROM_C), ranks=RANKS["c"])
    first = prefix_hashes(FROM_C, BLOCK)[0].hex()
    mine = [e for e in world.events("c", "pushed") if e["hash"] == first]
    assert sorted(tuple(e["heads"]) for e in mine) == [(0, 1), (1, 2)]
    got, fresh = world.pull("b", FROM_C)
    check_pulled(world, got, want, fresh, FROM_C)


def counted(world: World, pushed: int, pulled: int) -> None:
    """The hub moved at least so many bytes this way, and none another; engines say the same."""
    chosen = world.way.transport

    def done() -> bool:
        counters = world.server.stats().counters
        return (
            counters[f"{chosen}_bytes_in"] >= pushed and counters[f"{chosen}_bytes_out"] >= pulled
        )

    wait_for(f"{pushed} bytes in and {pulled} out over {chosen}", done)
    stats = world.server.stats()
    (other,) = {"tcp", "nixl"} - {chosen}
    assert [stats.counters.get(f"{other}_bytes_{d}", 0) for d in ("in", "out")] == [0, 0]
    assert [list(s.transports) for s in stats.sessions] == [[chosen]] * len(stats.sessions)
    assert len(stats.sessions) >= len(RANKS)
    for name in RANKS:
        assert transports_of(world.log(name)) == {chosen}


def test_3_the_bytes_went_this_way(world: World) -> None:
    pushed, pulled = world.bytes_of("pushed"), world.bytes_of("pulled")
    assert pushed >= (full(FROM_A) + full(FROM_C)) * BLOCK_BYTES
    assert pulled == (2 * full(FROM_A) + full(FROM_C)) * BLOCK_BYTES
    counted(world, pushed, pulled)


def test_4_the_oracle_sees_one_corrupted_page(world: World, baseline: dict[int, Generated]) -> None:
    with world.way.blocking(world.server) as client:
        corrupt_a_page(client, prefix_hashes(FROM_C, BLOCK))
    got, fresh = world.pull("a", FROM_C)  # which has never seen this prompt
    assert len(page_complaints(world.pushed(), cells(fresh, "pulled"))) == 1
    assert answer_complaints(got, baseline[len(FROM_C)]) != []


def test_5_a_killed_hub_comes_back_with_its_blocks(
    world: World, baseline: dict[int, Generated]
) -> None:
    """There is no disk: what is hit after the kill stood in the memory that was mapped again."""
    want = baseline[len(FROM_A)]
    world.server.kill()
    for name in ("a", "b"):
        world.forget(name)
        got, fresh = world.pull(name, FROM_A)
        assert (answer_complaints(got, want), fresh) == ([], [])
    world.server.restart()
    restarted = time.monotonic()
    assert world.server.ready["warm"]
    waiting = {"a", "b"}

    def hit() -> bool:
        for name in sorted(waiting):
            world.forget(name)
            got, fresh = world.pull(name, FROM_A)
            assert answer_complaints(got, want) == []
            if len(fresh) == full(FROM_A):
                check_pulled(world, got, want, fresh, FROM_A)
                assert max(e["t"] for e in fresh) - restarted < RESUME_S
                waiting.remove(name)
        return not waiting

    wait_for("hits of both engines", hit, 30.0)
    counted(world, 0, 2 * full(FROM_A) * BLOCK_BYTES)
