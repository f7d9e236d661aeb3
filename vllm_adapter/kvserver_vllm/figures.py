"""Figures: what vLLM's log line and its Prometheus endpoint tell of this connector.

Each half counts as it works (`Common.counters`, `Rank.counters`). With a step vLLM asks for what is
new; that travels to vLLM's front end, which adds it to its metrics. METRICS is the one list of
names: docs, dashboard and tests read it.

Rules:
  1. What travels is plain numbers, by a counter's name; one with a label is `name.label`.
  2. Between two steps at most SAMPLES_MAX durations of a kind are kept; older ones are dropped.
  3. Nothing is told when nothing is new: an idle step costs two comparisons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:kvserver_"
SAMPLES_MAX = 1024
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    kind: type
    text: str
    label: str = ""
    values: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "lookups": Metric(Counter, "Lookups that the hub was asked for."),
    "lookups_late": Metric(Counter, "Lookups without an answer within lookup_ms: taken as misses."),
    "lookups_failed": Metric(Counter, "Lookups that the hub could not answer."),
    "hits_declined": Metric(Counter, "Hits that were expected not to pay, and were computed."),
    "hit_tokens": Metric(
        Counter, "Tokens that loads brought, by the hub's tier.", "tier", ("device", "host", "disk")
    ),
    "loads": Metric(Counter, "Loads of a request's prefix that were begun."),
    "loads_failed": Metric(Counter, "Loads that came short: the rest was recomputed."),
    "fetches": Metric(Counter, "Fetches for requests without blocks of the engine, begun."),
    "fetches_refused": Metric(Counter, "Fetches that a rank had no room for, or cannot stage."),
    "pulled_bytes": Metric(Counter, "Bytes copied from the hub into the engine, all ranks."),
    "pushed_bytes": Metric(Counter, "Bytes committed to the hub, all ranks."),
    "saves": Metric(Counter, "Pushes that were begun, a job of a rank each."),
    "saves_dropped": Metric(
        Counter,
        "Pushes that were given up. queue: jobs_max; late: pin_ms; hub: it failed or refused;"
        " copy: pages could not be copied; pins: ended requests pin their share of the blocks.",
        "reason",
        ("queue", "late", "hub", "copy", "pins"),
    ),
    "pull_seconds": Metric(Histogram, "Time of a rank's load of one request."),
    "push_seconds": Metric(Histogram, "Time of a rank's push, from its step to its last commit."),
    "hub_connected": Metric(Gauge, "1 while the hub answers."),
    "staging_bytes": Metric(Gauge, "Staging memory of the transport in use, all ranks."),
    "fetched_bytes": Metric(Gauge, "Blocks that fetches hold or have room for, all ranks."),
    "pushes_queued": Metric(Gauge, "Pushes under way, all ranks."),
}


@dataclass
class Figures(KVConnectorStats):  # type: ignore[misc]
    """What happened in an interval: {"counters", "seconds", "gauges"}, each by name."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {"counters": {}, "seconds": {}, "gauges": {}}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> Figures:
        """Of ranks, of halves, and of intervals that follow each other: a later gauge replaces an
        earlier one of the same rank."""
        mine = self.data
        for name, value in other.data["counters"].items():
            mine["counters"][name] = mine["counters"].get(name, 0) + value
        for name, samples in other.data["seconds"].items():
            mine["seconds"][name] = [*mine["seconds"].get(name, ()), *samples][-SAMPLES_MAX:]
        for name, values in other.data["gauges"].items():
            mine["gauges"].setdefault(name, {}).update(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: counts of the interval, means and worst cases of durations."""
        line: dict[str, int | float] = {}
        for name, value in sorted(self.data["counters"].items()):
            megabytes = name.endswith("_bytes")
            key = name.replace("_bytes", " MB").replace("_", " ").replace(".", " ")
            line[key] = round(value / 1e6, 1) if megabytes else value
        for name, samples in sorted(self.data["seconds"].items()):
            what = name.removesuffix("_seconds")
            line[f"{what} ms mean"] = round(1e3 * sum(samples) / len(samples), 1)
            line[f"{what} ms max"] = round(1e3 * max(samples), 1)
        for name in sorted(self.data["gauges"]):
            line[name.replace("_", " ")] = self.gauge(name)
        return line

    def gauge(self, name: str) -> float:
        return float(sum(self.data["gauges"][name].values()))


class Recorder:
    """One half's figures since they were last asked for. `who` keeps ranks apart."""

    def __init__(
        self, who: str, counters: Mapping[str, int], gauges: Mapping[str, Callable[[], float]]
    ) -> None:
        self._who = who
        self._counters = counters
        self._gauges = gauges
        self._told: dict[str, int] = {}
        self._told_gauges: dict[str, float] = {}
        self._seconds: dict[str, deque[float]] = {
            name: deque(maxlen=SAMPLES_MAX)
            for name, metric in METRICS.items()
            if metric.kind is Histogram
        }

    def took(self, name: str, seconds: float) -> None:
        """A duration, from any thread."""
        self._seconds[name].append(seconds)

    def take(self) -> Figures | None:
        """What is new; None when nothing is."""
        data: dict[str, Any] = {"counters": {}, "seconds": {}, "gauges": {}}
        now = dict(self._counters)
        if now != self._told:
            for name, value in now.items():
                new = value - self._told.get(name, 0)
                if new and name.partition(".")[0] in METRICS:
                    data["counters"][name] = new
            self._told = now
        for name, kept in self._seconds.items():
            if kept:
                data["seconds"][name] = [kept.popleft() for _ in range(len(kept))]
        gauges = {name: read() for name, read in self._gauges.items()}
        if gauges != self._told_gauges:
            self._told_gauges = gauges
            data["gauges"] = {name: {self._who: value} for name, value in gauges.items()}
        figures = Figures(data)
        return None if figures.is_empty() else figures


class PromFigures(KVConnectorPromMetrics):  # type: ignore[misc]
    """METRICS in vLLM's registry, for each of its engines."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._children: dict[int, dict[str, Any]] = {at: {} for at in per_engine_labelvalues}
        self._known: dict[int, Figures] = {at: Figures() for at in per_engine_labelvalues}
        for name, metric in METRICS.items():
            made = self._make(name, metric, metric_types[metric.kind], labelnames)
            for engine, values in per_engine_labelvalues.items():
                for value in metric.values:
                    child = made.labels(*values, value)
                    self._children[engine][f"{name}.{value}"] = child
                if not metric.label:
                    self._children[engine][name] = made.labels(*values)

    def _make(self, name: str, metric: Metric, cls: Any, labelnames: list[str]) -> Any:
        labels = [*labelnames, *([metric.label] if metric.label else [])]
        extra: dict[str, Any] = {}
        if metric.kind is Histogram:
            extra["buckets"] = _BUCKETS
        if metric.kind is Gauge:
            extra["multiprocess_mode"] = "mostrecent"
        return cls(name=PREFIX + name, documentation=metric.text, labelnames=labels, **extra)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        children, known = self._children[engine_idx], self._known[engine_idx]
        for name, value in transfer_stats_data["counters"].items():
            children[name].inc(value)
        for name, samples in transfer_stats_data["seconds"].items():
            for sample in samples:
                children[name].observe(sample)
        gauges = {"counters": {}, "seconds": {}, "gauges": transfer_stats_data["gauges"]}
        known.aggregate(Figures(gauges))
        for name in transfer_stats_data["gauges"]:
            children[name].set(known.gauge(name))
