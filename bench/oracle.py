"""Did an engine with the hub say what an engine without it says, and did it really pull?

Three witnesses count the pulled blocks, and must agree: vLLM (cached tokens of each answer), the
adapter's event log (one `pulled` event a block, with a hash of the bytes that then stood in the
engine's pages), and the hub's own counters. The hashes must be those of the pages that were pushed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import aligned
from kvproto.v1 import kvserver_pb2
from tests.support.engines import Generated, read_events

BLOCK_TOKENS = 128
LOGPROB_TOLERANCE = 1e-4
DISTINCT_TOKENS_MIN = 6
_TIERS = {1: "device", 2: "host", 3: "disk"}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the demo's table. Times in seconds, medians over the prompts."""

    name: str
    prompts: int
    prompt_tokens: int
    pulled_tokens: int
    pulled_from: str
    ttft_s: float
    ttft_alone_s: float
    logprob_difference: float
    problems: list[str] = field(default_factory=list)

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.pulled_tokens


def judge(
    name: str,
    *,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Generated],
    reference: Sequence[Generated],
    tokens: int,
    events: Path,
    pid: int,
    pulls: bool,
    hub_before: kvserver_pb2.StatsReply | None,
    hub_after: kvserver_pb2.StatsReply | None,
) -> Step:
    """Compare the answers of one engine with the reference and count its pulls.

    Each answer has to hold `tokens` tokens; the reference may go on longer.
    """
    problems: list[str] = []
    difference = 0.0
    for number, (output, wanted) in enumerate(zip(outputs, reference, strict=True), 1):
        if len(output.tokens) != tokens or output.tokens != wanted.tokens[:tokens]:
            problems.append(f"prompt {number}: other tokens than without the hub")
        differs = logprob_difference(output, wanted)
        if differs > LOGPROB_TOLERANCE:
            problems.append(f"prompt {number}: log-probabilities differ by {differs:.1e}")
        difference = max(difference, differs)
    distinct = len({token for output in outputs for token in output.tokens})
    if distinct < min(DISTINCT_TOKENS_MIN, max(2, len(outputs) * tokens // 2)):
        problems.append(f"only {distinct} distinct tokens: equal outputs prove little")

    log = read_events(events)
    pulled = [e for e in log if e["event"] == "pulled" and e["pid"] == pid]
    expected = [len(prompt) // BLOCK_TOKENS * (1 if pulls else 0) for prompt in prompts]
    for number, (output, blocks) in enumerate(zip(outputs, expected, strict=True), 1):
        if output.cached != blocks * BLOCK_TOKENS:
            problems.append(
                f"prompt {number}: {output.cached} tokens from a cache, not {blocks * BLOCK_TOKENS}"
            )
    if len(pulled) != sum(expected):
        problems.append(f"the adapter pulled {len(pulled)} blocks, not {sum(expected)}")
    problems += _other_bytes(log, pulled)
    if hub_before is not None and hub_after is not None:
        granted = hits(hub_after) - hits(hub_before)
        if granted != sum(expected):
            problems.append(f"the hub counted {granted} hits, not {sum(expected)}")

    times = [output.ttft_s for output in outputs]
    return Step(
        name=name,
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        pulled_tokens=len(pulled) * BLOCK_TOKENS,
        pulled_from=", ".join(sorted({_TIERS.get(e["tier"], "?") for e in pulled})) or "-",
        ttft_s=statistics.median(times),
        ttft_alone_s=statistics.median(output.ttft_s for output in reference),
        logprob_difference=difference,
        problems=problems,
    )


def logprob_difference(output: Generated, wanted: Generated) -> float:
    """The largest difference over the tokens that both name; infinite where a chosen one lacks."""
    largest = 0.0
    for chosen, ours, theirs in zip(output.tokens, output.logprobs, wanted.logprobs, strict=False):
        if chosen not in ours or chosen not in theirs:
            return float("inf")
        largest = max(largest, *(abs(ours[t] - theirs[t]) for t in ours.keys() & theirs.keys()))
    return largest


def hits(stats: kvserver_pb2.StatsReply) -> int:
    """Blocks that the hub has granted to readers."""
    return sum(namespace.hits for namespace in stats.namespaces)


def table(steps: Sequence[Step]) -> str:
    head = ("step", "prompts", "tokens", "pulled", "computed", "from", "first token", "without hub")
    return aligned(
        (*head, "speed-up", "logprobs", "output equal"),
        [
            (
                step.name,
                str(step.prompts),
                str(step.prompt_tokens),
                str(step.pulled_tokens),
                str(step.computed_tokens),
                step.pulled_from,
                f"{step.ttft_s:.3f} s",
                f"{step.ttft_alone_s:.3f} s",
                f"{step.ttft_alone_s / step.ttft_s:.1f}x",
                f"{step.logprob_difference:.0e}",
                "no" if step.problems else "yes",
            )
            for step in steps
        ],
    )


def _other_bytes(log: Sequence[dict[str, Any]], pulled: Sequence[dict[str, Any]]) -> list[str]:
    """Pulled pages whose bytes are not those that some engine pushed under that hash."""
    pushed = {event["hash"]: event["cells"] for event in log if event["event"] == "pushed"}
    return [
        f"block {event['hash'][:8]}: pulled bytes differ from the pushed ones"
        for event in pulled
        if pushed.get(event["hash"]) != event["cells"]
    ]
