"""LoRA on real engines: an adapter is its content, whatever an engine calls it.

One prompt on three models: the base and two adapters. The second engine has copies of the adapters
with their names swapped, and a third adapter that nobody pushed under the name of one that was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
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
from tests.support.tiny_models import prompt, write_adapter, write_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT = prompt(1, 400)
BLOCKS, TOKENS = 3, 12
OPTIONS: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4}

Lora = dict[str, Any] | None
"""The fields of a LoRARequest; None is the base."""


@dataclass
class World:
    path: Path
    alone: Engine
    source: Engine
    target: Engine

    def events(self, engine: str) -> list[dict[str, Any]]:
        return read_events(self.path / f"{engine}.jsonl")

    def push(self, asked: list[int], lora: Lora, **options: Any) -> tuple[Generated, set[str]]:
        """The source's answer, and the blocks that it pushed; it must have pulled none."""
        before = len(self.events("source"))
        answer = self.source.generate(asked, lora=lora, **options)
        wait_for("pushes", lambda: len(self.hashes("source", "pushed", before)) >= BLOCKS)
        assert not self.hashes("source", "pulled", before)
        return answer, self.hashes("source", "pushed", before)

    def hashes(self, engine: str, event: str, since: int) -> set[str]:
        return {e["hash"] for e in self.events(engine)[since:] if e["event"] == event}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("lora")
    model = write_model(path / "model")
    for seed, name in enumerate(["one", "two", "three"], start=1):
        write_adapter(path / name, seed=seed)
    for name in ["one", "two"]:
        shutil.copytree(path / name, path / "copies" / name)
    engines: dict[str, Engine] = {}
    with start_server(path) as server:
        try:
            engines["alone"] = Engine.launch(model, **OPTIONS)
            for name in ["source", "target"]:
                config = hub_config(server.address, event_log=path / f"{name}.jsonl", **PATIENT)
                engines[name] = Engine.launch(model, config=config, **OPTIONS)
            for name, engine in engines.items():
                engine.wait_ready()
                if name != "alone":
                    wait_connected(path / f"{name}.jsonl")
            yield World(path, **engines)
        finally:
            for engine in engines.values():
                engine.close()


def adapter(name: str, number: int, path: Path) -> Lora:
    return {"lora_name": name, "lora_int_id": number, "lora_path": str(path)}


def test_the_base_and_adapters_never_mix_and_equal_content_is_shared(world: World) -> None:
    first, second = world.path / "one", world.path / "two"
    source = {"base": None, "one": adapter("a", 1, first), "two": adapter("b", 2, second)}
    pushed: dict[str, set[str]] = {}
    want = {}
    for content, lora in source.items():
        want[content] = world.alone.generate(PROMPT, tokens=TOKENS, lora=lora)
        got, pushed[content] = world.push(PROMPT, lora, tokens=TOKENS)
        assert answer_complaints(got, want[content]) == []
        assert len(pushed[content]) == BLOCKS
    for one, other in combinations(source, 2):
        assert want[one].logprobs[0] != want[other].logprobs[0], "equal models show nothing"
        assert not pushed[one] & pushed[other]

    copies = world.path / "copies"
    target = {"two": adapter("a", 8, copies / "two"), "one": adapter("b", 9, copies / "one")}
    for content, lora in {"base": None, **target}.items():
        before = len(world.events("target"))
        got = world.target.generate(PROMPT, tokens=TOKENS, lora=lora)
        assert world.hashes("target", "pulled", before) == pushed[content], content
        assert answer_complaints(got, want[content]) == []
    pulled = cells(world.events("target"), "pulled")
    assert page_complaints(cells(world.events("source"), "pushed"), pulled) == []


def test_another_adapter_of_a_known_name_pulls_nothing(world: World) -> None:
    tokens = prompt(2, 400)
    _, pushed = world.push(tokens, adapter("c", 3, world.path / "one"), tokens=1)
    other = adapter("c", 3, world.path / "three")
    before = len(world.events("target"))
    got = world.target.generate(tokens, tokens=TOKENS, lora=other)
    assert not world.hashes("target", "pulled", before)
    assert answer_complaints(got, world.alone.generate(tokens, tokens=TOKENS, lora=other)) == []
    equal = adapter("d", 10, world.path / "copies" / "one")
    before = len(world.events("target"))
    world.target.generate(tokens, tokens=1, lora=equal)
    assert world.hashes("target", "pulled", before) == pushed
