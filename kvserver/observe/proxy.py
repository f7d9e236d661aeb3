"""Prometheus metrics of a P/D proxy.

Rule: labels are engines (whose number is configured) and fixed words, never a model or a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
States = Callable[[], Iterable[tuple[str, str, bool, int]]]


class ProxyMetrics:
    """Own registry, so that two proxies in one process do not meet."""

    def __init__(self, engines: States) -> None:
        """`engines` gives (leg, url, up, outstanding requests) of each."""
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "kvserver_proxy_requests", "Requests by how they ended.", ["outcome"], registry=registry
        )
        self.legs = Counter(
            "kvserver_proxy_legs",
            "Requests sent to engines, by outcome.",
            ["leg", "engine", "outcome"],
            registry=registry,
        )
        self.alone = Counter(
            "kvserver_proxy_alone",
            "Completions that went to a decode engine without a prefill, by reason.",
            ["reason"],
            registry=registry,
        )
        self.prefill_seconds = Histogram(
            "kvserver_proxy_prefill_seconds",
            "Duration of a prefill that succeeded.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_byte_seconds = Histogram(
            "kvserver_proxy_first_byte_seconds",
            "From a request's arrival to the decode engine's first byte, prefill included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge("kvserver_proxy_running", "Requests that run.", registry=registry)
        registry.register(_Engines(engines))

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    """What the pools know, read at each scrape."""

    def __init__(self, engines: States) -> None:
        self._engines = engines

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        labels = ["leg", "engine"]
        up = GaugeMetricFamily("kvserver_proxy_engine_up", "1 while it is used.", labels=labels)
        load = GaugeMetricFamily(
            "kvserver_proxy_engine_outstanding", "Requests that it has.", labels=labels
        )
        for leg, url, is_up, outstanding in self._engines():
            up.add_metric([leg, url], int(is_up))
            load.add_metric([leg, url], outstanding)
        yield up
        yield load
