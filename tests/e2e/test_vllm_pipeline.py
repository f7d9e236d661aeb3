"""Pipeline stages are layer ranges: engines of one and two stages, one and two ranks each, share.

A pipeline on a CPU needs its warm-up (engines.TRACED), which takes longer than a tiny model's whole
test: all of it is slow, and runs in `make test-all`. PP 4 -> 2 is shown on tensors
(unit/adapter/test_ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    corrupt_a_page,
    page_complaints,
    wait_connected,
    wait_for,
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

BLOCK, TOKENS, LENGTH = 128, 12, 400
FULL = LENGTH // BLOCK
START_S = 300.0
"""Three engines start at once, and two of them have two ranks to warm up."""
SHAPES = {"tp1pp1": (1, 1), "tp1pp2": (1, 2), "tp2pp1": (2, 1), "tp2pp2": (2, 2)}
TOGETHER = ("tp1pp1", "tp1pp2", "tp2pp1")
"""Run at once; the largest starts when the others of two ranks are gone."""


@dataclass
class World:
    way: Way
    server: ServerProcess
    model: Path
    path: Path
    engines: dict[str, Engine] = field(default_factory=dict)

    def log(self, shape: str) -> Path:
        return self.path / f"{shape}.jsonl"

    def launch(self, shape: str) -> None:
        tensor, pipeline = SHAPES[shape]
        config = hub_config(
            self.server.address,
            event_log=self.log(shape),
            **self.way.settings(self.server),
            **PATIENT,
        )
        self.engines[shape] = Engine.launch(
            self.model, config=config, tensor_parallel=tensor, pipeline_parallel=pipeline
        )

    def ready(self, shape: str) -> None:
        tensor, pipeline = SHAPES[shape]
        ranks = tensor * pipeline
        self.engines[shape].wait_ready(START_S)
        self.engines[shape].generate(prompt(98, 40), tokens=2)
        wait_connected(self.log(shape), ranks + (ranks > 1))

    def push(self, shape: str, tokens: list[int]) -> Generated:
        """Compute a prompt and wait until every rank has pushed its part of it."""
        answer = self.engines[shape].generate(tokens, tokens=TOKENS)
        keys = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}

        def done() -> bool:
            pushed = [e for e in read_events(self.log(shape)) if e["event"] == "pushed"]
            parts = {(e["hash"], e["rank"]) for e in pushed if e["hash"] in keys}
            return len(parts) == len(keys) * len(regions(shape))

        wait_for(f"pushes of {shape}", done)
        return answer

    def moved(self, shape: str, event: str, tokens: list[int]) -> dict[int, set[tuple[int, ...]]]:
        """(layers, heads, bytes) of each rank's pushes or pulls of a prompt's blocks."""
        keys = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
        found: dict[int, set[tuple[int, ...]]] = {}
        for one in read_events(self.log(shape)):
            if one["event"] == event and one["hash"] in keys:
                part = (*one["layers"], *one["heads"], one["bytes"])
                found.setdefault(one["rank"], set()).add(part)
        return found


def regions(shape: str) -> dict[int, set[tuple[int, ...]]]:
    """What each rank moves of a block, and how many bytes that is: its own and nothing else."""
    tensor, pipeline = SHAPES[shape]
    layers, heads = TINY.layers // pipeline, TINY.kv_heads // tensor
    size = BLOCK * TINY.kv_bytes_per_token // (tensor * pipeline)
    return {
        stage * tensor + rank: {
            (stage * layers, (stage + 1) * layers, rank * heads, (rank + 1) * heads, size)
        }
        for stage in range(pipeline)
        for rank in range(tensor)
    }


@pytest.fixture(scope="module")
def world(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("pipeline")
    model = write_model(path / "model", TINY)
    with way.serve(path, host_bytes="128MiB") as server:
        world = World(way, server, model, path)
        try:
            for shape in TOGETHER:
                world.launch(shape)
            for shape in TOGETHER:
                world.ready(shape)
            yield world
        finally:
            for engine in world.engines.values():
                engine.end()  # ranks share memory segments that only they remove


def check(world: World, source: str, target: str, tokens: list[int]) -> None:
    computed = world.push(source, tokens)
    if source == target:  # another engine of that shape, which has none of it itself
        wait_for("a reset of the prefix cache", world.engines[target].reset_prefix_cache)
    decoded = world.engines[target].generate(tokens, tokens=TOKENS)
    assert computed.cached == 0
    assert answer_complaints(decoded, computed) == []
    assert decoded.cached >= FULL * BLOCK - 1
    pushed = cells(read_events(world.log(source)), "pushed")
    pulled = cells(read_events(world.log(target)), "pulled")
    keys = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
    assert len([key for key in pulled if key[0] in keys]) == FULL * TINY.kv_heads
    assert page_complaints(pushed, {k: v for k, v in pulled.items() if k[0] in keys}) == []
    assert world.moved(source, "pushed", tokens) == regions(source)
    assert world.moved(target, "pulled", tokens) == regions(target)


PAIRS = [p for p in product(TOGETHER, repeat=2) if "tp1pp2" in p or p == ("tp2pp1", "tp2pp1")]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{p}-to-{d}" for p, d in PAIRS])
def test_1_stages_and_ranks_push_and_pull_their_own_part(
    world: World, source: str, target: str
) -> None:
    check(world, source, target, prompt(20 + PAIRS.index((source, target)), LENGTH))


def test_2_the_oracle_sees_one_corrupted_page_of_the_second_stage(world: World) -> None:
    tokens = prompt(30, LENGTH)
    computed = world.push("tp1pp1", tokens)
    hashes = prefix_hashes(tokens, BLOCK)
    with world.way.blocking(world.server) as client:
        corrupt_a_page(client, hashes)
    decoded = world.engines["tp1pp2"].generate(tokens, tokens=TOKENS)
    assert answer_complaints(decoded, computed) != []
    pushed = cells(read_events(world.log("tp1pp1")), "pushed")
    names = {digest.hex() for digest in hashes}
    pulled = cells(read_events(world.log("tp1pp2")), "pulled")
    assert len(page_complaints(pushed, {k: v for k, v in pulled.items() if k[0] in names})) == 1


def test_3_two_stages_of_two_ranks_each(world: World) -> None:
    kept = {shape: prompt(40 + at, LENGTH) for at, shape in enumerate(("tp1pp2", "tp2pp1"))}
    computed = {shape: world.push(shape, tokens) for shape, tokens in kept.items()}
    for shape in kept:
        world.engines.pop(shape).end()
    world.launch("tp2pp2")
    world.ready("tp2pp2")
    check(world, "tp1pp1", "tp2pp2", prompt(45, LENGTH))
    check(world, "tp2pp2", "tp1pp1", prompt(46, LENGTH))
    check(world, "tp2pp2", "tp2pp2", prompt(47, LENGTH))
    for shape, tokens in kept.items():
        decoded = world.engines["tp2pp2"].generate(tokens, tokens=TOKENS)
        assert answer_complaints(decoded, computed[shape]) == []
        assert world.moved("tp2pp2", "pulled", tokens) == regions("tp2pp2")
        pushed = cells(read_events(world.log(shape)), "pushed")
        names = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
        pulled = cells(read_events(world.log("tp2pp2")), "pulled")
        assert page_complaints(pushed, {k: v for k, v in pulled.items() if k[0] in names}) == []
