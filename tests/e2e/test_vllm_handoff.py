"""One prompt, handed from a prefill engine to a decode engine: to its last token, and streamed.

The prefill engine computes in chunks of 256 tokens, 12 layers each, slowly enough (136 million
parameters) that a decode engine which asks at the same time sees the blocks come in.
"""

from __future__ import annotations

import signal
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
    page_complaints,
    wait_connected,
    wait_pushed,
)
from tests.support.server import ServerProcess
from tests.support.timeline import Timeline
from tests.support.tiny_models import DEMO, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, CHUNK, TOKENS = 128, 256, 8
LENGTHS = (20, 127, 129, 300, 384)
PROMPTS = [prompt(100 + length, length, DEMO) for length in LENGTHS]
LONG = prompt(1, 1000, DEMO)
PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False}
DECODE_LEG = {"do_remote_prefill": True, "do_remote_decode": False}


@dataclass
class Pair:
    server: ServerProcess
    prefill: Engine
    decode: Engine
    prefill_log: Path
    decode_log: Path
    alone: dict[int, Generated]
    model: Path

    def hand_off(self, tokens: list[int]) -> Generated:
        """Both legs one after the other, as a proxy does."""
        first = self.prefill.generate(tokens, tokens=1, transfer=PREFILL_LEG)
        assert first.params is not None
        return self.decode.generate(tokens, tokens=TOKENS, transfer=first.params)

    def events(self, log: Path, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(log) if event["event"] == name]


