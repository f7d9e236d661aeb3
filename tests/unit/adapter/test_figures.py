"""Figures travel from both halves through vLLM's own classes to its registry and log line."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm

import kvserver_vllm
from kvserver_vllm.figures import METRICS, PREFIX, SAMPLES_MAX, Figures, Recorder

TRANSFER = SimpleNamespace(
    kv_connector="KVServerConnector", kv_connector_module_path="kvserver_vllm.connector"
)


def recorder(who: str = "0.0", **gauges: float) -> tuple[Recorder, dict[str, int]]:
    counters: dict[str, int] = {}
    reads = {name: (lambda value=value: value) for name, value in gauges.items()}
    return Recorder(who, counters, reads), counters


def taken(one: Recorder) -> Figures:
    figures = one.take()
    assert figures is not None
    return figures


OWN = {"blocks_not_committed", "loads_short", "pinned"}
"""Counters for tests and for debugging: what a rank's part of a load or a job met."""


def test_what_is_counted_is_a_metric() -> None:
    """Fetches and declined hits were counted, and nobody was told."""
    source = Path(kvserver_vllm.__file__).parent
    text = " ".join(path.read_text() for path in source.glob("*.py"))
    counted = set(re.findall(r"""(?:count|_lose)\(f?"([a-z_]+)""", text))
    assert len(counted) > 12
    assert counted - OWN == {name for name, metric in METRICS.items() if metric.kind is Counter}


def test_only_what_is_new_is_told() -> None:
    figures, counters = recorder(pushes_queued=2.0)
    assert taken(figures).data["gauges"] == {"pushes_queued": {"0.0": 2.0}}
    assert figures.take() is None
    counters["loads"] = 3
    counters["a_counter_of_ours"] = 9  # not for vLLM
    figures.took("pull_seconds", 0.5)
    assert taken(figures).data == {
        "counters": {"loads": 3}, "seconds": {"pull_seconds": [0.5]}, "gauges": {},
    }  # fmt: skip
    counters["loads"] = 4
    assert taken(figures).data["counters"] == {"loads": 1}
    assert figures.take() is None


def test_samples_between_two_steps_are_bounded() -> None:
    figures, _ = recorder()
    for at in range(2 * SAMPLES_MAX):
        figures.took("push_seconds", float(at))
    first = taken(figures)
    assert first.data["seconds"]["push_seconds"] == list(map(float, range(1024, 2048)))
    figures.took("push_seconds", 1.0)
    assert len(first.aggregate(taken(figures)).data["seconds"]["push_seconds"]) == SAMPLES_MAX


def test_ranks_add_up_and_a_later_gauge_replaces_its_own() -> None:
    sums = Figures()
    for who, queued, loads in (("0.0", 1.0, 2), ("0.2", 5.0, 3), ("0.0", 2.0, 1)):
        figures, counters = recorder(who, pushes_queued=queued)
        counters["loads"] = loads
        sums.aggregate(pickle.loads(pickle.dumps(taken(figures))))  # as between vLLM's processes
    assert sums.data["counters"] == {"loads": 6}
    assert sums.gauge("pushes_queued") == 7.0


class TestInVllm:
    """The classes that vLLM's front end uses, with a registry of the test's."""

    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
        registry = CollectorRegistry()
        for cls in (Counter, Gauge, Histogram):
            made = type(cls.__name__, (cls,), {})
            made.__init__ = lambda self, *a, _cls=cls, **k: _cls.__init__(  # type: ignore[misc]
                self, *a, **{**k, "registry": registry}
            )
            monkeypatch.setattr(KVConnectorProm, f"_{cls.__name__.lower()}_cls", made)
        return registry

    def prom(self) -> KVConnectorProm:
        config: Any = SimpleNamespace(kv_transfer_config=TRANSFER)
        labels = {engine: ["tiny", str(engine)] for engine in (0, 1)}
        return KVConnectorProm(config, ["model_name", "engine"], labels)

    def wire(self, figures: Figures) -> dict[str, Any]:
        """As SchedulerStats travel to the front end."""
        data = msgspec.msgpack.decode(msgspec.msgpack.encode(figures.to_dict()))
        assert isinstance(data, dict)
        return data

    def test_every_metric_shows_in_the_registry(self, registry: CollectorRegistry) -> None:
        prom = self.prom()
        values = {n: m.values or ("",) for n, m in METRICS.items() if m.kind is Counter}
        figures, counters = recorder(
            hub_connected=1.0, staging_bytes=4096.0, pushes_queued=3.0, fetched_bytes=512.0
        )
        for name, labels in values.items():
            for at, label in enumerate(labels, 1):
                counters[f"{name}.{label}" if label else name] = at
        figures.took("pull_seconds", 0.02)
        figures.took("push_seconds", 3.0)
        prom.observe(self.wire(taken(figures)), engine_idx=1)
        names = {metric.name for metric in registry.collect()}
        assert names == {PREFIX + name for name in METRICS}
        read = registry.get_sample_value
        engine = {"model_name": "tiny", "engine": "1"}
        for name, labels in values.items():
            for at, label in enumerate(labels, 1):
                extra = {METRICS[name].label: label} if label else {}
                assert read(f"{PREFIX}{name}_total", {**engine, **extra}) == at
        assert read(f"{PREFIX}pull_seconds_count", engine) == 1
        assert read(f"{PREFIX}push_seconds_sum", engine) == 3.0
        assert read(f"{PREFIX}pull_seconds_bucket", {**engine, "le": "0.025"}) == 1
        assert read(f"{PREFIX}staging_bytes", engine) == 4096.0
        assert read(f"{PREFIX}hub_connected", engine) == 1.0
        assert read(f"{PREFIX}loads_total", {**engine, "engine": "0"}) == 0

    def test_gauges_of_ranks_that_report_in_turn_add_up(self, registry: CollectorRegistry) -> None:
        prom = self.prom()
        for who, queued in (("0.0", 2.0), ("0.2", 3.0), ("0.0", 0.0)):
            figures, _ = recorder(who, pushes_queued=queued)
            prom.observe(self.wire(taken(figures)), engine_idx=0)
        engine = {"model_name": "tiny", "engine": "0"}
        assert registry.get_sample_value(f"{PREFIX}pushes_queued", engine) == 3.0

    def test_the_log_line(self) -> None:
        transfer: Any = TRANSFER
        logging, lines = KVConnectorLogging(transfer), list[tuple[Any, ...]]()
        for tokens in (128, 256):
            figures, counters = recorder(hub_connected=1.0)
            counters.update({"hit_tokens.disk": tokens, "pulled_bytes": 2_500_000})
            figures.took("pull_seconds", tokens / 1000)
            logging.observe(self.wire(taken(figures)))
        logging.log(lambda *line: lines.append(line))
        assert lines == [(
            "KV Transfer metrics: %s",
            "hit tokens disk=384, pulled MB=5.0, pull ms mean=192.0, pull ms max=256.0, "
            "hub connected=1.0",
        )]  # fmt: skip
        logging.log(lambda *line: lines.append(line))
        assert len(lines) == 1, "an interval without news has no line"
