"""Who shares with whom: content decides, not names, paths or Python's hash seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvclient import Client
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    page_complaints,
    wait_connected,
    wait_pushed,
)
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import TINY, prompt, write_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS = 128, 12
PROMPT = prompt(21, 640)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("server"), host_bytes="128MiB") as server:
        yield server


def run(
    server: ServerProcess, model: Path, log: Path, *, hash_seed: str = "", block_size: int = 32
) -> Generated:
    """One engine's life: start, answer, push, end. Without `hash_seed` it has its fork server's:
    drawn at random, if the environment does not tell it."""
    config = hub_config(server.address, event_log=log, **PATIENT)
    environment = {"PYTHONHASHSEED": hash_seed} if hash_seed else {}
    with Engine.start(
        model, config=config, environment=environment, block_size=block_size
    ) as engine:
        wait_connected(log)
        answer = engine.generate(PROMPT, tokens=TOKENS)
        if not cells(read_events(log), "pulled"):
            wait_pushed(log, len(PROMPT) // BLOCK)
        return answer


@pytest.fixture(scope="module")
def first(
    server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Generated]:
    """(model, log, answer) of the engine that computed the prompt."""
    path = tmp_path_factory.mktemp("first")
    model = write_model(path / "model", TINY, seed=0)
    return model, path / "log.jsonl", run(server, model, path / "log.jsonl")


def test_another_name_hash_seed_and_block_size_share(
    server: ServerProcess, first: tuple[Path, Path, Generated], tmp_path: Path
) -> None:
    model, log, computed = first
    moved = tmp_path / "another-name"
    moved.symlink_to(model)
    another = "3" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    decoded = run(server, moved, tmp_path / "log.jsonl", hash_seed=another, block_size=128)
    pulled = cells(read_events(tmp_path / "log.jsonl"), "pulled")
    assert len(pulled) == len(PROMPT) // BLOCK * TINY.kv_heads
    assert page_complaints(cells(read_events(log), "pushed"), pulled) == []
    assert answer_complaints(decoded, computed) == []


def test_other_weights_never_share(
    server: ServerProcess, first: tuple[Path, Path, Generated], tmp_path: Path
) -> None:
    _, _, computed = first
    model = write_model(tmp_path / "model", TINY, seed=1)
    answer = run(server, model, tmp_path / "log.jsonl")
    events = read_events(tmp_path / "log.jsonl")
    assert cells(events, "pulled") == {}
    assert [e["usable"] for e in events if e["event"] == "lookup"] == [0]
    assert answer.cached == 0
    assert answer.tokens != computed.tokens
    with Client.connect(server.address) as client:
        known = client.list_namespaces()
    assert len(known) == 2
    assert len({one.spec.weights for one in known}) == 2
    assert any("weights" in note for one in known for note in one.near_misses)
