"""Every kind of request on engines that share a hub: what may hit does, what must not does not.

Prompts are computed and pushed by one engine (chunks of 256 tokens), answered by another that
pulls, and compared with an engine that never saw a hub. A third engine has little memory, no prefix
caching and ngram speculation. The tests at the end change the engines' weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, Prompt, hub_config, read_events
from tests.support.kv_oracle import (
    Cells,
    answer_complaints,
    cells,
    page_complaints,
    wait_connected,
    wait_for,
)
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import TINY, prompt, write_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS, CHUNK = 128, 12, 256
TIGHT_BLOCKS = 48
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@dataclass
class World:
    path: Path
    server: ServerProcess
    alone: Engine
    source: Engine
    target: Engine
    tight: Engine

    def events(self, engine: str) -> list[dict[str, Any]]:
        return read_events(self.path / f"{engine}.jsonl")

    def pushed(self, *engines: str) -> Cells:
        return {key: v for name in engines for key, v in cells(self.events(name), "pushed").items()}

    def push(self, asked: Prompt, /, *, engine: str = "source", **options: Any) -> Generated:
        """Compute a prompt on an engine and wait until its blocks are at the hub."""
        before = len(self.done(engine))
        answer: Generated = getattr(self, engine).generate(asked, **options)
        wait_for("pushes", lambda: len(self.done(engine)) > before and self.quiet(engine))
        return answer

    def done(self, engine: str) -> list[dict[str, Any]]:
        return [e for e in self.events(engine) if e["event"] == "push_done"]

    def quiet(self, engine: str) -> bool:
        """Whether every push that began has ended."""
        started = {j for e in self.events(engine) if e["event"] == "save_layer" for j in e["jobs"]}
        lost = {e["job"] for e in self.events(engine) if e["event"] == "save_lost"}
        return started <= {e["job"] for e in self.done(engine)} | lost

    def pull(self, asked: Prompt, /, *, engine: str = "target", **options: Any) -> Pulled:
        """The answer of an engine, and what it pulled meanwhile."""
        before = len(self.events(engine))
        answer = getattr(self, engine).generate(asked, **options)
        return Pulled(answer, self.events(engine)[before:])

    def expect(self, asked: Prompt, /, **options: Any) -> Generated:
        return self.alone.generate(asked, **options)


@dataclass
class Pulled:
    answer: Generated
    events: list[dict[str, Any]]

    @property
    def cells(self) -> Cells:
        return cells(self.events, "pulled")

    @property
    def blocks(self) -> list[str]:
        return [e["hash"] for e in self.events if e["event"] == "pulled"]

    @property
    def lookups(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "lookup"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of the weights."""
    path = tmp_path_factory.mktemp("models")
    return write_model(path / "one", seed=0), write_model(path / "two", seed=1)


@pytest.fixture(scope="module")
def world(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("requests")
    common: dict[str, Any] = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True}
    shared = {**common, "enable_prompt_embeds": True, "scheduling_policy": "priority"}
    tight = {**common, "enable_prefix_caching": False, "num_gpu_blocks_override": TIGHT_BLOCKS}
    tight["speculative_config"] = NGRAM
    engines: dict[str, Engine] = {}
    with start_server(path, host_bytes="128MiB") as server:
        try:
            engines["alone"] = Engine.launch(models[0], enable_prompt_embeds=True)
            for name, options in [("source", shared), ("target", shared), ("tight", tight)]:
                config = hub_config(server.address, event_log=path / f"{name}.jsonl", **PATIENT)
                engines[name] = Engine.launch(models[0], config=config, **options)
            for name, engine in engines.items():
                engine.wait_ready()
                if name != "alone":
                    wait_connected(path / f"{name}.jsonl")
            yield World(path, server, **engines)
        finally:
            for engine in engines.values():
                engine.close()


