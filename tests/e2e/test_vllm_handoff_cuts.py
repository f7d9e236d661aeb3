"""Three hand-offs at once, and the prefill engine is killed, stopped, or one of them aborted, in
each chunk: the decode engine is told in time, keeps what is whole, and computes the rest."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvclient import BlockState, Client
from kvproto.prefix import prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
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
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, CHUNKS, TOKENS = 128, 4, 16
LENGTH = 500
CUT_LAYER = TINY.layers // 2
INTENT_S = 3.0
STALLED_S = 1.0
"""A writer that makes no progress for so long counts as gone."""
SLACK_S = 1.5
HOLD_S = 0.1
"""Before the cut the engine's own thread stands still until all is pushed that it has computed by
then, and for so long: the decode engine has all there is."""
DECODE_LEG = {"do_remote_prefill": True, "do_remote_decode": False}
PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False}
CASES = [(how, chunk) for how in ("stopped", "aborted", "killed") for chunk in range(1, CHUNKS + 1)]


def prompts_of(how: str, chunk: int) -> list[list[int]]:
    """The prompt that is cut, and two others."""
    seed = 1000 + 10 * CASES.index((how, chunk))
    return [prompt(seed + n, LENGTH) for n in range(3)]


@dataclass
class Pair:
    way: Way
    path: Path
    model: Path
    server: ServerProcess
    client: Client
    decode: Engine
    alone: dict[tuple[str, int], list[Generated]]
    prefill: Engine | None = None
    prefill_free: int = 0

    @property
    def prefill_log(self) -> Path:
        return self.path / "p.jsonl"

    @property
    def decode_log(self) -> Path:
        return self.path / "d.jsonl"

    def start_prefill(self) -> Engine:
        """Three prompts, each in chunks, side by side."""
        if self.prefill is None:
            self.prefill = Engine.start(
                self.model,
                config=config(self.way, self.server, self.prefill_log, "kv_producer"),
                max_num_batched_tokens=3 * BLOCK,
                long_prefill_token_threshold=BLOCK,
            )
            self.prefill.generate(prompt(98, 40), tokens=2)
            pid = self.prefill.pid  # the log has those before it, too
            wait_for(
                "the prefill engine to connect",
                lambda: any(
                    event["event"] == "namespace" and event["pid"] == pid
                    for event in read_events(self.prefill_log)
                ),
            )
            self.prefill_free = self.prefill.facts()["free"]
        return self.prefill

    def pulled_bytes(self) -> float:
        """As the decode engine's own metrics count them."""
        self.decode.idle(0.05)
        return self.decode.metrics().get("vllm:kvserver_pulled_bytes", 0)

    def whole(self, tokens: list[int]) -> int:
        """Blocks of a prompt that are complete at the hub, from the first one on."""
        namespace = self.client.open_namespace(the_spec(self.client))
        states = namespace.lookup(prefix_hashes(tokens, BLOCK)).states
        return int((states == BlockState.COMPLETE).cumprod().sum())


def config(way: Way, server: ServerProcess, log: Path, role: str) -> dict[str, Any]:
    return hub_config(
        server.address,
        role=role,
        event_log=log,
        intent_wait_ms=int(1e3 * INTENT_S),
        lookup_ms=PATIENT["lookup_ms"],
        pin_ms=PATIENT["pin_ms"],
        **way.settings(server),
    )


