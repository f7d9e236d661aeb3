"""Pipeline stages of models with several kinds of layers, of which a stage may have none: an engine
of one stage and one of two answer from what the other computed.

Cohere2's only layer with full attention is the last of four, so that a first stage of two has
windows alone; each layer of Falcon-H1 has both attention and a state. A stage of states alone vLLM
does not start on a CPU (its workers disagree about layouts): it is shown on tensors
(unit/adapter/test_states.py). All of it is slow, and runs in `make test-all`.
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
    altered,
    answer_complaints,
    cells,
    corrupt_a_page,
    hand_off_keys,
    page_complaints,
    replace_state,
    specs_of,
    state_of,
    wait_connected,
    wait_for,
)
from tests.support.model_zoo import FAMILIES, ids, write_family
from tests.support.server import ServerProcess, start_server

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

BLOCK, TOKENS, LENGTH = 128, 12, 300
START_S = 300.0
"""A pipeline warms up before it serves."""
TAIL_TTL_MS = 300_000
"""A state is a tail, and its oracle comes back to it after other hand-offs."""
STATE = -1
PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False}
DECODE_LEG = {"do_remote_decode": False, "do_remote_prefill": True}
LAYERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "cohere2": ((65,), (65,), (65,), (0,)),
    "falconh1": ((0, STATE),) * 4,
}
"""The kinds of each layer: 0: full attention, a window, or a state."""
Parts = dict[tuple[int, int], set[tuple[int, int]]]
"""(rank, kind) -> the layers [first, last + 1) that it holds of that kind, counted within it."""


def held(name: str, stages: int) -> Parts:
    layers, found = LAYERS[name], {}
    depth = len(layers) // stages
    for kind in {kind for kinds in layers for kind in kinds}:
        for rank in range(stages):
            first = sum(kind in kinds for kinds in layers[: rank * depth])
            count = sum(kind in kinds for kinds in layers[rank * depth : (rank + 1) * depth])
            if count:
                found[rank, kind] = {(first, first + count)}
    return found


def parts(events: list[dict[str, Any]]) -> Parts:
    found: Parts = {}
    for event in events:
        key = event["rank"], event["window"]
        found.setdefault(key, set()).add((event["layers"][0], event["layers"][1]))
    return found


@dataclass
class World:
    name: str
    server: ServerProcess
    path: Path
    engines: dict[int, Engine] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        return STATE in FAMILIES[self.name].windows

    def keys(self, tokens: list[int]) -> list[bytes]:
        """Of what one engine computes for the other."""
        return hand_off_keys(tokens, BLOCK) if self.recurrent else prefix_hashes(tokens, BLOCK)

    def events(self, stages: int, kind: str, tokens: list[int]) -> list[dict[str, Any]]:
        keys = {key.hex() for key in self.keys(tokens)}
        events = read_events(self.path / f"{stages}.jsonl")
        return [e for e in events if e["event"] == kind and e["hash"] in keys]

    def launch(self, model: Path, stages: int) -> None:
        log = self.path / f"{stages}.jsonl"
        config = hub_config(self.server.address, event_log=log, **PATIENT)
        options = FAMILIES[self.name].options
        self.engines[stages] = Engine.launch(
            model, config=config, pipeline_parallel=stages, **options
        )

    def ready(self, stages: int) -> None:
        self.engines[stages].wait_ready(START_S)
        self.engines[stages].generate(ids(98, 40), tokens=2)
        wait_connected(self.path / f"{stages}.jsonl", stages + (stages > 1))

    def push(self, stages: int, tokens: list[int]) -> Generated:
        """The prompt's answer; what is computed of it is at the hub, every stage's part."""
        engine, keys = self.engines[stages], self.keys(tokens)
        computed = engine.generate(tokens, tokens=TOKENS)
        if self.recurrent:  # which are pushed for hand-offs alone
            assert self.events(stages, "pushed", tokens) == []
            engine.generate(tokens, tokens=1, transfer=PREFILL_LEG)
        blocks = sum(1 if kind == STATE else len(keys) for _, kind in held(self.name, stages))
        wait_for("pushes", lambda: len(self.events(stages, "pushed", tokens)) >= blocks)
        assert computed.cached == 0
        assert len(self.events(stages, "pushed", tokens)) == blocks
        assert parts(self.events(stages, "pushed", tokens)) == held(self.name, stages)
        return computed

    def pull(self, stages: int, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        """The answer of an engine that has none of it itself, and what it pulled."""
        before = len(self.events(stages, "pulled", tokens))
        started = len(read_events(self.path / f"{stages}.jsonl"))
        transfer = DECODE_LEG if self.recurrent else None
        if not self.recurrent:
            wait_for("a reset of the prefix cache", self.engines[stages].reset_prefix_cache)
        answer = self.engines[stages].generate(tokens, tokens=TOKENS, transfer=transfer)
        events = read_events(self.path / f"{stages}.jsonl")[started:]
        left = [event["left"] for event in events if event["event"] == "scheduled"]
        assert left == [1 if self.recurrent else LENGTH % BLOCK], "tokens of it that it computes"
        return answer, self.events(stages, "pulled", tokens)[before:]

    def corrupt(self, tokens: list[int]) -> None:
        """One page of the last stage: of the layers with full attention, or of a state."""
        keys = self.keys(tokens)
        with Client.connect(self.server.address) as client:
            sections = {spec.attributes["section"]: spec for spec in specs_of(client)}
            if self.recurrent:
                bad = altered(state_of(client, sections["state"], keys))
                size = (len(tokens) - 1) % BLOCK
                replace_state(client, sections["state"], keys, bad, tokens=size)
            else:
                corrupt_a_page(client, keys, sections["full"])


def check(world: World, source: int, target: int, tokens: list[int]) -> Generated:
    computed = world.push(source, tokens)
    decoded, pulled = world.pull(target, tokens)
    assert answer_complaints(decoded, computed) == []
    assert parts(pulled) == held(world.name, target)
    pushed = cells(world.events(source, "pushed", tokens), "pushed")
    assert page_complaints(pushed, cells(pulled, "pulled")) == []
    return computed


@pytest.mark.parametrize("name", list(LAYERS))
def test_each_stage_pushes_and_pulls_the_kinds_of_layers_that_it_has(
    name: str, tmp_path: Path
) -> None:
    model = write_family(tmp_path / "model", name)
    with start_server(tmp_path, host_bytes="128MiB", tail_ttl_ms=TAIL_TTL_MS) as server:
        world = World(name, server, tmp_path)
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