def test_chunks_of_a_prompt_are_pushed_as_they_are_computed(world: World) -> None:
    tokens = prompt(1, 900)
    computed = world.push(tokens, tokens=TOKENS)
    saves = [e["blocks"] for e in world.done("source")]
    assert saves == [2, 2, 2, 1], "four chunks of two blocks, the last of one and a tail"
    got = world.pull(tokens, tokens=TOKENS)
    want = world.expect(tokens, tokens=TOKENS)
    assert answer_complaints(computed, want) == []
    assert answer_complaints(got.answer, want) == []
    assert len(got.blocks) == 7
    assert page_complaints(world.pushed("source"), got.cells) == []


@pytest.mark.parametrize("known", [280, 300])
def test_what_the_engine_has_itself_is_not_pulled(world: World, known: int) -> None:
    """A local hit first, the hub's blocks behind it; one of them in part at 300."""
    tokens = prompt(10 + known, 640)
    hashes = [digest.hex() for digest in prefix_hashes(tokens, BLOCK)]
    world.push(tokens, tokens=1)
    assert world.pull(tokens[:known], tokens=1).blocks == hashes[:2]
    got = world.pull(tokens, tokens=TOKENS)
    assert got.blocks == hashes[2:]
    assert got.answer.cached >= 639
    assert answer_complaints(got.answer, world.expect(tokens, tokens=TOKENS)) == []
    whole = {key: value for key, value in got.cells.items() if key[0] != hashes[2] or known == 280}
    assert page_complaints(world.pushed("source"), whole) == []


def test_replies_are_part_of_the_next_turns_prefix(world: World) -> None:
    first = prompt(3, 300)
    reply = world.push(first, tokens=90)
    second = [*first, *reply.tokens, *prompt(4, 40)]
    got = world.pull(second, tokens=TOKENS)
    assert len(got.blocks) == (len(first) + 89) // BLOCK == 3
    assert page_complaints(world.pushed("source"), got.cells) == []
    assert answer_complaints(got.answer, world.expect(second, tokens=TOKENS)) == []


def test_samples_of_one_prompt_pull_it_once(world: World) -> None:
    tokens = prompt(5, 500)
    world.push(tokens, tokens=1)
    sampling = {"n": 4, "temperature": 1.0, "seed": 11, "tokens": TOKENS}
    got, want = world.pull(tokens, **sampling), world.expect(tokens, **sampling)
    assert len(got.blocks) == 3
    assert got.answer.tokens == want.tokens
    assert got.answer.others == want.others
    assert len({tuple(other) for other in [want.tokens, *want.others]}) == 4


def test_salted_prompts_meet_only_equal_salts(world: World) -> None:
    tokens = prompt(6, 400)
    world.push(tokens, tokens=1, salt="a")
    want = world.expect(tokens, tokens=TOKENS)
    for salt, blocks in [(None, 0), ("b", 0), ("a", 3)]:
        got = world.pull(tokens, tokens=TOKENS, salt=salt)
        assert len(got.blocks) == blocks, f"salt {salt}"
        assert answer_complaints(got.answer, want) == []


def test_priorities_change_the_order_only(world: World) -> None:
    prompts = [prompt(70 + number, 400) for number in range(3)]
    for tokens in prompts:
        world.push(tokens, tokens=1)
    before = len(world.events("target"))
    call = world.target.begin([prompt(79, 800)], tokens=TOKENS, priority=5)
    answers = world.target.finish(call)
    for number, tokens in enumerate(prompts):
        call = world.target.begin([tokens, prompts[0]], tokens=TOKENS, priority=-number)
        got, _ = world.target.finish(call)
        assert answer_complaints(got, world.expect(tokens, tokens=TOKENS)) == []
    assert answer_complaints(answers[0], world.expect(prompt(79, 800), tokens=TOKENS)) == []
    pulled = cells(world.events("target")[before:], "pulled")
    assert len(pulled) == 3 * 3 * TINY.kv_heads
    assert page_complaints(world.pushed("source"), pulled) == []


