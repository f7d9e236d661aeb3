"""The parts of `bench.engine_cost` that judge: which time is whose, what an interval excludes."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from bench.calls import CALLS, CallLog, of, percentile, read, steps
from bench.engine_cost import bootstrap
from tests.support.delaying import DelayingRelay


def test_calls_come_back_as_they_were_told(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls")
    for at in range(100):
        log.add(at % len(CALLS), 1000 + at, 10 * at, at)
    records = read(tmp_path / "calls", since=1050)
    assert records["start"].tolist() == list(range(1050, 1100))
    mine = of(records, CALLS[0])
    assert set(mine["call"].tolist()) == {0}
    assert mine["wall"].tolist() == [10 * (at - 1000) for at in mine["start"].tolist()]


def test_a_step_is_what_lies_between_its_frame_and_has_layers(tmp_path: Path) -> None:
    """Calls of the scheduler half, between steps, are not its own."""
    log = CallLog(tmp_path / "calls")

    def call(name: str, start: int, wall: int) -> None:
        log.add(CALLS.index(name), start, wall, 0)

    call("wait_for_save", 1, 500)  # of a step that began before
    for begin, layers in ((1000, 2), (5000, 0), (9000, 1)):
        call("bind_connector_metadata", begin, 10)
        call("build_connector_meta", begin + 15, 1000)
        for _ in range(layers):
            call("save_kv_layer", begin + 20, 3)
        call("wait_for_save", begin + 40, 5)
        call("clear_connector_metadata", begin + 90, 10)
        call("get_kv_connector_stats", begin + 200, 70)
    assert steps(read(tmp_path / "calls")) == [(1000, 100, 31), (9000, 100, 28)]


def test_a_percentile_of_few_is_the_largest() -> None:
    assert percentile([3, 1, 2], 0.99) == 3
    assert percentile(list(range(1, 201)), 0.99) == 198
    assert percentile(list(range(1, 201)), 0.5) == 100


def test_the_interval_of_ratios_that_vary_is_wide() -> None:
    low, high = bootstrap([0.99, 1.0, 1.01] * 6)
    assert 0.99 < low < 1.0 < high < 1.01
    low, high = bootstrap([0.8, 1.0, 1.25] * 6)
    assert low < 0.95
    assert high > 1.05


@pytest.mark.timeout(30)
def test_a_relay_holds_back_what_the_far_side_says_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with DelayingRelay(target, 0.3) as relay:
            host, _, port = relay.address.rpartition(":")
            near = socket.create_connection((host, int(port)), 10)
            far, _ = listener.accept()
            with near, far:
                began = time.monotonic()
                near.sendall(b"asked")
                assert far.recv(10) == b"asked"
                asked = time.monotonic() - began
                far.sendall(b"answered")
                assert near.recv(10) == b"answered"
                assert time.monotonic() - began >= asked + 0.3
                relay.delay_s = 60.0
                far.sendall(b"late")
                time.sleep(0.1)
                relay.delay_s = 0.0  # holds at once, for what is on its way too
                assert near.recv(10) == b"late"
                far.shutdown(socket.SHUT_WR)
                assert near.recv(10) == b""
