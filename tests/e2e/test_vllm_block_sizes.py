"""Engine blocks of 32, 64 and 128 tokens on real engines: any of them reads what any other wrote,
out of one namespace.

All three run at once. It is slow, and runs in `make test-all`; `test_vllm_namespaces.py` has one
pair in every run, and 16 is shown on tensors (unit/adapter/test_layout.py), since CPU attention
takes multiples of 32 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
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
    the_spec,
    wait_connected,
    wait_for,
)
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import TINY, prompt, write_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, TOKENS, LENGTH = 128, 12, 400
FULL = LENGTH // BLOCK
SIZES = (32, 64, 128)


@dataclass
class World:
    server: ServerProcess
    engines: dict[int, Engine]
    path: Path

    def log(self, size: int) -> Path:
        return self.path / f"{size}.jsonl"

    def events(self, size: int, kind: str, tokens: list[int]) -> list[dict[str, Any]]:
        """Of a prompt's blocks."""
        keys = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
        events = read_events(self.log(size))
        return [e for e in events if e["event"] == kind and e["hash"] in keys]

    def push(self, size: int, tokens: list[int]) -> Generated:
        answer = self.engines[size].generate(tokens, tokens=TOKENS)
        wait_for("pushes", lambda: len(self.events(size, "pushed", tokens)) == FULL)
        assert answer.cached == 0
        return answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("sizes")
    model = write_model(path / "model", TINY)
    with start_server(path, host_bytes="128MiB") as server:
        world = World(server, {}, path)
        try:
            for size in SIZES:
                config = hub_config(server.address, event_log=world.log(size), **PATIENT)
                world.engines[size] = Engine.launch(model, config=config, block_size=size)
            for size in SIZES:
                world.engines[size].wait_ready()
                wait_connected(world.log(size))
            yield world
        finally:
            for engine in world.engines.values():
                engine.end()


@pytest.mark.parametrize(("source", "target"), list(permutations(SIZES, 2)))
def test_1_blocks_of_one_size_arrive_as_another(world: World, source: int, target: int) -> None:
    tokens = prompt(1000 * source + target, LENGTH)
    computed = world.push(source, tokens)
    decoded = world.engines[target].generate(tokens, tokens=TOKENS)
    assert answer_complaints(decoded, computed) == []
    assert decoded.cached >= FULL * BLOCK - 1
    pulled = cells(world.events(target, "pulled", tokens), "pulled")
    assert len(pulled) == FULL * TINY.kv_heads
    assert page_complaints(cells(world.events(source, "pushed", tokens), "pushed"), pulled) == []


def test_2_all_of_them_are_in_one_namespace(world: World) -> None:
    with Client.connect(world.server.address) as client:
        assert the_spec(client).block_tokens == BLOCK


def test_3_the_oracle_sees_one_corrupted_page(world: World) -> None:
    tokens = prompt(5, LENGTH)
    computed = world.push(32, tokens)
    with Client.connect(world.server.address) as client:
        corrupt_a_page(client, prefix_hashes(tokens, BLOCK))
    decoded = world.engines[128].generate(tokens, tokens=TOKENS)
    assert answer_complaints(decoded, computed) != []
    pushed = cells(world.events(32, "pushed", tokens), "pushed")
    pulled = cells(world.events(128, "pulled", tokens), "pulled")
    assert len(page_complaints(pushed, pulled)) == 1
