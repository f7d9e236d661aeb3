"""Images on real engines: what an image is, and not only its tokens, is part of every key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    page_complaints,
    wait_connected,
    wait_for,
)
from tests.support.server import start_server
from tests.support.tiny_models import VISION, prompt, write_vision_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, TOKENS = 128, 24
TEXT = [token for token in prompt(5, 400) if token != VISION.image_token]
BLOCKS = (VISION.tokens + len(TEXT)) // BLOCK
FIRST, SECOND = 1, 2
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}


def asked(image: int) -> dict[str, Any]:
    """One text behind one image: the same tokens whatever the image."""
    return {"ids": TEXT, "image": image, "pixels": VISION.pixels}


@dataclass
class World:
    source: Engine
    target: Engine
    source_log: Path
    target_log: Path
    alone: dict[int, Generated]

    def pull(self, image: int) -> tuple[Generated, list[dict[str, Any]]]:
        """The answer of an engine that has nothing of it itself, and what it pulled."""
        before = len(read_events(self.target_log))

        def done() -> bool:
            self.target.idle(0.1)
            return self.target.reset_prefix_cache()

        wait_for("a reset of the prefix cache", done)
        answer = self.target.generate(asked(image), tokens=TOKENS)
        events = read_events(self.target_log)[before:]
        return answer, [e for e in events if e["event"] == "pulled"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("images")
    model = write_vision_model(path / "model")
    with Engine.start(model, **OPTIONS) as engine:
        alone = {image: engine.generate(asked(image), tokens=TOKENS) for image in (FIRST, SECOND)}
    logs = [path / "p.jsonl", path / "d.jsonl"]
    engines: list[Engine] = []
    with start_server(path, host_bytes="128MiB") as server:
        try:
            for log in logs:
                config = hub_config(server.address, event_log=log, **PATIENT)
                engines.append(Engine.launch(model, config=config, **OPTIONS))
            for engine, log in zip(engines, logs, strict=True):
                engine.wait_ready()
                wait_connected(log)
            yield World(*engines, *logs, alone)
        finally:
            for engine in engines:
                engine.close()


def test_1_the_same_image_is_a_hit(world: World) -> None:
    computed = world.source.generate(asked(FIRST), tokens=TOKENS)
    assert answer_complaints(computed, world.alone[FIRST]) == []

    def pushed() -> int:
        return sum(e["event"] == "pushed" for e in read_events(world.source_log))

    wait_for("pushes", lambda: pushed() == BLOCKS)
    got, pulled = world.pull(FIRST)
    assert answer_complaints(got, world.alone[FIRST]) == []
    assert got.cached >= BLOCKS * BLOCK - 1
    assert len(pulled) == BLOCKS
    assert len(cells(pulled, "pulled")) == BLOCKS * VISION.kv_heads
    assert (
        page_complaints(cells(read_events(world.source_log), "pushed"), cells(pulled, "pulled"))
        == []
    )


def test_2_another_image_behind_equal_tokens_is_no_hit(world: World) -> None:
    """Keys of tokens alone would meet here."""
    assert answer_complaints(world.alone[FIRST], world.alone[SECOND]), "the image changes nothing"
    got, pulled = world.pull(SECOND)
    assert answer_complaints(got, world.alone[SECOND]) == []
    assert pulled == []
    assert got.cached == 0


def test_3_both_are_hits_from_then_on_and_never_each_others(world: World) -> None:
    wait_for("pushes", lambda: len(keys(world.target_log, "pushed")) == BLOCKS)
    first, one = world.pull(FIRST)
    second, other = world.pull(SECOND)
    assert answer_complaints(first, world.alone[FIRST]) == []
    assert answer_complaints(second, world.alone[SECOND]) == []
    assert len(one) == len(other) == BLOCKS
    assert not {e["hash"] for e in one} & {e["hash"] for e in other}
    logs = [*read_events(world.source_log), *read_events(world.target_log)]
    assert page_complaints(cells(logs, "pushed"), cells([*one, *other], "pulled")) == []


def keys(log: Path, event: str) -> set[str]:
    return {e["hash"] for e in read_events(log) if e["event"] == event}
