"""A lane and who wires for it: nothing that is urgent is missed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvserver.transfer.nixl.agent import WIRE_S, NixlAgent
from kvserver.transfer.nixl.jobs import Jobs
from kvserver.transfer.nixl.lane import Lane
from tests.unit.transfer.test_nixl_agent import AREA_BYTES, Puppet, attach

LONG_S = 20.0


class Bench:
    """A lane that runs, with a clock of the test's."""

    def __init__(self) -> None:
        self.now = 100.0
        self.jobs, self.wiring = Jobs(), threading.Event()
        self.failures: list[Exception] = []
        self.agent = NixlAgent(
            Puppet(), np.zeros(AREA_BYTES, np.uint8), self.jobs, stuck_s=LONG_S,
            note=lambda event, reason: None, clock=lambda: self.now,
        )  # fmt: skip
        self.lane = Lane(0, self.agent, self.jobs, wiring=self.wiring, fail=self.failures.append)
        self.lane.start()

    def attach(self, client: int) -> None:
        self.lane.ask(lambda agent: agent.attach(attach(client)))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.jobs.close()
    assert bench.lane.ended(LONG_S)
    assert bench.failures == []


def test_who_wires_is_woken_by_each_attach(bench: Bench) -> None:
    assert bench.lane.wire() is None
    for client in (1, 2):
        bench.attach(client)
        assert bench.wiring.wait(LONG_S), f"client {client} is not seen"
        bench.wiring.clear()
        assert bench.lane.wire() == WIRE_S
        bench.now += 3600  # the lane does not step meanwhile
        later = bench.lane.wire()
        assert later is not None
        assert later > WIRE_S


def test_who_wires_finds_what_it_was_woken_for(bench: Bench) -> None:
    class Looks(threading.Event):
        """Looks at once, as a thread may that gets the interpreter then."""

        def set(self) -> None:
            found.append(bench.lane._wire_s)
            super().set()

    found: list[float | None] = []
    bench.lane._wiring = Looks()
    bench.attach(1)
    assert bench.lane._wiring.wait(LONG_S)
    assert found == [WIRE_S]
