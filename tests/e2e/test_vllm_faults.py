"""The hub goes away in every way it can; the engine serves on and finds it again by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvproto.prefix import prefix_hashes
from kvproto.v1 import kvserver_pb2 as pb
from tests.support.engines import Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    flip_a_bit,
    page_complaints,
    the_spec,
    wait_for,
    wait_pushed,
)
from tests.support.server import ServerProcess
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, TOKENS = 128, 12
PROMPT = prompt(31, 640)
BLOCKS = len(PROMPT) // BLOCK
STOPPED_S = 20.0
LOOKUP_MS = 1500
PIN_MS = 2000
RESUME_S = 5.0
LOAD_MS = 4000


@dataclass
class World:
    way: Way
    engine: Engine
    server: ServerProcess
    log: Path
    baseline: Generated

    def answer(self, tokens: int = TOKENS) -> Generated:
        """The prompt again, with nothing of it left in the engine's own cache."""
        self.forget()
        return self.engine.generate(PROMPT, tokens=tokens)

    def forget(self, *, connector: bool = False) -> None:
        """Empty the engine's own cache, once no push pins its blocks any more."""

        def done() -> bool:
            self.engine.idle(0.1)
            return self.engine.reset_prefix_cache(connector=connector)

        wait_for("a reset of the prefix cache", done, PIN_MS / 1e3 + 2.5)

    def pulled(self) -> int:
        return sum(event["event"] == "pulled" for event in read_events(self.log))

    def resumed_after(self, since: float) -> float:
        """Seconds from `since` (monotonic) to the first block that was pulled after it."""
        wait_for("a hit", self.hit, 30.0)
        events = read_events(self.log)
        return next(e["t"] for e in events if e["event"] == "pulled" and e["t"] > since) - since

    def hit(self) -> bool:
        before = self.pulled()
        got = self.answer()
        assert answer_complaints(got, self.baseline) == []
        return self.pulled() == before + BLOCKS


