"""Prometheus metrics over HTTP.

Rule 1: gauges and totals are read from one `Stats` answer at each scrape, so what /metrics shows
and what `kvserver stats` shows are the same books; only latencies are measured here.
Rule 2: a name never carries a tenant, a model or a key: the number of series is fixed.
Rule 3: a scrape that cannot be answered in time (the loop stands still) shows latencies only, and
`kvserver_up` 0.
"""

from __future__ import annotations

import threading
from collections import Counter as Counted
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LATENCY_BUCKETS = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60,
)  # fmt: skip
TIER_NAMES = {1: "device", 2: "host", 3: "disk"}
SLOT_STATES = ("free", "filling", "committed", "copying", "quarantined")

_ROLES = {
    "kv_both": (True, True),
    "kv_producer": (True, False),
    "kv_consumer": (False, True),
    "neither": (False, False),
}

# What Stats counts per tier, as `NAME_TIER`: the metric, and what it counts.
TIER_COUNTERS = {
    "evicted": ("kvserver_evictions", "Blocks evicted from a tier."),
    "corrupt": ("kvserver_corrupt_blocks", "Blocks dropped because their bytes were wrong."),
}
# What Stats counts once: the metric, and what it counts.
COUNTERS = {
    "hits": ("kvserver_hits", "Blocks that a lookup found."),
    "misses": ("kvserver_misses", "Blocks that a lookup did not find."),
    "near_misses": (
        "kvserver_near_miss_namespaces",
        "Namespaces opened that differ in one field from another.",
    ),
    "spills": ("kvserver_spills", "Blocks written to disk."),
    "spill_skipped": ("kvserver_spill_skipped", "Blocks that lost their disk copy to the lag."),
    "promotions": ("kvserver_promotions", "Blocks copied from disk to memory."),
    "uploads": ("kvserver_uploads", "Blocks copied from memory to the device."),
    "downloads": ("kvserver_downloads", "Blocks copied from the device to memory."),
    "tails_expired": ("kvserver_tails_expired", "Tails that left when their time was over."),
    "tails_displaced": ("kvserver_tails_displaced", "Tails that made way for newer ones."),
}
# Field of a tier's Stats: the metric, and what it is.
_TIER_GAUGES = {
    "bytes_total": ("kvserver_bytes_capacity", "Configured bytes of a tier's data."),
    "bytes_ready": ("kvserver_bytes_ready", "Bytes of a tier that may be used by now."),
    "bytes_used": ("kvserver_bytes_used", "Bytes in slots that are not free."),
    "up": ("kvserver_tier_up", "1 while a tier works."),
}
_GAUGES = {
    "blocks_filling": "Blocks being written.",
    "blocks_announced": "Blocks announced and not yet begun.",
    "spill_queue_bytes": "Bytes that wait for their write to disk.",
    "epoch": "Starts of the server on this arena.",
    "draining": "1 while no new reservations are taken.",
}


class Metrics:
    """Own registry, so that two servers in one process do not meet."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        """`stats` gives a StatsReply and may raise TimeoutError; it is called off the loop."""
        self.registry = CollectorRegistry()
        self._latency = Histogram(
            "kvserver_rpc_seconds",
            "Time from a call's arrival to its end; a stream's whole life.",
            ["rpc"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._calls = Counter(
            "kvserver_rpcs", "Calls by their status.", ["rpc", "code"], registry=self.registry
        )
        self._series: dict[tuple[str, str], tuple[Histogram, Counter]] = {}
        self.registry.register(_StatsCollector(stats))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def observe(self, rpc: str, seconds: float, code: str) -> None:
        """One call has ended."""
        series = self._series.get((rpc, code))
        if series is None:  # found once: looking labels up costs more than counting
            series = self._latency.labels(rpc), self._calls.labels(rpc, code)
            self._series[rpc, code] = series
        series[0].observe(seconds)
        series[1].inc()

    def listen(self, address: str) -> str:
        """Serve /metrics; the address in use. OSError when it is taken."""
        host, _, port = address.rpartition(":")
        self._server, self._thread = start_http_server(
            int(port), addr=host.strip("[]"), registry=self.registry
        )
        return f"{host}:{self._server.server_port}"

    def close(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


class _StatsCollector(Collector):
    """Turns one Stats answer into metric families."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # asked for at registration, when there is no server yet

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except TimeoutError:
            yield GaugeMetricFamily("kvserver_up", "1 while the server answers.", 0)
            return
        yield GaugeMetricFamily("kvserver_up", "1 while the server answers.", 1)
        yield from _tiers(stats)
        yield from _totals(stats.counters)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"kvserver_{name}", text, float(getattr(stats, name)))
        sessions, namespaces = len(stats.sessions), len(stats.namespaces)
        yield GaugeMetricFamily("kvserver_sessions", "Open sessions.", sessions)
        yield GaugeMetricFamily("kvserver_namespaces", "Known namespaces.", namespaces)
        yield _engines(stats)