@pytest.fixture(scope="module")
def pair(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("cuts")
    model = write_model(path / "model")
    with Engine.start(model) as lone:
        alone = {case: lone.generate_many(prompts_of(*case), tokens=TOKENS) for case in CASES}
    with way.serve(path, host_bytes="256MiB") as server, way.blocking(server) as client:
        # Its steps are too small to be a measure of prefilling: how long it waits is not to follow
        # from how fast this machine is. All three prompts have their share of each.
        decode = Engine.start(
            model,
            config=config(way, server, path / "d.jsonl", "kv_consumer"),
            max_num_batched_tokens=60,
            long_prefill_token_threshold=20,
            max_num_seqs=8,
        )
        pair = Pair(way, path, model, server, client, decode, alone)
        try:
            decode.generate(prompt(97, 40), tokens=2)
            wait_connected(pair.decode_log)
            yield pair
        finally:
            decode.close()
            if pair.prefill is not None:
                pair.prefill.close()


@dataclass
class Outcome:
    """Of three hand-offs. The lists have an entry for each."""

    answers: list[Generated]
    told_s: list[float]
    """From the cut until the decode engine began to compute."""
    pulled: list[set[str]]
    whole: list[int]
    """Blocks complete at the hub when all had been answered."""
    pages: list[str]
    """Complaints of the oracle about pulled pages."""
    prefill_free: int | None
    """Blocks of the prefill engine's pool that are free again."""


def hand_off(pair: Pair, how: str, chunk: int) -> Outcome:
    """Hand three prompts off; cut the first one, or the engine of all, in that chunk."""
    prompts, prefill = prompts_of(how, chunk), pair.start_prefill()
    before, free = len(read_events(pair.decode_log)), None
    second = pair.decode.begin(prompts, tokens=TOKENS, transfer=DECODE_LEG)
    wait_for("the decode engine to ask", lambda: len(names_in(pair.decode_log, before)) == 3)
    if how == "aborted":
        first = prefill.begin_cut(
            prompts, computed=BLOCK * (chunk - 1), hold_s=HOLD_S, transfer=PREFILL_LEG
        )
        at, free = prefill.finish_cut(first)
    else:
        first = prefill.begin_cut(
            prompts,
            computed=BLOCK * (chunk - 1) + 1,
            layer=CUT_LAYER,
            hold_s=HOLD_S,
            signal_number=signal.SIGKILL if how == "killed" else signal.SIGSTOP,
            transfer=PREFILL_LEG,
        )
        if how == "killed":
            prefill.wait_gone()
            prefill.close()
            pair.prefill = None
        else:
            prefill.wait_stopped()
        at = time.monotonic()
    try:
        answers = pair.decode.finish(second)
        whole = [pair.whole(tokens) for tokens in prompts]
    finally:
        if how == "stopped":
            prefill.proceed()
    if how == "stopped":
        _, free = prefill.finish_cut(first)
    events = read_events(pair.decode_log)[before:]
    pages = page_complaints(cells(read_events(pair.prefill_log), "pushed"), cells(events, "pulled"))
    names = names_in(pair.decode_log, before)
    began = [
        next(e["t"] for e in events if e["event"] == "scheduled" and e["request"] == name)
        for name in names
    ]
    pulled = [
        {e["hash"] for e in events if e["event"] == "pulled" and e["request"] == name}
        for name in names
    ]
    return Outcome(answers, [t - at for t in began], pulled, whole, pages, free)


def names_in(log: Path, start: int) -> list[str]:
    """Requests that the decode engine asked the hub about, in the order of their arrival."""
    events = read_events(log)[start:]
    return sorted(
        {e["request"] for e in events if e["event"] == "lookup"},
        key=lambda name: int(name.split("-")[0].removeprefix("r")),
    )


@pytest.mark.parametrize(("how", "chunk"), CASES)
def test_what_is_whole_is_kept_and_the_rest_computed(pair: Pair, how: str, chunk: int) -> None:
    free, bytes_before = pair.decode.free_blocks(), pair.pulled_bytes()
    got = hand_off(pair, how, chunk)
    for answer, alone in zip(got.answers, pair.alone[how, chunk], strict=True):
        assert answer_complaints(answer, alone) == []

    done, hashes = chunk - 1, [prefix_hashes(p, BLOCK, tail=True) for p in prompts_of(how, chunk)]
    assert got.whole[0] == done
    if how == "aborted":  # the others are handed off to the last token
        kept = [done, len(hashes[1]), len(hashes[2])]
    else:  # they may have come a step behind
        assert all(done - 1 <= whole <= done for whole in got.whole[1:])
        kept = got.whole
    wanted = [{key.hex() for key in keys[:n]} for keys, n in zip(hashes, kept, strict=True)]
    assert got.pulled == wanted
    assert got.pages == []
    pulled_bytes = sum(map(len, wanted)) * BLOCK * TINY.kv_bytes_per_token
    assert pair.pulled_bytes() - bytes_before == pulled_bytes

    # What nobody had announced by then is waited for on the hint only.
    longest = [STALLED_S + SLACK_S, *[(INTENT_S if chunk == 1 else STALLED_S) + SLACK_S] * 2]
    if how == "aborted":  # told, rather than left to find out
        longest = [INTENT_S + SLACK_S if chunk == 1 else STALLED_S - 2 * HOLD_S]
    for told_s, bound_s in zip(got.told_s, longest, strict=False):
        assert told_s < bound_s
    assert pair.decode.facts()["free"] == free
    if got.prefill_free is not None:
        assert got.prefill_free == pair.prefill_free
