"""One prompt, handed from a prefill engine to a decode engine: to its last token, and streamed.

The prefill engine computes in chunks of 256 tokens, 12 layers each, slowly enough (136 million
parameters) that a decode engine which asks at the same time sees the blocks come in.
"""

from __future__ import annotations

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
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import DEMO, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, CHUNK, TOKENS = 128, 256, 8
LENGTHS = (20, 127, 129, 300, 384)
PROMPTS = [prompt(100 + length, length, DEMO) for length in LENGTHS]
LONG = prompt(1, 1000, DEMO)
PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Pair:
    server: ServerProcess
    prefill: Engine
    decode: Engine
    prefill_log: Path
    decode_log: Path
    alone: dict[int, Generated]

    def hand_off(self, tokens: list[int]) -> Generated:
        """Both legs one after the other, as a proxy does."""
        before = len(cells(read_events(self.prefill_log), "pushed"))
        first = self.prefill.generate(tokens, tokens=1, transfer=PREFILL_LEG)
        assert first.params is not None
        assert len(cells(read_events(self.prefill_log), "pushed")) >= before
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
                    **way.settings(server),
                    **PATIENT,
                )
                engines.append(Engine.launch(model, config=config, max_num_batched_tokens=CHUNK))
            for engine in engines:
                engine.wait_ready()
                engine.generate(prompt(98, 40, DEMO), tokens=2)
            wait_connected(path / "p.jsonl")
            wait_connected(path / "d.jsonl")
            yield Pair(server, *engines, path / "p.jsonl", path / "d.jsonl", alone)
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
