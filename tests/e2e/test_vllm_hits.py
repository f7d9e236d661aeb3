"""Hits that do not pay are not taken: engines with the adapter's default, and a hub made slow.

The hub is behind a relay that holds its answers back; lookups wait for them, so that what decides
is what loads were measured to take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvserver_vllm.config import Settings
from tests.support.delaying import DelayingRelay
from tests.support.engines import PATIENT, Engine, Generated, hub_config
from tests.support.kv_oracle import answer_complaints, wait_connected, wait_for
from tests.support.server import start_server
from tests.support.tiny_models import MEDIUM, prompt, write_model
from tests.support.vllm_metrics import BLOCK, SOURCES, changed, figures, sources, wait_saved

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 12
LONG = 900
WHOLE = LONG // BLOCK * BLOCK
SLOW_S, SLOW_SHARE, SLOW_S_MAX = 1.0, 8, 4.0
"""A slow hub answers after so many times what computing the prompt takes here, and within these:
calls that nobody waits for give up after 5 s. The mean of one slow load and the quick ones before
has to be well above what computing takes, which a busy machine doubles."""
TRIES = 5
"""Slow loads that may pass until they outweigh the quick ones before."""
PATIENCE = {**PATIENT, "lookup_ms": 60_000, "load_deadline_ms": 300_000}


@dataclass
class World:
    """A hub, the relay in front of it, and a model that computes LONG tokens in some 0.3 s."""

    model: Path
    relay: DelayingRelay
    directory: Path

    @contextmanager
    def engine(self, name: str, **settings: object) -> Iterator[Engine]:
        log = self.directory / f"{name}.jsonl"
        config = hub_config(
            self.relay.address, event_log=log, transport="tcp", **{**PATIENCE, **settings}
        )
        with Engine.start(self.model, config=config, kv_bytes=256 << 20) as engine:
            wait_connected(log)
            yield engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("hits")
    model = write_model(path / "model", MEDIUM)
    options = {"tcp_listen": "127.0.0.1:0", "shm_tenants": "nobody", "host_bytes": "512MiB"}
    with start_server(path, **options) as server, DelayingRelay(server.address) as relay:
        yield World(model, relay, path)


def computed(engine: Engine, tokens: list[int]) -> Generated:
    """The answer to a prompt that nobody has; it is at the hub, and forgotten here, afterwards."""
    saved, before = figures(engine)["pushed_bytes"], sources(engine)
    answer = engine.generate(tokens, tokens=TOKENS)
    assert changed(before, sources(engine), *SOURCES) == [LONG, 0, 0, LONG, 0]
    wait_saved(engine, saved, LONG // BLOCK, MEDIUM)
    forget(engine)
    return answer


def forget(engine: Engine) -> None:
    wait_for("a reset of the prefix cache", engine.reset_prefix_cache)


def taken(engine: Engine, tokens: list[int], want: Generated) -> bool:
    """Ask again; whether the hub's blocks were taken. vLLM's figures and the adapter's say so."""
    before, own = sources(engine), figures(engine)
    answer = engine.generate(tokens, tokens=TOKENS)
    assert answer_complaints(answer, want) == []
    forget(engine)
    after = changed(before, sources(engine), *SOURCES)
    ours = changed(own, figures(engine), "hits_declined", "hit_tokens.host", "loads")
    if answer.cached:
        assert (answer.cached, ours) == (WHOLE, [0, WHOLE, 1])
        assert after == [LONG - WHOLE, 0, WHOLE, LONG, WHOLE]
        return True
    assert ours == [1, 0, 0]
    assert after == [LONG, 0, 0, LONG, 0]
    return False


def test_hits_are_taken_while_they_pay_and_declined_once_they_do_not(world: World) -> None:
    assert Settings(address="hub:1").hits == "auto"
    with world.engine("auto", hits="auto") as engine:
        prompts = [prompt(900 + n, LONG, MEDIUM) for n in range(3)]
        wanted = [computed(engine, tokens) for tokens in prompts]
        assert all(taken(engine, *one) for one in zip(prompts, wanted, strict=True))
        own_s = max(answer.ttft_s for answer in wanted)
        slow_s = min(max(SLOW_S, SLOW_SHARE * own_s), SLOW_S_MAX)
        world.relay.delay_s = slow_s
        try:
            began, tries = time.monotonic(), 0
            while tries < TRIES and taken(engine, prompts[0], wanted[0]):
                tries += 1
            spent = f"{tries} loads in {time.monotonic() - began:.1f} s, each answer {slow_s:.1f}"
            assert 0 < tries < TRIES, f"a slow load is what tells that loads are slow: {spent}"
            assert not taken(engine, prompts[1], wanted[1]), "of other prompts too"
        finally:
            world.relay.delay_s = 0.0


def test_settings_force_hits_that_do_not_pay_and_those_that_are_too_small(world: World) -> None:
    """`hits: always` takes what it can get however long it takes, `min_hit_tokens` nothing less."""
    with world.engine("always", hits="always", min_hit_tokens=5 * BLOCK) as engine:
        tokens = prompt(950, LONG, MEDIUM)
        want = computed(engine, tokens)
        world.relay.delay_s = SLOW_S
        try:
            for _ in range(3):
                began = time.monotonic()
                assert taken(engine, tokens, want)
                assert time.monotonic() - began > SLOW_S, "or the hub was not slow"
        finally:
            world.relay.delay_s = 0.0
        small, before = tokens[: 4 * BLOCK + 60], sources(engine)
        assert engine.generate(small, tokens=TOKENS).cached == 0
        assert changed(before, sources(engine), *SOURCES)[4] == 0
