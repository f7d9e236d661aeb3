"""What the adapter costs an engine, against the bounds that it is held to.

    python -m bench.engine_cost [--only steps|pushes|scheduler|slow-hub] [--quick] [--model DIR]
                                [--out FILE]

On the 136 M parameter model of the demo, a vLLM engine in processes of its own bound to one core,
the hub and the adapter's threads on the other (engine_room.py), with the adapter's defaults. Each
section starts an engine and takes two to four minutes; with `--out` of an earlier run its result
replaces the section there. Needs two cores that do nothing else.

    steps      the connector's calls on the thread of the forward pass, as shares of each step; and
               a full hit's time to first token as a share of computing it
    pushes     throughput while pushing as a share of that without, in alternating pairs
    scheduler  the scheduler half's calls, prompts of 8k tokens, a hub that answers at once and one
               that answers after 2 s: the 99th percentile of 100 and more calls of each kind by the
               clock, and beside it the processor time of the thread in the same calls
    slow-hub   time to first token that a hub adds which answers after 0, 50, 500 and 2,000 ms
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bench import machine
from bench.calls import SCHEDULER_CALLS, Records, of, percentile, read, steps
from bench.engine_room import Room, RoomError, forget, pushed, seconds, whole_blocks
from bench.report import aligned
from kvclient import Client
from tests.support.delaying import DelayingRelay
from tests.support.engines import Engine, EngineError
from tests.support.server import ServerProcess
from tests.support.tiny_models import DEMO, prompt

RESULTS = Path(__file__).parent / "results"
BLOCK = 128
LOOKUP_MS = 100
"""The adapter's default."""
RECOVERY_SECONDS = 1.3
"""Within this the adapter finds a hub again that did not answer for a while."""
PREFILL_SECONDS_MAX = 400.0
"""Of 8k tokens on one core: 25 to 150 s."""
RESAMPLES = 10_000
P99_US = 200
"""Of a call of the scheduler half."""