def _engines(stats: Any) -> Metric:
    """Engines that take orders, by what they do now."""
    family = GaugeMetricFamily(
        "kvserver_engines", "Engines that take orders, by what they do.", labels=["role"]
    )
    roles = Counted(
        (s.role.produces, s.role.consumes) for s in stats.sessions if s.HasField("role")
    )
    for role, does in _ROLES.items():
        family.add_metric([role], roles[does])
    return family


def _tiers(stats: Any) -> Iterator[Metric]:
    for name, (metric, text) in _TIER_GAUGES.items():
        gauge = GaugeMetricFamily(metric, text, labels=["tier"])
        for tier in stats.tiers:
            gauge.add_metric([TIER_NAMES[tier.tier]], float(getattr(tier, name)))
        yield gauge
    slots = GaugeMetricFamily("kvserver_slots", "Slots by state.", labels=["tier", "state"])
    blocks = GaugeMetricFamily("kvserver_blocks", "Whole blocks on a tier.", labels=["tier"])
    quarantined = 0
    for tier in stats.tiers:
        tier_name = TIER_NAMES[tier.tier]
        for state in SLOT_STATES:
            slots.add_metric([tier_name, state], getattr(tier, f"slots_{state}"))
        blocks.add_metric([tier_name], tier.slots_committed)
        quarantined += tier.slots_quarantined
    yield slots
    yield blocks
    yield GaugeMetricFamily(
        "kvserver_quarantined_slots", "Slots that somebody may still touch.", quarantined
    )


def _totals(counters: Mapping[str, int]) -> Iterator[Metric]:
    rest = dict(counters)
    for name, (metric, text) in COUNTERS.items():
        yield CounterMetricFamily(metric, text, rest.pop(name, 0))
    for name, (metric, text) in TIER_COUNTERS.items():
        family = CounterMetricFamily(metric, text, labels=["tier"])
        for tier in TIER_NAMES.values():
            family.add_metric([tier], rest.pop(f"{name}_{tier}", 0))
        yield family
    restored = GaugeMetricFamily(
        "kvserver_restored_blocks", "Blocks that the last start found.", labels=["tier"]
    )
    for tier in ("host", "disk"):
        restored.add_metric([tier], rest.pop(f"restored_{tier}", 0))
    yield restored
    moved = CounterMetricFamily(
        "kvserver_bytes",
        "Bytes moved. Host: what clients pushed and pulled; device, disk: written and read.",
        labels=["tier", "direction"],
    )
    for tier in TIER_NAMES.values():
        for direction in ("in", "out"):
            moved.add_metric([tier, direction], rest.pop(f"bytes_{tier}_{direction}", 0))
    yield moved
    sockets = CounterMetricFamily(
        "kvserver_transport_bytes",
        "Bytes of cells that the server itself moved for clients; shm clients copy by themselves.",
        labels=["transport", "direction"],
    )
    for transport in ("tcp", "nixl"):
        for direction in ("in", "out"):
            moved_bytes = rest.pop(f"{transport}_bytes_{direction}", 0)
            sockets.add_metric([transport, direction], moved_bytes)
    yield sockets
    yield GaugeMetricFamily(
        "kvserver_watchers", "Open streams that tell where blocks are.", rest.pop("watchers", 0)
    )
    yield GaugeMetricFamily(
        "kvserver_tcp_connections", "Open data connections.", rest.pop("tcp_connections", 0)
    )
    events = CounterMetricFamily("kvserver_events", "Everything else counted.", labels=["event"])
    for name, value in sorted(rest.items()):
        events.add_metric([name], value)
    yield events