@pytest.fixture(scope="module")
def pair(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("handoff")
    model = write_model(path / "model", DEMO)
    with Engine.start(model) as lone:
        prompts = [*PROMPTS, LONG]
        alone = {len(p): lone.generate(p, tokens=TOKENS) for p in prompts}
    engines: list[Engine] = []
    with way.serve(path, host_bytes="512MiB") as server:
        try:
            for name, role in [("p", "kv_producer"), ("d", "kv_consumer")]:
                config = hub_config(
                    server.address,
                    role=role,
                    event_log=path / f"{name}.jsonl",
                    intent_wait_ms=20_000,
                    handoff_wait_ms=25_000,  # on a slow machine three layers take seconds
                    **way.settings(server),
                    **PATIENT,
                )
                engine = Engine.launch(
                    model, config=config, max_num_batched_tokens=CHUNK, torch_threads=1
                )
                engines.append(engine)
            for engine in engines:
                engine.wait_ready()
                engine.generate(prompt(98, 40, DEMO), tokens=2)
            wait_connected(path / "p.jsonl")
            wait_connected(path / "d.jsonl")
            yield Pair(server, *engines, path / "p.jsonl", path / "d.jsonl", alone, model)
        finally:
            for engine in engines:
                engine.close()


@pytest.fixture(scope="module")
def answers(pair: Pair) -> list[Generated]:
    return [pair.hand_off(tokens) for tokens in PROMPTS]


def test_answers_are_a_lone_engines(pair: Pair, answers: list[Generated]) -> None:
    for length, got in zip(LENGTHS, answers, strict=True):
        assert answer_complaints(got, pair.alone[length]) == [], f"prompt of {length} tokens"


def test_one_prompt_token_is_computed_whatever_the_length(
    pair: Pair, answers: list[Generated]
) -> None:
    scheduled = pair.events(pair.decode_log, "scheduled")[1:]  # the first one warmed it up
    assert [(event["tokens"], event["left"]) for event in scheduled] == [(1, 1)] * len(LENGTHS)


def test_the_tails_pages_are_pulled_as_they_were_pushed(
    pair: Pair, answers: list[Generated]
) -> None:
    pushed = cells(read_events(pair.prefill_log), "pushed")
    pulled = cells(read_events(pair.decode_log), "pulled")
    names = {h.hex() for tokens in PROMPTS for h in prefix_hashes(tokens, BLOCK, tail=True)}
    assert {name for name, _ in pulled} == names
    assert page_complaints(pushed, pulled) == []


# ---- streamed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(pair: Pair, answers: list[Generated]) -> Generated:
    """Both legs at once: the decode engine asks while the prompt is being computed."""
    first = pair.prefill.begin([LONG], tokens=1, transfer=PREFILL_LEG)
    second = pair.decode.begin([LONG], tokens=TOKENS, transfer=DECODE_LEG)
    pair.prefill.finish(first)
    return pair.decode.finish(second)[0]


def test_a_streamed_answer_is_a_lone_engines_and_computes_one_token(
    pair: Pair, streamed: Generated
) -> None:
    assert answer_complaints(streamed, pair.alone[len(LONG)]) == []
    last = pair.events(pair.decode_log, "scheduled")[-1]
    assert (last["tokens"], last["left"]) == (1, 1)
    pulled = cells(read_events(pair.decode_log), "pulled")
    names = {h.hex() for h in prefix_hashes(LONG, BLOCK, tail=True)}
    assert names <= {name for name, _ in pulled}
    assert page_complaints(cells(read_events(pair.prefill_log), "pushed"), pulled) == []


def test_layers_are_fetched_while_the_prompt_is_computed(pair: Pair, streamed: Generated) -> None:
    line = Timeline.of(read_events(pair.prefill_log), DEMO.layers)
    assert line.chunks == 4
    fetched = [e for e in pair.events(pair.decode_log, "fetched") if e["t"] > line.began]
    assert len(fetched) == 4 * 8, "four groups of layers of eight blocks"
    early = [event for event in fetched if event["t"] < line.ended]
    assert len(early) >= len(fetched) / 2


def test_most_bytes_are_committed_before_the_last_layer_of_the_last_chunk(
    pair: Pair, streamed: Generated
) -> None:
    assert Timeline.of(read_events(pair.prefill_log), DEMO.layers).early_share >= 0.8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_last_commit_follows_the_prefill_at_once(pair: Pair, streamed: Generated) -> None:
    line = Timeline.of(read_events(pair.prefill_log), DEMO.layers)
    assert line.last_commit_s <= 1.5 * line.layer_s + 0.005


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_control_without_the_layer_hooks_everything_is_pushed_late(
    way: Way, pair: Pair, tmp_path: Path
) -> None:
    config = hub_config(
        pair.server.address,
        role="kv_producer",
        event_log=tmp_path / "p.jsonl",
        layerwise_push=False,
        tenant="",
        **way.settings(pair.server),
        **PATIENT,
    )
    other = prompt(2, len(LONG), DEMO)
    with Engine.start(pair.model, config=config, max_num_batched_tokens=CHUNK) as engine:
        engine.generate(prompt(98, 40, DEMO), tokens=2)
        wait_connected(tmp_path / "p.jsonl")
        engine.generate(other, tokens=1, transfer=PREFILL_LEG)
        wait_pushed(tmp_path / "p.jsonl", len(other) // BLOCK)
    line = Timeline.of(read_events(tmp_path / "p.jsonl"), DEMO.layers)
    assert line.early_share < 0.8


# ---- cut off ---------------------------------------------------------------------------------


def test_z_a_killed_prefill_engine_leaves_what_is_whole(pair: Pair) -> None:
    """In the middle of the second of three chunks, with another hand-off behind it. Last here, for
    that engine is gone then; every other way to lose it stands in test_vllm_handoff_cuts.py."""
    prompts = [prompt(3, 600, DEMO), prompt(4, 200, DEMO)]
    alone = [pair.prefill.generate(tokens, tokens=TOKENS, salt="alone") for tokens in prompts]
    free, before = pair.decode.free_blocks(), len(read_events(pair.decode_log))
    pair.prefill.begin_cut(
        prompts,
        computed=CHUNK + 1,
        layer=DEMO.layers // 2,
        hold_s=0.5,  # what is pushed of the first chunk is at the decode engine by then
        signal_number=signal.SIGKILL,
        transfer=PREFILL_LEG,
    )
    call = pair.decode.begin(prompts, tokens=TOKENS, transfer=DECODE_LEG)
    pair.prefill.wait_gone(60.0)
    gone = time.monotonic()
    for answer, want in zip(pair.decode.finish(call), alone, strict=True):
        assert answer_complaints(answer, want) == []
    events = read_events(pair.decode_log)[before:]
    pulled = cells(events, "pulled")
    kept = prefix_hashes(prompts[0], BLOCK)[: CHUNK // BLOCK]
    assert {name for name, _ in pulled} == {digest.hex() for digest in kept}
    assert page_complaints(cells(read_events(pair.prefill_log), "pushed"), pulled) == []
    rest = [e["t"] for e in events if e["event"] == "scheduled" and e["left"] == 600 - CHUNK]
    assert rest[0] - gone < 5.0
    assert pair.decode.facts()["free"] == free
