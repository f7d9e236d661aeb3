"""What /metrics shows follows from one Stats answer, and survives that there is none."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvproto.v1 import kvserver_pb2 as pb
from kvserver.observe.metrics import Metrics


def stats() -> pb.StatsReply:
    host = pb.TierStats(
        tier=pb.TIER_HOST,
        bytes_total=100,
        bytes_ready=90,
        bytes_used=50,
        slots=10,
        slots_free=3,
        slots_filling=1,
        slots_committed=4,
        slots_quarantined=2,
        up=True,
    )
    counters = {"hits": 7, "evicted_host": 3, "restored_disk": 2, "bytes_disk_in": 9, "stalls": 1}
    counters |= {"tcp_bytes_in": 5, "tcp_connections": 2, "tcp_refused": 4}
    counters |= {"nixl_bytes_out": 6, "watchers": 3, "uploads": 8, "bytes_device_out": 11}
    engine = pb.SessionStats(role=pb.Role(produces=True), ceiling=pb.Role(produces=True))
    return pb.StatsReply(
        tiers=[host], counters=counters, epoch=4, sessions=[pb.SessionStats(), engine]
    )


def scrape(metrics: Metrics) -> dict[str, float]:
    address = metrics.listen("127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    finally:
        metrics.close()
    samples = [sample for family in families for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
        name = f"{sample.name}{{{labels}}}" if labels else sample.name
        assert name not in found, f"{name} is there twice"
        found[name] = sample.value
    return found


def test_gauges_and_totals_are_those_of_stats() -> None:
    metrics = Metrics(stats)
    metrics.observe("Lookup", 0.003, "OK")
    found = scrape(metrics)
    expected = {
        "kvserver_up": 1,
        "kvserver_hits_total": 7,
        "kvserver_misses_total": 0,
        "kvserver_evictions_total{tier=host}": 3,
        "kvserver_evictions_total{tier=disk}": 0,
        "kvserver_restored_blocks{tier=disk}": 2,
        "kvserver_bytes_total{direction=in,tier=disk}": 9,
        "kvserver_bytes_total{direction=out,tier=device}": 11,
        "kvserver_uploads_total": 8,
        "kvserver_downloads_total": 0,
        "kvserver_events_total{event=stalls}": 1,
        "kvserver_events_total{event=tcp_refused}": 4,
        "kvserver_transport_bytes_total{direction=in,transport=tcp}": 5,
        "kvserver_transport_bytes_total{direction=out,transport=tcp}": 0,
        "kvserver_tcp_connections": 2,
        "kvserver_slots{state=committed,tier=host}": 4,
        "kvserver_blocks{tier=host}": 4,
        "kvserver_quarantined_slots": 2,
        "kvserver_bytes_used{tier=host}": 50,
        "kvserver_transport_bytes_total{direction=out,transport=nixl}": 6,
        "kvserver_watchers": 3,
        "kvserver_engines{role=kv_producer}": 1,
        "kvserver_engines{role=kv_both}": 0,
        "kvserver_sessions": 2,
        "kvserver_epoch": 4,
        "kvserver_rpcs_total{code=OK,rpc=Lookup}": 1,
        "kvserver_rpc_seconds_bucket{le=0.005,rpc=Lookup}": 1,
        "kvserver_rpc_seconds_bucket{le=0.002,rpc=Lookup}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_standing_loop_shows_as_down_with_latencies_only() -> None:
    def late() -> pb.StatsReply:
        raise TimeoutError

    metrics = Metrics(late)
    metrics.observe("Lookup", 0.003, "OK")
    found = scrape(metrics)
    assert found["kvserver_up"] == 0
    assert found["kvserver_rpcs_total{code=OK,rpc=Lookup}"] == 1
    assert not [name for name in found if name.startswith("kvserver_slots")]


def test_a_taken_address_is_an_error() -> None:
    first = Metrics(stats)
    address = first.listen("127.0.0.1:0")
    try:
        with pytest.raises(OSError, match="in use"):
            Metrics(stats).listen(address)
    finally:
        first.close()
