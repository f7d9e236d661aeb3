"""Prometheus metrics over HTTP.

Rule 1: gauges and totals are read from one `Stats` answer at each scrape, so what /metrics shows
and what `kvserver stats` shows are the same books; only latencies are measured here.
Rule 2: a name never carries a tenant, a model or a key: the number of series is fixed.
Rule 3: a scrape that cannot be answered in time (the loop stands still) shows latencies only, and
`kvserver_up` 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

_LATENCY_BUCKETS = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60,
)  # fmt: skip
TIER_NAMES = {1: "device", 2: "host", 3: "disk"}
SLOT_STATES = ("free", "filling", "committed", "copying", "quarantined")

# A counter of Stats, its labels in the name: `evictions.host` -> evictions_total{tier="host"}.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {}
"""Name -> what it counts, label names."""


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
        self.registry.register(_StatsCollector(stats))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def observe(self, rpc: str, seconds: float, code: str) -> None:
        """One call has ended."""
        self._latency.labels(rpc).observe(seconds)
        self._calls.labels(rpc, code).inc()

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