@pytest.mark.parametrize("option", [{"prompt_logprobs": 3}, {"skip_reading_prefix_cache": True}])
def test_who_wants_every_token_computed_is_not_looked_up(
    world: World, option: dict[str, Any]
) -> None:
    tokens = prompt(80 + len(next(iter(option))), 400)
    world.push(tokens, tokens=1)
    got = world.pull(tokens, tokens=TOKENS, **option)
    assert got.lookups == []
    assert got.blocks == []
    assert got.answer.cached == 0
    assert answer_complaints(got.answer, world.expect(tokens, tokens=TOKENS)) == []


def test_prompts_of_embeddings_are_their_bytes(world: World) -> None:
    """They have no tokens: two of one length differ by their rows alone."""
    one, other = ({"seed": seed, "tokens": 400, "hidden": TINY.hidden} for seed in (1, 2))
    world.push(one, tokens=1)
    got = world.pull(other, tokens=TOKENS)
    assert [e["usable"] for e in got.lookups] == [0]
    assert answer_complaints(got.answer, world.expect(other, tokens=TOKENS)) == []
    assert world.pull([0] * 400, tokens=1).blocks == [], (
        "the zeros that stand for them are no embeddings"
    )
    got = world.pull(one, tokens=TOKENS)
    assert len(got.blocks) == 3
    assert page_complaints(world.pushed("source"), got.cells) == []
    assert answer_complaints(got.answer, world.expect(one, tokens=TOKENS)) == []


def test_preempted_requests_compute_again_what_they_lost(world: World) -> None:
    """Five requests of 390 tokens in a pool of 1,536, each with a prefix from the hub."""
    prompts = [prompt(90 + number, 310) for number in range(5)]
    for tokens in prompts:
        world.push(tokens, tokens=1)
    free = world.tight.facts()["free"]
    before = len(world.events("tight"))
    answers = world.tight.generate_many(prompts, tokens=80)
    facts = world.tight.facts()
    assert facts["preempted"] > 0, "the pool was not too small"
    for tokens, got in zip(prompts, answers, strict=True):
        assert answer_complaints(got, world.expect(tokens, tokens=80)) == []
    pulled = cells(world.events("tight")[before:], "pulled")
    assert len(pulled) >= 5 * 2 * TINY.kv_heads
    assert page_complaints(world.pushed("source", "tight"), pulled) == []
    assert facts["free"] == free


def test_rejected_drafts_are_never_saved(world: World) -> None:
    """Replies that were speculated upon are pulled by an engine without speculation."""
    first = (prompt(12, 40) * 8)[:300]
    reply = world.push(first, engine="tight", tokens=90)
    assert answer_complaints(reply, world.expect(first, tokens=90)) == []
    second = [*first, *reply.tokens, *prompt(4, 40)]
    got = world.pull(second, tokens=TOKENS)
    assert len(got.blocks) == 3
    assert page_complaints(world.pushed("tight"), got.cells) == []
    assert answer_complaints(got.answer, world.expect(second, tokens=TOKENS)) == []


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("source", "tight"), pytest.param("tight", "target", marks=pytest.mark.slow)],
)
def test_after_a_hand_off_one_prompt_token_is_computed_with_drafts_or_without(
    world: World, prefill: str, decode: str
) -> None:
    """vLLM fills the first step of an engine that speculates up with drafts that nobody made."""
    step = 1 + NGRAM["num_speculative_tokens"] if decode == "tight" else 1
    drafted = world.tight.metrics()["vllm:spec_decode_num_draft_tokens"]
    for length in (129, 300):
        tokens = (prompt(length + step, 40) * 10)[:length]
        first = world.push(tokens, engine=prefill, tokens=1, transfer={"do_remote_decode": True})
        got = world.pull(tokens, engine=decode, tokens=40, transfer=first.params)
        scheduled = [(e["tokens"], e["left"]) for e in got.events if e["event"] == "scheduled"]
        assert scheduled == [(step, 1)], f"prompt of {length} tokens"
        assert got.blocks == [h.hex() for h in prefix_hashes(tokens, BLOCK, tail=True)]
        assert page_complaints(world.pushed(prefill), got.cells) == []
        assert answer_complaints(got.answer, world.expect(tokens, tokens=40)) == []
    speculated = world.tight.metrics()["vllm:spec_decode_num_draft_tokens"] > drafted
    assert speculated == (decode == "tight")


