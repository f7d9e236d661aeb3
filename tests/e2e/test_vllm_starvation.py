"""A decode engine with few blocks: nobody waits for the hub in them, and none is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvproto.prefix import prefix_hashes
from tests.support.engines import Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    DISTINCT_TOKENS_MIN,
    answer_complaints,
    cells,
    page_complaints,
    the_spec,
    wait_connected,
    wait_for,
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, ENGINE_BLOCK, TOKENS = 128, 32, 8
FEW_BLOCKS = 40
LONG = prompt(51, 900)
PLAIN = prompt(52, 40)
SAME = prompt(53, 700)
DECODE_LEG = {"do_remote_prefill": True, "do_remote_decode": False}


@dataclass
class Small:
    way: Way
    server: ServerProcess
    engine: Engine
    writer: Engine
    log: Path
    writer_log: Path

    def write(self, tokens: list[int]) -> Generated:
        """Have the other engine compute and push a prompt; its answer is the one to be had."""
        answer = self.writer.generate(tokens, tokens=TOKENS)
        names = {digest.hex() for digest in prefix_hashes(tokens, BLOCK)}
        wait_for("the push", lambda: names <= {name for name, _ in self.pushed()})
        return answer

    def pushed(self) -> dict[tuple[str, int], str]:
        return cells(read_events(self.writer_log), "pushed")

    def events(self, name: str) -> int:
        return sum(event["event"] == name for event in read_events(self.log))


@pytest.fixture(scope="module")
def small(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    path = tmp_path_factory.mktemp("small")
    model = write_model(path / "model", TINY)
    patient = {"lookup_ms": 2000, "pin_ms": 10_000, "load_deadline_ms": 40_000}
    with way.serve(path, host_bytes="128MiB") as server:

        def config(name: str, role: str) -> dict[str, object]:
            log = path / f"{name}.jsonl"
            return hub_config(
                server.address, role=role, event_log=log, **way.settings(server), **patient
            )

        few = FEW_BLOCKS * ENGINE_BLOCK * TINY.kv_bytes_per_token
        engine = Engine.launch(model, config=config("d", "kv_consumer"), kv_bytes=few)
        writer = Engine.launch(model, config=config("p", "kv_producer"))
        try:
            for one, log in ((engine, "d"), (writer, "p")):
                one.wait_ready()
                one.generate(prompt(98, 40), tokens=2)
                wait_connected(path / f"{log}.jsonl")
            yield Small(way, server, engine, writer, path / "d.jsonl", path / "p.jsonl")
        finally:
            engine.close()
            writer.close()


def test_a_hub_that_stops_in_mid_pull_keeps_no_blocks_from_others(small: Small) -> None:
    """Half of the long prompt is there and the rest announced when the hub stops."""
    small.write(LONG[: 4 * BLOCK])
    alone = small.writer.generate(PLAIN, tokens=TOKENS)
    hashes = prefix_hashes(LONG, BLOCK)
    fetched = small.events("fetched")
    with small.way.blocking(small.server) as client:
        namespace = client.open_namespace(the_spec(client))
        assert namespace.announce(hashes[4:], 60.0) == len(hashes) - 4
        call = small.engine.begin([LONG, PLAIN], tokens=TOKENS, delays=[0.0, 0.7])
        wait_for("the first half", lambda: small.events("fetched") >= fetched + 4 * 4)
        small.server.stop_signal()
        try:
            long, plain = small.engine.finish(call)
        finally:
            small.server.cont()
    assert plain.total_s < 3.0, "a load holds its blocks for the four seconds of a standstill"
    assert answer_complaints(plain, alone) == []
    assert answer_complaints(long, small.writer.generate(LONG, tokens=TOKENS)) == []
    pulled = cells(read_events(small.log), "pulled")
    assert {name for name, _ in pulled} >= {h.hex() for h in hashes[:4]}, "what was whole is kept"
    assert page_complaints(small.pushed(), pulled) == []


def test_twenty_four_equal_prompts_are_pulled_once(small: Small) -> None:
    want = small.write(SAME)
    before = small.events("pulled")
    answers = small.engine.generate_many([SAME] * 24, tokens=TOKENS)
    assert small.events("pulled") - before == len(SAME) // BLOCK
    for answer in answers:
        assert answer_complaints(answer, want) == []


def test_thirty_mixed_requests_drain_and_give_every_block_back(small: Small) -> None:
    small.engine.reset_prefix_cache()
    free = small.engine.free_blocks()
    assert free == FEW_BLOCKS - 1, "what `kv_bytes` makes, less vLLM's null block"
    hits = [prompt(60 + n, 300 + 64 * n) for n in range(5)]
    wanted = [small.write(tokens) for tokens in hits]
    others = [prompt(80 + n, 40 + 60 * n) for n in range(10)]
    alone = [small.writer.generate(tokens, tokens=TOKENS) for tokens in others]
    began = time.monotonic()
    delays = [0.02 * n for n in range(30)]
    mixed = [*hits, *others] * 2
    answers = small.engine.finish(
        small.engine.begin(mixed, tokens=TOKENS, delays=delays), timeout_s=60.0
    )
    assert time.monotonic() - began < 60
    for answer, want in zip(answers, [*wanted, *alone] * 2, strict=True):
        complaints = answer_complaints(answer, want)
        assert [c for c in complaints if not c.startswith("only ")] == []
    assert len({token for answer in answers for token in answer.tokens}) >= DISTINCT_TOKENS_MIN

    def all_free() -> bool:
        small.engine.idle(0.2)
        return small.engine.free_blocks() == free

    wait_for("every block to come back", all_free)