def measure_steps(room: Room, *, quick: bool) -> dict[str, Any]:
    """Shares of steps, with prompts computed and pushed, then pulled; and hits one by one."""
    batches, each, hits = (1, 2, 2) if quick else (4, 6, 8)
    hub = room.hub(host_bytes="2GiB")
    engine = room.engine(hub, options={"kv_bytes": 1 << 30})
    lengths = [320 + 100 * n for n in range(each)]
    prompts = [
        [prompt(1000 + 10 * batch + n, tokens, DEMO) for n, tokens in enumerate(lengths)]
        for batch in range(batches)
    ]
    since = time.monotonic_ns()
    for batch in prompts:
        engine.generate_many(batch, tokens=24, logprobs=0)
    pushed(hub, batches * sum(tokens // BLOCK for tokens in lengths))
    pushing = _shares(read(room.calls, since))
    since = time.monotonic_ns()
    forget(engine)
    for batch in prompts:
        engine.generate_many(batch, tokens=24, logprobs=0)
    loading = _shares(read(room.calls, since))
    ratios, computed, loaded = _full_hits(engine, hub, hits)
    every = pushing["shares"] + loading["shares"]
    if len(every) < 20:
        raise RoomError(f"only {len(every)} steps were recorded")
    p50, p99 = percentile(every, 0.5), percentile(every, 0.99)
    return {
        "placed": room.placed(engine),
        "steps": len(every),
        "share_p50": p50,
        "share_p99": p99,
        "share_p50_bound": 0.01,
        "share_p99_bound": 0.03,
        "pushing": _summary(pushing),
        "loading": _summary(loading),
        "hit_ratio": statistics.median(ratios),
        "hit_ratio_worst": max(ratios),
        "hit_ratio_bound": 0.2,
        "hit_ms": 1e3 * statistics.median(loaded),
        "computed_ms": 1e3 * statistics.median(computed),
        "met": p50 <= 0.01 and p99 <= 0.03 and statistics.median(ratios) <= 0.2,
    }


def _shares(records: Records) -> dict[str, list[float]]:
    found = steps(records)
    return {
        "shares": [within / duration for _, duration, within in found],
        "step_ms": [duration / 1e6 for _, duration, _ in found],
        "calls_us": [within / 1e3 for _, _, within in found],
    }


def _summary(shares: dict[str, list[float]]) -> dict[str, float]:
    return {
        "steps": len(shares["shares"]),
        "step_ms_p50": percentile(shares["step_ms"], 0.5),
        "calls_us_p50": percentile(shares["calls_us"], 0.5),
        "calls_us_p99": percentile(shares["calls_us"], 0.99),
        "share_p50": percentile(shares["shares"], 0.5),
        "share_p99": percentile(shares["shares"], 0.99),
    }


def _full_hits(
    engine: Engine, hub: ServerProcess, count: int
) -> tuple[list[float], list[float], list[float]]:
    """(ratio, seconds computed, seconds loaded) of prompts whose every block is at the hub."""
    blocks = 7
    computed, loaded = [], []
    for number in range(count):
        tokens, before = prompt(2000 + number, blocks * BLOCK + 1, DEMO), whole_blocks(hub)
        computed.append(engine.generate(tokens, tokens=1, logprobs=0).ttft_s)
        pushed(hub, before + blocks)
        forget(engine)
        answer = engine.generate(tokens, tokens=1, logprobs=0)
        if answer.cached < blocks * BLOCK:
            raise RoomError(f"only {answer.cached} tokens were loaded: no full hit")
        loaded.append(answer.ttft_s)
    ratios = [hit / own for hit, own in zip(loaded, computed, strict=True)]
    return ratios, computed, loaded


def measure_pushes(room: Room, *, quick: bool) -> dict[str, Any]:
    """Pairs of equal batches of fresh prompts, one with pushes and one without."""
    pairs, each, tokens, answers = 2 if quick else 26, 1, 264, 8
    hub = room.hub(host_bytes="3GiB")
    engine = room.engine(hub, options={"kv_bytes": 1 << 30})
    ratios, on_speeds, off_speeds = [], [], []
    with Client.connect(hub.address, name="bench") as operator:
        for pair in range(pairs):
            speed = {}
            for run, produces in enumerate((True, False) if pair % 2 else (False, True)):
                operator.set_role("vllm-", produces=produces)
                before = whole_blocks(hub)
                seed = 3000 + 100 * pair + 10 * run
                batch = [prompt(seed + n, tokens, DEMO) for n in range(each)]
                took = seconds(engine.generate_many(batch, tokens=answers, logprobs=0))
                speed[produces] = each * (tokens + answers) / took
                if produces:
                    pushed(hub, before + each * (tokens // BLOCK))
                elif whole_blocks(hub) != before:
                    raise RoomError("pushes went on though they were switched off")
            ratios.append(speed[True] / speed[False])
            on_speeds.append(speed[True])
            off_speeds.append(speed[False])
    low, high = bootstrap(ratios)
    return {
        "placed": room.placed(engine),
        "pairs": pairs,
        "ratios": ratios,
        "ratio": _mean(ratios),
        "low": low,
        "high": high,
        "low_bound": 0.95,
        "on_tokens_s": statistics.median(on_speeds),
        "off_tokens_s": statistics.median(off_speeds),
        "met": low >= 0.95,
    }


def _mean(ratios: Sequence[float]) -> float:
    """Geometric: a ratio and its inverse weigh the same."""
    return float(np.exp(np.mean(np.log(ratios))))


def bootstrap(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the geometric mean."""
    logs = np.log(ratios)
    drawn = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.exp(np.percentile(drawn, [2.5, 97.5]))
    return float(low), float(high)


def measure_scheduler(room: Room, *, quick: bool) -> dict[str, Any]:
    """Each call by its wall time and its thread's processor time, at 8k tokens. Enough of each
    kind that a p99 is no maximum: prompts loaded whole, one by one, and crowds of prompts that the
    engine has itself, all but the last token, whose lookups are in flight together. A hub that
    answers after 2 s stands still for so long when a crowd comes."""
    blocks, hits, crowds, late_crowds, each = (15, 3, 1, 1, 4) if quick else (63, 40, 4, 12, 16)
    hub = room.hub(host_bytes="3GiB")
    engine = room.engine(
        hub,
        options={
            "kv_bytes": 2 << 30,
            "max_model_len": 8192,
            "max_num_batched_tokens": 2048,  # vLLM's default as a server on a CPU
        },
    )
    long = prompt(4000, blocks * BLOCK + 1, DEMO)
    since = time.monotonic_ns()
    engine.generate_many([long], tokens=1, logprobs=0, timeout_s=PREFILL_SECONDS_MAX)
    pushed(hub, blocks)
    for _ in range(hits):
        forget(engine)
        answer = engine.generate(long, tokens=1, logprobs=0)
        if answer.cached < blocks * BLOCK:
            raise RoomError(f"only {answer.cached} tokens were loaded: no full hit")
    for number in range(crowds):
        engine.generate_many(_alike(long, each, 100 + each * number), tokens=1, logprobs=0)
    at_once = read(room.calls, since)
    since = time.monotonic_ns()
    for number in range(late_crowds):
        time.sleep(RECOVERY_SECONDS)
        with _standing_still(hub, 2.0):
            engine.generate_many(_alike(long, each, 500 + each * number), tokens=6, logprobs=0)
    late = read(room.calls, since)
    placed = room.placed(engine)
    rows = [
        _call_row(answers, name, records)
        for answers, records in (("at once", at_once), ("after 2 s", late))
        for name in SCHEDULER_CALLS
    ]
    met = all(row["met"] for row in rows)
    return {"placed": placed, "tokens": len(long), "rows": rows, "met": met}


@contextmanager
def _standing_still(hub: ServerProcess, for_s: float) -> Iterator[None]:
    """The hub answers what it is asked from here on when `for_s` are over."""
    hub.stop_signal()
    going_on = threading.Timer(for_s, hub.cont)
    going_on.start()
    try:
        yield
    finally:
        going_on.join()


def _alike(long: list[int], count: int, token: int) -> list[list[int]]:
    """Prompts that are in the engine's own cache, all but their last tokens: `token` and on."""
    return [[*long[:-1], token + number] for number in range(count)]


def _call_row(answers: str, name: str, records: Records) -> dict[str, Any]:
    mine = of(records, name)
    wall, cpu = mine["wall"] / 1e3, mine["cpu"] / 1e3
    p99 = percentile(wall, 0.99)
    return {
        "hub_answers": answers,
        "call": name,
        "calls": len(wall),
        "p50_us": percentile(wall, 0.5),
        "p99_us": p99,
        "max_us": float(max(wall)),
        "cpu_p50_us": percentile(cpu, 0.5),
        "cpu_p99_us": percentile(cpu, 0.99),
        "p99_us_bound": P99_US,
        "over": int(np.sum(wall > P99_US)),
        "over_cpu": int(np.sum(cpu > P99_US)),
        "met": p99 <= P99_US,
    }


def _slow(relay: DelayingRelay, delay_s: float) -> None:
    """Let the adapter find its hub again, then slow that down."""
    relay.delay_s = 0.0
    time.sleep(RECOVERY_SECONDS)
    relay.delay_s = delay_s


def measure_slow_hub(room: Room, *, quick: bool) -> dict[str, Any]:
    """Prompts that arrive beside a request which is decoded; each with a lookup and without."""
    samples = 2 if quick else 6
    hub = room.hub(host_bytes="2GiB", tcp_listen="127.0.0.1:0", shm_tenants="nobody")
    rows = []
    with DelayingRelay(hub.address) as relay:
        engine = room.engine(
            hub,
            address=relay.address,
            settings={"transport": "tcp"},
            options={"kv_bytes": 1 << 30},
        )
        since = time.monotonic_ns()
        for delay_ms in (0, 50, 500, 2000):
            added, alone = [], []
            for number in range(samples):
                seed = 5000 + 10 * delay_ms + 4 * number
                own = _first_token_s(engine, seed, skip=True)
                _slow(relay, delay_ms / 1e3)
                added.append(_first_token_s(engine, seed + 2, skip=False) - own)
                alone.append(own)
            rows.append({
                "hub_ms": delay_ms,
                "samples": samples,
                "alone_ms": 1e3 * statistics.median(alone),
                "added_ms": 1e3 * statistics.median(added),
                "added_ms_low": 1e3 * min(added),
                "added_ms_high": 1e3 * max(added),
            })  # fmt: skip
        relay.delay_s = 0.0
        step_ms = percentile(_shares(read(room.calls, since))["step_ms"], 0.5)
        placed = room.placed(engine)
    for row in rows:
        row["added_ms_bound"] = LOOKUP_MS + step_ms
        row["met"] = row["added_ms"] <= LOOKUP_MS + step_ms
    met = all(row["met"] for row in rows)
    return {"placed": placed, "step_ms": step_ms, "rows": rows, "met": met}


def _first_token_s(engine: Engine, seed: int, *, skip: bool) -> float:
    """Of a prompt of 160 tokens that arrives while another request is decoded."""
    call = engine.begin(
        [prompt(seed, 40, DEMO), prompt(seed + 1, 160, DEMO)],
        tokens=8,
        logprobs=0,
        delays=[0.0, 0.25],
        skip_reading_prefix_cache=skip,
    )
    return engine.finish(call)[1].ttft_s


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": measure_steps,
    "pushes": measure_pushes,
    "scheduler": measure_scheduler,
    "slow-hub": measure_slow_hub,
}


def table(result: dict[str, Any]) -> str:
    """All sections of a result for people."""
    shown = {"steps": _steps, "pushes": _pushes, "scheduler": _scheduler, "slow-hub": _slow_hub}
    return "\n\n".join(shown[name](result[name]) for name in SECTIONS if name in result)


def _verdict(met: bool) -> str:
    return "pass" if met else "MISS"


def _steps(one: dict[str, Any]) -> str:
    rows = [
        (f"{kind}: {part['steps']} steps", f"{part['step_ms_p50']:.1f}",
         f"{part['calls_us_p50']:.0f}", f"{part['calls_us_p99']:.0f}",
         f"{part['share_p50']:.2%}", f"{part['share_p99']:.2%}")
        for kind in ("pushing", "loading") for part in [one[kind]]
    ]  # fmt: skip
    head = ("calls within steps", "step ms", "calls us p50", "p99", "share p50", "p99")
    hit = (
        f"time to first token, full hit {one['hit_ms']:.0f} ms, computed {one['computed_ms']:.0f}: "
        f"{one['hit_ratio']:.3f} (worst {one['hit_ratio_worst']:.3f}, bound 0.2)"
    )
    both = f"both: p50 {one['share_p50']:.2%} (bound 1 %), p99 {one['share_p99']:.2%} (bound 3 %)"
    return "\n".join([aligned(head, rows), both, hit, _verdict(one["met"])])


def _pushes(one: dict[str, Any]) -> str:
    return (
        f"throughput with pushes {one['on_tokens_s']:.0f} tokens/s, without "
        f"{one['off_tokens_s']:.0f}; ratio of {one['pairs']} pairs {one['ratio']:.3f}, 95 % "
        f"interval {one['low']:.3f} to {one['high']:.3f} (bound 0.95): {_verdict(one['met'])}"
    )


def _scheduler(one: dict[str, Any]) -> str:
    return aligned(
        (f"{one['tokens']} tokens, us", "hub answers", "calls", "p50", "p99", "max",
         "cpu p50", "p99", "over", "cpu over", ""),
        [
            (r["call"], r["hub_answers"], str(r["calls"]), f"{r['p50_us']:.0f}",
             f"{r['p99_us']:.0f}", f"{r['max_us']:.0f}", f"{r['cpu_p50_us']:.0f}",
             f"{r['cpu_p99_us']:.0f}", str(r["over"]), str(r["over_cpu"]), _verdict(r["met"]))
            for r in one["rows"]
        ],
    )  # fmt: skip


def _slow_hub(one: dict[str, Any]) -> str:
    return aligned(
        ("hub answers after ms", "alone ms", "added ms", "lowest", "highest", "bound", ""),
        [
            (str(r["hub_ms"]), f"{r['alone_ms']:.0f}", f"{r['added_ms']:.0f}",
             f"{r['added_ms_low']:.0f}", f"{r['added_ms_high']:.0f}",
             f"{r['added_ms_bound']:.0f}", _verdict(r["met"]))
            for r in one["rows"]
        ],
    )  # fmt: skip


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # nothing that was started is left behind
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    facts = machine.facts()
    out = options.out or _default_path(options.quick)
    result = json.loads(out.read_text()) if out.exists() else {}
    failed = False
    for name in options.only or list(SECTIONS):
        started, load = time.monotonic(), machine.load_average()
        say(name)
        try:
            with ExitStack() as stack:
                found = SECTIONS[name](Room(stack, say, options.model), quick=options.quick)
        except (RoomError, EngineError, AssertionError, OSError) as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        found |= {"machine": facts, "load_before": load, "quick": options.quick}
        found["seconds"] = round(time.monotonic() - started, 1)
        result[name] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(table({name: found}) + "\n", flush=True)
    print(f"Written to {out}")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine_cost", description="What the adapter costs an engine."
    )
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="only this section")
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it works")
    parser.add_argument("--model", type=Path, help="directory that keeps the model between runs")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: bench/results/DATE-engine-cost.json)"
    )
    return parser


def _default_path(quick: bool) -> Path:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return RESULTS / f"{day}-engine-cost{'-quick' if quick else ''}.json"


if __name__ == "__main__":
    sys.exit(main())
