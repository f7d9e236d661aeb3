"""An engine with 24 blocks whose pushes are late, while other requests want the blocks they read.

The oracle: every block that is complete at the hub is pulled with the plain client and compared,
number by number, with what an engine alone computes for the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvclient import BlockState, Client
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import prefix_hashes
from tests.support.engines import Engine, hub_config
from tests.support.kv_oracle import specs_of, wait_connected, wait_for
from tests.support.model_zoo import ids, write_family
from tests.support.server import ServerProcess
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, FEW_BLOCKS, CHUNK, TOKENS = 128, 24, 128, 12
FAMILIES = [("llama", 8), ("mistral", 1), ("gptoss", 1)]
REQUESTS = 24
LATE_S = 2.0
PATIENT_MS, IMPATIENT_MS = 15_000, 250
TOLERANCE = 1e-3
"""Of single numbers in float32: another batch sums in another order."""


@dataclass
class World:
    """A hub that a small engine pushes to, and one with the truth."""

    way: Way
    path: Path
    model: Path
    server: ServerProcess
    alone: ServerProcess
    lone: Engine
    at_once: int
    """Requests that the small engine runs side by side. Where the window is short it is one: only
    chunks that end with a hub block leave the window's layers all of it."""

    def start(self, name: str, pin_ms: int) -> Engine:
        """An engine with few blocks."""
        log = self.path / f"{name}.jsonl"
        config = hub_config(
            self.server.address,
            role="kv_producer",
            event_log=log,
            pin_ms=pin_ms,
            **self.way.settings(self.server),
        )
        engine = Engine.start(
            self.model,
            config=config,
            num_gpu_blocks_override=FEW_BLOCKS,
            max_model_len=384,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=self.at_once,
        )
        engine.generate(ids(97, 40), tokens=2)
        wait_connected(log)
        return engine

    def stored(self) -> int:
        """Blocks of all namespaces at the hub."""
        return sum(known.blocks for known in self.server.stats().namespaces)

    def differences(self, chains: Sequence[list[int]]) -> tuple[int, int]:
        """Blocks of these token sequences that are complete at the hub, in all namespaces, and
        those of them with other numbers than a recomputation."""
        for tokens in chains:
            self.lone.generate(tokens, tokens=1)
        hashes = list(dict.fromkeys(h for tokens in chains for h in prefix_hashes(tokens, BLOCK)))
        compared = differing = 0
        with self.way.blocking(self.server) as hub, self.way.blocking(self.alone) as truth:
            for spec in specs_of(hub):
                mine = pages(hub, spec, complete(hub, spec, hashes))
                wait_for(
                    "the truth", lambda m=mine, s=spec: m.keys() <= {*complete(truth, s, [*m])}
                )
                right = pages(truth, spec, list(mine))
                compared += len(mine)
                differing += sum(
                    float(np.abs(mine[key] - right[key]).max()) > TOLERANCE for key in mine
                )
        return compared, differing


def complete(client: Client, spec: NamespaceSpec, hashes: list[bytes]) -> list[bytes]:
    """Those of the blocks that the hub has."""
    namespace = client.open_namespace(spec)
    found = (namespace.lookup([key]).states[0] == BlockState.COMPLETE for key in hashes)
    return [key for key, there in zip(hashes, found, strict=True) if there]


def pages(
    client: Client, spec: NamespaceSpec, hashes: list[bytes]
) -> dict[bytes, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """The numbers of each block."""
    namespace = client.open_namespace(spec)
    grid = namespace.grid
    data = np.zeros((len(hashes), grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    if hashes:
        assert namespace.pull(hashes, data).found.all()
    return dict(zip(hashes, data.view(np.float32), strict=True))


def churn(engine: Engine, seed: int) -> list[list[int]]:
    """Requests that come faster than their blocks are free, some of them twice; what each of them
    computed."""
    source = random.Random(seed)
    prompts = [ids(1000 * seed + n, source.randrange(130, 300)) for n in range(REQUESTS)]
    prompts[REQUESTS // 2] = prompts[1]
    delays = [0.25 * n for n in range(REQUESTS)]
    answers = engine.finish(engine.begin(prompts, tokens=TOKENS, delays=delays), 240.0)
    facts = engine.facts()  # once every push is over
    assert facts["free"] == FEW_BLOCKS - 1, "one is vLLM's own"
    return [p + answer.tokens[:-1] for p, answer in zip(prompts, answers, strict=True)]


def dropped(engine: Engine) -> float:
    """Pushes that were given up for being late."""
    engine.idle(0.05)
    return engine.metrics().get("vllm:kvserver_saves_dropped.late", 0)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda one: one[0])
def world(
    request: pytest.FixtureRequest, way: Way, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    path = tmp_path_factory.mktemp("churn")
    (path / "alone").mkdir()
    family, at_once = request.param
    model = write_family(path / "model", family)
    with (
        way.serve(path, host_bytes="64MiB") as server,
        way.serve(path / "alone", host_bytes="64MiB") as alone,
    ):
        config = hub_config(
            alone.address,
            role="kv_producer",
            event_log=path / "lone.jsonl",
            pin_ms=PATIENT_MS,
            **way.settings(alone),
        )
        with Engine.start(model, config=config) as lone:
            wait_connected(path / "lone.jsonl")
            yield World(way, path, model, server, alone, lone, at_once)


def test_pages_are_what_was_computed_however_late_the_push(world: World) -> None:
    with world.start("held", PATIENT_MS) as engine:
        before = world.stored()
        engine.hamper([LATE_S])
        compared, differing = world.differences(churn(engine, 1))
        assert compared == world.stored() - before >= REQUESTS / 3
        assert differing == 0
        assert dropped(engine) == 0
        # The control: without pins the same traffic pushes other requests' pages.
        engine.hamper([LATE_S], unpinned=True)
        compared, differing = world.differences(churn(engine, 2))
        assert differing > compared / 10


def test_a_push_that_outlives_its_pins_commits_nothing(world: World) -> None:
    with world.start("dropped", IMPATIENT_MS) as engine:
        before = world.stored()
        engine.hamper([0.0, 0.1, LATE_S, 0.0, 0.0])
        compared, differing = world.differences(churn(engine, 3))
        assert compared == world.stored() - before > 0
        assert differing == 0
        assert dropped(engine) > 0
