"""Pipeline stages of a model with several kinds of layers, of which one may have none: an engine of
one stage and one of two answer from what the other computed.

Cohere2's only layer with full attention is the last of four, so that a first stage of two has
windows alone. Stages with recurrent states are shown on tensors (unit/adapter/test_states.py). All
of it is slow, and runs in `make test-all`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvclient import Client
from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    corrupt_a_page,
    page_complaints,
    specs_of,
    wait_connected,
    wait_for,
)
from tests.support.model_zoo import ids, write_family
from tests.support.server import ServerProcess, start_server

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

BLOCK, TOKENS, LENGTH = 128, 12, 300
START_S = 300.0
"""A pipeline warms up before it serves."""
LAYERS = (65, 65, 65, 0)
"""The window of each, 0: full attention."""
Parts = dict[tuple[int, int], set[tuple[int, int]]]
"""(rank, window) -> the layers [first, last + 1) that it holds of that kind, counted within it."""


def held(stages: int) -> Parts:
    depth, found = len(LAYERS) // stages, {}
    for window in set(LAYERS):
        for rank in range(stages):
            first = LAYERS[: rank * depth].count(window)
            count = LAYERS[rank * depth : (rank + 1) * depth].count(window)
            if count:
                found[rank, window] = {(first, first + count)}
    return found


def parts(events: list[dict[str, Any]]) -> Parts:
    found: Parts = {}
    for event in events:
        key = event["rank"], event["window"]
        found.setdefault(key, set()).add((event["layers"][0], event["layers"][1]))
    return found


@dataclass
class World:
    server: ServerProcess
    path: Path
    engines: dict[int, Engine] = field(default_factory=dict)

    def events(self, stages: int, kind: str, tokens: list[int]) -> list[dict[str, Any]]:
        keys = {key.hex() for key in prefix_hashes(tokens, BLOCK)}
        events = read_events(self.path / f"{stages}.jsonl")
        return [e for e in events if e["event"] == kind and e["hash"] in keys]

    def launch(self, model: Path, stages: int) -> None:
        log = self.path / f"{stages}.jsonl"
        config = hub_config(self.server.address, event_log=log, **PATIENT)
        self.engines[stages] = Engine.launch(model, config=config, pipeline_parallel=stages)

    def ready(self, stages: int) -> None:
        self.engines[stages].wait_ready(START_S)
        self.engines[stages].generate(ids(98, 40), tokens=2)
        wait_connected(self.path / f"{stages}.jsonl", stages + (stages > 1))

    def push(self, stages: int, tokens: list[int]) -> Generated:
        """The prompt's answer; what is computed of it is at the hub, every stage's part."""
        computed = self.engines[stages].generate(tokens, tokens=TOKENS)
        blocks = LENGTH // BLOCK * len(held(stages))
        wait_for("pushes", lambda: len(self.events(stages, "pushed", tokens)) >= blocks)
        assert computed.cached == 0
        assert len(self.events(stages, "pushed", tokens)) == blocks
        assert parts(self.events(stages, "pushed", tokens)) == held(stages)
        return computed

    def pull(self, stages: int, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        """The answer of an engine that has none of it itself, and what it pulled."""
        before = len(self.events(stages, "pulled", tokens))
        wait_for("a reset of the prefix cache", self.engines[stages].reset_prefix_cache)
        answer = self.engines[stages].generate(tokens, tokens=TOKENS)
        return answer, self.events(stages, "pulled", tokens)[before:]

    def corrupt(self, tokens: list[int]) -> None:
        """One page of the layer with full attention, which the second stage has."""
        with Client.connect(self.server.address) as client:
            sections = {spec.attributes["section"]: spec for spec in specs_of(client)}
            corrupt_a_page(client, prefix_hashes(tokens, BLOCK), sections["full"])


def check(world: World, source: int, target: int, tokens: list[int]) -> Generated:
    computed = world.push(source, tokens)
    decoded, pulled = world.pull(target, tokens)
    assert answer_complaints(decoded, computed) == []
    assert decoded.cached >= LENGTH // BLOCK * BLOCK - 1
    assert parts(pulled) == held(target)
    pushed = cells(world.events(source, "pushed", tokens), "pushed")
    assert page_complaints(pushed, cells(pulled, "pulled")) == []
    return computed


def test_each_stage_pushes_and_pulls_the_kinds_of_layers_that_it_has(
    tmp_path: Path,
) -> None:
    model = write_family(tmp_path / "model", "cohere2")
    with start_server(tmp_path, host_bytes="128MiB") as server:
        world = World(server, tmp_path)
        try:
            for stages in (1, 2):
                world.launch(model, stages)
            for stages in (1, 2):
                world.ready(stages)
            there, back = ids(302, LENGTH), ids(305, LENGTH)
            computed = check(world, 1, 2, there)
            check(world, 2, 1, back)
            world.corrupt(there)
            decoded, pulled = world.pull(2, there)
            pushed = cells(world.events(1, "pushed", there), "pushed")
            assert answer_complaints(decoded, computed) != []
            assert len(page_complaints(pushed, cells(pulled, "pulled"))) == 1
        finally:
            for engine in world.engines.values():
                engine.end()  # ranks share memory segments that only they remove
