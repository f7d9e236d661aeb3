"""The demo's judge says no when something is wrong; without that its yes would mean nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.oracle import Step, judge, table
from kvproto.v1 import kvserver_pb2
from tests.support.engines import Generated

PROMPT = list(range(2, 302))  # two whole blocks and a tail
PID = 4711
TOKENS = [11, 12, 13, 14, 15, 16]
GOOD = Generated(
    tokens=TOKENS,
    logprobs=[{token: -0.5, 99: -1.5} for token in TOKENS],
    cached=256,
    ttft_s=0.1,
    total_s=0.2,
    finish="length",
)


def _event(event: str, key: str, cells: str, pid: int) -> Mapping[str, object]:
    return {"event": event, "pid": pid, "hash": key, "cells": [cells], "tier": 2, "bytes": 1}


PUSHED = [_event("pushed", "aa", "1", 1), _event("pushed", "bb", "2", 1)]
PULLED = [_event("pulled", "aa", "1", PID), _event("pulled", "bb", "2", PID)]


def _hub(hits: int) -> kvserver_pb2.StatsReply:
    return kvserver_pb2.StatsReply(namespaces=[kvserver_pb2.NamespaceStats(hits=hits)])


def _judge(
    tmp_path: Path,
    *,
    output: Generated = GOOD,
    reference: Generated = GOOD,
    events: list[Mapping[str, object]] | None = None,
    granted: int = 2,
) -> Step:
    log = tmp_path / "events.jsonl"
    lines = PUSHED + PULLED if events is None else events
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return judge(
        "decode",
        prompts=[PROMPT],
        outputs=[output],
        reference=[reference],
        tokens=6,
        events=log,
        pid=PID,
        pulls=True,
        hub_before=_hub(5),
        hub_after=_hub(5 + granted),
    )


def test_a_right_run_has_no_problems(tmp_path: Path) -> None:
    step = _judge(tmp_path)
    assert step.problems == []
    assert (step.pulled_tokens, step.computed_tokens, step.pulled_from) == (256, 44, "host")
    assert "yes" in table([step])


def test_another_token_is_seen(tmp_path: Path) -> None:
    other = replace(GOOD, tokens=[11, 12, 13, 14, 15, 99])
    step = _judge(tmp_path, output=other)
    assert any("other tokens" in problem for problem in step.problems)
    assert "no" in table([step]).split()


def test_a_missing_token_is_seen(tmp_path: Path) -> None:
    short = replace(GOOD, tokens=GOOD.tokens[:-1], logprobs=GOOD.logprobs[:-1])
    assert _judge(tmp_path, output=short).problems


def test_another_log_probability_is_seen(tmp_path: Path) -> None:
    drifted = replace(GOOD, logprobs=[*GOOD.logprobs[:-1], {16: -0.5002, 99: -1.5}])
    step = _judge(tmp_path, output=drifted)
    assert any("log-probabilities" in problem for problem in step.problems)
    close = replace(GOOD, logprobs=[*GOOD.logprobs[:-1], {16: -0.50005, 99: -1.5}])
    assert _judge(tmp_path, output=close).problems == []


def test_a_pull_that_did_not_happen_is_seen_by_each_witness(tmp_path: Path) -> None:
    by_vllm = _judge(tmp_path, output=replace(GOOD, cached=128))
    by_adapter = _judge(tmp_path, events=PUSHED + PULLED[:1])
    by_hub = _judge(tmp_path, granted=1)
    assert [len(s.problems) for s in (by_vllm, by_adapter, by_hub)] == [1, 1, 1]


def test_pulls_of_another_engine_do_not_count(tmp_path: Path) -> None:
    foreign = [_event("pulled", "aa", "1", PID + 1), _event("pulled", "bb", "2", PID + 1)]
    assert _judge(tmp_path, events=PUSHED + foreign).problems


def test_other_bytes_are_seen(tmp_path: Path) -> None:
    changed = [PULLED[0], _event("pulled", "bb", "3", PID)]
    step = _judge(tmp_path, events=PUSHED + changed)
    assert any("bytes differ" in problem for problem in step.problems)


def test_one_token_over_and_over_proves_little(tmp_path: Path) -> None:
    dull = replace(GOOD, tokens=[11] * 6, logprobs=[{11: -0.5}] * 6)
    step = _judge(tmp_path, output=dull, reference=dull)
    assert any("distinct" in problem for problem in step.problems)
