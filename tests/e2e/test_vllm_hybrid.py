"""Layers of several kinds on real engines: full attention and sliding windows, each a section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvclient import Client
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    corrupt_a_page,
    flip_a_bit,
    page_complaints,
    specs_of,
    wait_connected,
    wait_for,
)
from tests.support.model_zoo import ids, write_family
from tests.support.server import ServerProcess, start_server

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS = 128, 12
WINDOW = 65  # vLLM gives Cohere2 one token more than its configuration says
PROMPTS = {"whole": ids(1, 700), "cut": ids(2, 600), "exact": ids(4, 5 * BLOCK)}
CHUNK = 160
"""Tokens of a prefill chunk: chunks end inside hub blocks, and the window inside them too."""


@dataclass
class World:
    server: ServerProcess
    decode: Engine
    log: Path
    decode_log: Path
    computed: dict[str, Generated]

    def answer(self, name: str) -> tuple[Generated, list[dict[str, Any]]]:
        """A prompt's answer, with nothing of it in the engine's own cache, and the events of it."""
        before = len(read_events(self.decode_log))

        def done() -> bool:
            self.decode.idle(0.1)
            return self.decode.reset_prefix_cache()

        wait_for("a reset of the prefix cache", done)
        answer = self.decode.generate(PROMPTS[name], tokens=TOKENS)
        return answer, read_events(self.decode_log)[before:]


def pushed_blocks(log: Path) -> dict[int, set[str]]:
    """Hashes of the blocks that were pushed, by window."""
    found: dict[int, set[str]] = {}
    for event in read_events(log):
        if event["event"] == "pushed":
            found.setdefault(event["window"], set()).add(event["hash"])
    return found


def counts(blocks: dict[int, set[str]]) -> dict[int, int]:
    return {window: len(hashes) for window, hashes in blocks.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An engine has prefilled the prompts and is gone; one with blocks of another size decodes."""
    path = tmp_path_factory.mktemp("hybrid")
    model = write_family(path / "model", "cohere2")
    log, decode_log = path / "p.jsonl", path / "d.jsonl"
    computed = {}
    with start_server(path, host_bytes="128MiB") as server:
        config = hub_config(server.address, event_log=log, role="kv_producer", **PATIENT)
        chunks = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True}
        with Engine.start(model, config=config, block_size=32, **chunks) as engine:
            wait_connected(log)
            for name, tokens in PROMPTS.items():
                computed[name] = engine.generate(tokens, tokens=TOKENS)
            want = {0: 14, WINDOW: 11}
            wait_for(
                "all pushes", lambda: {k: len(v) for k, v in pushed_blocks(log).items()} == want
            )
        config = hub_config(server.address, event_log=decode_log, **PATIENT)
        with Engine.start(model, config=config, block_size=64) as engine:
            wait_connected(decode_log)
            yield World(server, engine, log, decode_log, computed)


def test_1_each_kind_of_layer_has_a_namespace_of_its_own(world: World) -> None:
    with Client.connect(world.server.address) as client:
        specs = {spec.attributes["section"]: spec for spec in specs_of(client)}
    assert {name: spec.layers for name, spec in specs.items()} == {"full": 1, "window 65": 3}


def test_2_blocks_whose_window_was_given_up_are_pushed_for_the_full_layers_only(
    world: World,
) -> None:
    pushed = pushed_blocks(world.log)
    for name, tokens in PROMPTS.items():
        hashes = [digest.hex() for digest in prefix_hashes(tokens, BLOCK)]
        gone = {at for at, digest in enumerate(hashes) if digest not in pushed[WINDOW]}
        assert (name, gone) == (name, {3})
        assert set(hashes) <= pushed[0]


def test_3_a_decode_engine_pulls_every_block_of_the_full_layers_and_the_window_of_others(
    world: World,
) -> None:
    got, events = world.answer("whole")
    assert answer_complaints(got, world.computed["whole"]) == []
    assert got.cached >= 5 * BLOCK - 1
    pulled = [(e["window"], e["at"]) for e in events if e["event"] == "pulled"]
    assert pulled == [(0, [0, 1, 2, 3])] * 5 + [(WINDOW, [2, 3])]
    pushed = cells(read_events(world.log), "pushed")
    assert page_complaints(pushed, cells(events, "pulled")) == []


def test_4_a_prefix_ends_where_the_hub_has_its_window(world: World) -> None:
    """All blocks of the full layers are there, but of the last one not the window."""
    got, events = world.answer("cut")
    assert answer_complaints(got, world.computed["cut"]) == []
    assert [e["usable"] for e in events if e["event"] == "lookup"] == [3]
    assert 3 * BLOCK - 1 <= got.cached < 4 * BLOCK


def test_4b_a_prompt_that_ends_with_a_block_keeps_its_whole_window(world: World) -> None:
    """The last token is computed again, and it sees one token more than the next one would. With
    this window and block size that token is the last of an engine block, which vLLM gives up when
    it is told that every token of the prompt is there."""
    got, events = world.answer("exact")
    assert answer_complaints(got, world.computed["exact"]) == []
    assert got.cached == 5 * BLOCK - 1
    pulled = [(e["window"], e["at"]) for e in events if e["event"] == "pulled"]
    assert pulled == [(0, [0, 1, 2, 3])] * 5 + [(WINDOW, [0, 1, 2, 3])]


def test_5_a_failed_load_restarts_the_request_and_is_no_hit_again(world: World) -> None:
    """vLLM takes no failed blocks where there are several groups: the whole request is computed."""
    hashes = prefix_hashes(PROMPTS["whole"], BLOCK)
    with Client.connect(world.server.address) as client:
        flip_a_bit(world.server, client, window_spec(client), hashes[4], layer=1, head=1)
    got, events = world.answer("whole")
    assert answer_complaints(got, world.computed["whole"]) == []
    assert [e["index"] for e in events if e["event"] == "failed_block"] == [4]
    assert len([e for e in events if e["event"] == "lookup"]) == 1


def test_6_the_oracle_sees_one_corrupted_page(world: World) -> None:
    hashes = prefix_hashes(PROMPTS["cut"], BLOCK)[:3]
    with Client.connect(world.server.address) as client:
        (full,) = (spec for spec in specs_of(client) if spec != window_spec(client))
        corrupt_a_page(client, hashes, full)
    got, events = world.answer("cut")
    pushed = cells([*read_events(world.log), *read_events(world.decode_log)], "pushed")
    assert len(page_complaints(pushed, cells(events, "pulled"))) == 1
    assert answer_complaints(got, world.computed["cut"]) != []


def window_spec(client: Client) -> NamespaceSpec:
    (spec,) = (s for s in specs_of(client) if s.attributes["section"] == f"window {WINDOW}")
    return spec