@pytest.fixture(scope="module")
def world(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An engine whose hub has not been started yet."""
    path = tmp_path_factory.mktemp("faults")
    model = write_model(path / "model", TINY)
    server = way.serve(path, host_bytes="128MiB")
    try:
        server.kill()
        config = hub_config(
            server.address,
            event_log=path / "log.jsonl",
            lookup_ms=LOOKUP_MS,
            pin_ms=PIN_MS,
            load_deadline_ms=LOAD_MS,
            **way.settings(server),
        )
        with Engine.start(model, config=config) as engine:
            engine.generate(prompt(99, 300), tokens=2)
            baseline = engine.generate(PROMPT, tokens=TOKENS)
            yield World(way, engine, server, path / "log.jsonl", baseline)
    finally:
        server.close()


def test_1_an_engine_starts_and_serves_without_its_hub(world: World) -> None:
    assert len(world.baseline.tokens) == TOKENS
    assert cells(read_events(world.log), "pushed") == {}
    assert answer_complaints(world.answer(), world.baseline) == []


def test_2_hits_begin_within_seconds_of_the_hubs_start(world: World) -> None:
    world.server.restart()
    started = time.monotonic()

    def pushed() -> bool:
        world.answer()
        return bool(cells(read_events(world.log), "pushed"))

    wait_for("a push", pushed, 30.0)
    wait_pushed(world.log, BLOCKS)
    first = next(e["t"] for e in read_events(world.log) if e["event"] == "pushed")
    assert first - started < RESUME_S
    wait_for("a hit", world.hit, 10.0)


def test_3_a_killed_hub_costs_nothing_but_its_hits(world: World) -> None:
    call = world.engine.begin([PROMPT], tokens=100)
    time.sleep(0.1)
    world.server.kill()
    (got,) = world.engine.finish(call)
    assert len(got.tokens) == 100
    assert got.tokens[:TOKENS] == world.baseline.tokens
    again = world.answer()
    assert answer_complaints(again, world.baseline) == []
    assert again.ttft_s < LOOKUP_MS / 1e3 + 3.0


def test_4_hits_resume_within_five_seconds_of_the_restart(world: World) -> None:
    """The host tier came back warm: what was pushed before the kill is there."""
    world.server.restart()
    assert world.resumed_after(time.monotonic()) < RESUME_S


def test_5_a_damaged_block_is_recomputed_from_there_and_pushed_again(world: World) -> None:
    events = read_events(world.log)
    damage(world, BLOCKS // 2)
    assert answer_complaints(world.answer(), world.baseline) == []
    fresh = read_events(world.log)[len(events) :]
    assert [e["index"] for e in fresh if e["event"] == "failed_block"] == [BLOCKS // 2]
    pushed = {e["hash"] for e in events if e["event"] == "pushed"}
    wait_for("a hit", world.hit, 10.0)
    again = {e["hash"] for e in read_events(world.log)[len(events) :] if e["event"] == "pushed"}
    assert again
    assert again < pushed


def damage(world: World, index: int) -> None:
    """Flip one bit of a block where it stands in the arena."""
    with world.way.blocking(world.server) as client:
        digest = prefix_hashes(PROMPT, BLOCK)[index]
        flip_a_bit(world.server, client, the_spec(client), digest, layer=1, head=0)


def test_6_a_stopped_hub_holds_no_request_up(world: World) -> None:
    world.server.stop_signal()
    try:
        stopped = time.monotonic()
        slowest = 0.0
        while time.monotonic() - stopped < STOPPED_S:
            got = world.answer()
            assert answer_complaints(got, world.baseline) == []
            slowest = max(slowest, got.ttft_s)
            time.sleep(0.5)
        # The first one waits for its lookup; none waits for the hub.
        assert slowest < LOOKUP_MS / 1e3 + 3.0
    finally:
        continued = time.monotonic()
        world.server.cont()
    assert world.resumed_after(continued) < RESUME_S


def test_7_aborted_requests_leave_nothing_behind(world: World) -> None:
    for after_s in (0.0, 0.005, 0.02, 0.1):
        world.forget()
        world.engine.abort_during(PROMPT, tokens=50, after_s=after_s)
    wait_for("a hit", world.hit, 10.0)


def test_8_equal_prompts_at_once_load_once(world: World) -> None:
    world.forget()
    before = world.pulled()
    for got in world.engine.generate_many([PROMPT] * 4, tokens=TOKENS):
        assert got.tokens == world.baseline.tokens
    assert world.pulled() == before + BLOCKS


@pytest.mark.parametrize("lost", ["killed", "stopped"])
def test_9_a_hub_lost_in_the_middle_of_a_pull(world: World, lost: str) -> None:
    """Two blocks have arrived, the third is held up at the hub's disk: then the hub is lost."""
    leave_on_disk_only(world, failpoints="promote.read=sleep:20@3")
    before, events = world.pulled(), len(read_events(world.log))
    world.forget()
    call = world.engine.begin([PROMPT], tokens=TOKENS)
    wait_for("two blocks of a pull", lambda: world.pulled() == before + 2, 15.0)
    began = time.monotonic()
    if lost == "killed":
        world.server.kill()
    else:
        world.server.stop_signal()
    try:
        (got,) = world.engine.finish(call)
        ended_s = time.monotonic() - began
    finally:
        if world.server.exit_code() is None:
            world.server.kill()
        world.server.restart()
    assert answer_complaints(got, world.baseline) == []
    assert ended_s < LOAD_MS / 1e3 + 6.0
    fresh = read_events(world.log)[events:]
    failed = [e["index"] for e in fresh if e["event"] == "failed_block"]
    assert failed == list(range(2, BLOCKS)), "the pull was not in flight"
    assert world.resumed_after(time.monotonic()) < RESUME_S


def test_9_a_killed_hub_whose_memory_is_gone_has_all_of_it_on_disk(world: World) -> None:
    leave_on_disk_only(world)
    restarted, events = time.monotonic(), len(read_events(world.log))
    assert world.server.stats().counters["bytes_disk_out"] == 0
    assert world.resumed_after(restarted) < RESUME_S
    pulled = cells(read_events(world.log)[events:], "pulled")
    assert len({name for name, _ in pulled}) == BLOCKS
    assert page_complaints(cells(read_events(world.log), "pushed"), pulled) == []
    assert world.server.stats().counters["promotions"] >= BLOCKS


def leave_on_disk_only(world: World, *, failpoints: str = "") -> None:
    """Kill the hub, and start it with the prompt's blocks on its disk and an empty memory."""
    server = world.server
    disk = {"disk_bytes": "64MiB", "disk_path": str(server.tmp_path / "disk")}

    def spilled() -> bool:
        disks = [tier for tier in server.stats().tiers if tier.tier == pb.TIER_DISK]
        return disks[0].slots_committed >= BLOCKS

    server.terminate()
    (server.host_dir / "arena").unlink()
    server.restart(**disk)
    wait_for("a hit", world.hit, 30.0)
    wait_for("blocks on disk", spilled)
    server.kill()
    (server.host_dir / "arena").unlink()
    server.restart(failpoints=failpoints, data_threads=1)  # one, so that blocks come in order
    restarted = time.monotonic()

    def answered() -> bool:
        """The engine trusts the hub again: it was answered about a prompt that nobody knows."""
        world.engine.generate(prompt(int(1e6 * time.monotonic()), 200), tokens=1)
        looked = [e for e in read_events(world.log) if e["event"] == "lookup"]
        return any(e["t"] > restarted and e["usable"] == 0 for e in looked)

    wait_for("a lookup of the engine", answered)


def test_a_after_a_reset_of_the_cache_nothing_old_is_used(world: World) -> None:
    world.forget(connector=True)
    before = world.pulled()
    assert answer_complaints(world.engine.generate(PROMPT, tokens=TOKENS), world.baseline) == []
    assert world.pulled() == before
