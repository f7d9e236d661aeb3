"""docker/grafana.json: each metric that it asks for exists, each figure of engines is on it."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import ServerProcess

pytest.importorskip("vllm")

from prometheus_client import Counter, Histogram

from kvserver_vllm.figures import METRICS, PREFIX

DASHBOARD = Path(__file__).parents[3] / "docker" / "grafana.json"
_NAME = re.compile(r"(?:vllm:)?kvserver_\w+")
_EVENTS = re.compile(r'event=~"([^"]+)"')
_LABELS = re.compile(r"\bby \(([^)]*)\)")


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def engine_names() -> set[str]:
    names = set()
    for name, metric in METRICS.items():
        if metric.kind is Counter:
            names.add(f"{PREFIX}{name}_total")
        elif metric.kind is Histogram:
            names |= {f"{PREFIX}{name}_{part}" for part in ("bucket", "count", "sum")}
        else:
            names.add(PREFIX + name)
    return names


def test_the_metrics_that_it_asks_for_exist(server: ServerProcess) -> None:
    server.stats()  # a call, so that there are latencies
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    names = {sample.name for sample in samples}
    asked = {name for one in expressions() for name in _NAME.findall(one)}
    assert len(asked) > 30
    assert asked - names - engine_names() == set()
    events = {sample.labels["event"] for sample in samples if "event" in sample.labels}
    wanted = {event for one in expressions() for found in _EVENTS.findall(one)
              for event in found.split("|")}  # fmt: skip
    assert wanted
    assert wanted <= events
    labels = {label for sample in samples for label in sample.labels} | {"instance", "le"}
    labels |= {metric.label for metric in METRICS.values()}
    by = {name.strip() for one in expressions() for group in _LABELS.findall(one)
          for name in group.split(",")}  # fmt: skip
    assert by <= labels


def test_every_figure_of_engines_is_on_it() -> None:
    text = " ".join(expressions())
    assert [name for name in METRICS if PREFIX + name not in text] == []


def test_it_is_laid_out_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
