"""One engine and its operator: figures in vLLM's own metrics, and a role that changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvclient import AsyncClient, Role
from tests.support.engines import PATIENT, Engine, hub_config
from tests.support.kv_oracle import answer_complaints, wait_connected, wait_for, wait_pushed
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.vllm_metrics import BLOCK, SOURCES, changed, figures, sources, wait_saved

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

TOKENS = 8
PROMPT = prompt(41, 640)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("server"), host_bytes="128MiB") as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine") / "log.jsonl"


@pytest.fixture(scope="module")
def engine(
    server: ServerProcess, log: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    model = write_model(tmp_path_factory.mktemp("model"), TINY, seed=0)
    config = hub_config(server.address, event_log=log, **PATIENT)
    with Engine.start(model, config=config) as engine:
        wait_connected(log)
        yield engine


def test_a_push_and_a_pull_show_in_vllms_own_metrics(engine: Engine, log: Path) -> None:
    blocks = len(PROMPT) // BLOCK
    engine.generate(PROMPT, tokens=TOKENS)
    wait_pushed(log, blocks)
    block_bytes = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4 * BLOCK  # K and V, fp32
    wait_for("the push in the metrics", lambda: bool(figures(engine)["push_seconds"]))
    pushed = figures(engine)
    assert pushed["pushed_bytes"] == blocks * block_bytes
    assert pushed["saves"] >= pushed["push_seconds"] >= 1
    assert (pushed["lookups"], pushed["loads"], pushed["hub_connected"]) == (1, 0, 1)
    wait_for("a reset", engine.reset_prefix_cache)
    answer = engine.generate(PROMPT, tokens=TOKENS)
    assert answer.cached >= (blocks - 1) * BLOCK
    pulled = figures(engine)
    tokens = pulled["hit_tokens.host"]
    assert tokens >= (blocks - 1) * BLOCK
    assert pulled["pulled_bytes"] == -(-tokens // BLOCK) * block_bytes
    assert (pulled["lookups"], pulled["loads"], pulled["pull_seconds"]) == (2, 1, 1)
    assert pulled["loads_failed"] == pulled["hit_tokens.disk"] == 0


def test_vllms_own_metrics_tell_loaded_tokens_from_computed_ones(engine: Engine) -> None:
    """A prompt three times: computed, loaded from the hub, and found where it already lies."""
    tokens = prompt(44, 600)
    saved = figures(engine)["pushed_bytes"]
    first = sources(engine)
    engine.generate(tokens, tokens=TOKENS)
    computed = sources(engine)
    assert changed(first, computed, *SOURCES) == [len(tokens), 0, 0, len(tokens), 0]
    wait_saved(engine, saved, len(tokens) // BLOCK)
    wait_for("a reset", engine.reset_prefix_cache)

    before = figures(engine)
    answer = engine.generate(tokens, tokens=TOKENS)
    loaded = sources(engine)
    external = len(tokens) // BLOCK * BLOCK
    rest = len(tokens) - external
    assert answer.cached == external
    assert changed(before, figures(engine), "hit_tokens.host") == [external]
    assert changed(computed, loaded, *SOURCES) == [rest, 0, external, len(tokens), external]

    again = engine.generate(tokens, tokens=TOKENS)
    here = sources(engine)
    local, rest = again.cached, len(tokens) - again.cached
    assert local >= external
    # What the hub could add is less than a hub block: nothing external is taken.
    assert changed(loaded, here, *SOURCES) == [rest, local, 0, rest, 0]


def test_the_role_changes_with_requests_in_flight(engine: Engine, server: ServerProcess) -> None:
    """Stopped: no pushes, no pulls. Started again: both. What runs meanwhile ends as it would."""
    running, other = prompt(42, 640), prompt(43, 400)
    saved = figures(engine)["pushed_bytes"]
    reference = engine.generate(running, tokens=TOKENS)
    wait_saved(engine, saved, len(running) // BLOCK)
    wait_for("a reset", engine.reset_prefix_cache)

    def switch(**halves: bool) -> Role:
        async def go() -> Role:
            async with AsyncClient.connect(server.address) as operator:
                return await operator.set_role("vllm-", deadline_s=20, **halves)

        return asyncio.run(go())

    before = figures(engine)
    call = engine.begin([running], tokens=TOKENS)
    assert switch(produces=False, consumes=False) == Role(produces=False, consumes=False)
    (during,) = engine.finish(call)
    assert answer_complaints(during, reference) == []
    wait_for("a reset", engine.reset_prefix_cache)
    stopped = figures(engine)
    alone = engine.generate(running, tokens=TOKENS)
    assert answer_complaints(alone, reference) == []
    engine.generate(other, tokens=TOKENS)
    assert alone.cached == 0
    assert changed(stopped, figures(engine), "lookups", "loads", "saves") == [0, 0, 0]
    assert before["hub_connected"] == 1

    assert switch(produces=True, consumes=True) == Role(produces=True, consumes=True)
    wait_for("a reset", engine.reset_prefix_cache)
    again = engine.generate(running, tokens=TOKENS)
    assert answer_complaints(again, reference) == []
    assert again.cached >= (len(running) // BLOCK - 1) * BLOCK
    engine.generate(other, tokens=TOKENS)
    wait_for("the pushes", lambda: changed(stopped, figures(engine), "saves")[0] > 0)
    assert changed(stopped, figures(engine), "loads") == [1]