@pytest.mark.parametrize("phase", ["waiting", "loading", "prefill", "decode"])
def test_a_request_aborted_in_any_phase_leaves_nothing_behind(world: World, phase: str) -> None:
    tokens = prompt(["waiting", "loading", "prefill", "decode"].index(phase) + 40, 900)
    free = world.target.facts()["free"]
    if phase == "loading":
        world.push(tokens, tokens=1)
    if phase == "waiting":
        world.server.stop_signal()
    try:
        left = world.target.abort_in(phase, tokens)
    finally:
        world.server.cont()
    assert left == free
    got = world.target.generate(tokens, tokens=TOKENS)
    assert answer_complaints(got, world.expect(tokens, tokens=TOKENS)) == []
    assert world.target.facts()["free"] == free


# ---- from here on the weights change: order matters -------------------------------------------


def test_y1_asleep_and_awake_nothing_old_is_used(world: World) -> None:
    """Sleep, as vLLM has it on CPU: the caches are dropped; the weights stay."""
    tokens = prompt(50, 640)
    world.push(tokens, tokens=1)
    world.target.sleep()
    before = len(world.events("target"))
    got = world.pull(tokens, tokens=TOKENS)
    assert got.blocks == []
    assert answer_complaints(got.answer, world.expect(tokens, tokens=TOKENS)) == []

    def all_pushed() -> bool:
        return [e["event"] for e in world.events("target")[before:]].count("pushed") >= 5

    wait_for("pushes", all_pushed)
    wait_for("a reset", world.target.reset_prefix_cache)
    assert len(world.pull(tokens, tokens=TOKENS).blocks) == 5, "its own blocks are found again"


def test_y2_weights_that_change_while_blocks_are_pushed(
    world: World, models: tuple[Path, Path]
) -> None:
    """The request is computed anew with the new weights; the hub keeps what the old ones made."""
    tokens = prompt(51, 900)
    want = world.expect(tokens, tokens=TOKENS)
    got, old_tokens, _ = world.source.reload_in("prefill", tokens, models[1], tokens=TOKENS)
    assert old_tokens == 0
    assert got.tokens != want.tokens
    old = world.pull(tokens, engine="tight", tokens=TOKENS)
    assert answer_complaints(old.answer, want) == []
    again = world.pull(tokens, engine="source", tokens=TOKENS)
    assert again.blocks == []
    world.alone.sleep(models[1])
    want = world.expect(tokens, tokens=TOKENS)
    assert answer_complaints(got, want) == []
    assert answer_complaints(again.answer, want) == []


def test_y3_weights_that_change_while_blocks_are_pulled(
    world: World, models: tuple[Path, Path]
) -> None:
    """vLLM resets nothing under a load: a word may be said with the old weights before. From
    there on it is computed anew, and nothing that was loaded is used."""
    tokens = prompt(50, 640)
    before = len(world.events("target"))
    wait_for("a reset", world.target.reset_prefix_cache)
    got, said, refused = world.target.reload_in("loading", tokens, models[1], tokens=TOKENS)
    events = world.events("target")[before:]
    assert refused > 0
    assert [e["event"] for e in events].count("pulled") == 5
    assert said < TOKENS // 2
    want = world.expect([*tokens, *got.tokens[:said]], tokens=TOKENS - said)
    after = replace(got, tokens=got.tokens[said:], logprobs=got.logprobs[said:])
    assert answer_complaints(after, want) == []
    wait_for("a reset", world.target.reset_prefix_cache)
    again = world.pull(tokens, tokens=TOKENS)
    assert again.blocks == [], "a request from before the reset is not pushed"
    assert answer_complaints(again.answer, world.expect(tokens, tokens=TOKENS)) == []
