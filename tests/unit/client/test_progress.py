"""The thread that lets a client's agent progress: its pace, its end, and that it never spins."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvclient.errors import DeadlineExceeded
from kvclient.timing import Deadline
from kvclient.transfer import progress
from kvclient.transfer.direct import Registered
from kvclient.transfer.progress import BUSY_S, IDLE_S, LINGER_S, WORK_S, ClientAgent, open_agent
from kvclient.transfer.ring import Ring
from kvproto import nixlib
from kvproto.nixlib import Memory, NixlError

LONG_S = 20.0


AREA = Registered(1, 2, Memory.DRAM, 0, None)


class Puppet:
    """A Target that notes who calls it, and whether two do at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.progressed = 0
        self.overlaps = 0
        self.fails = False
        self.refuses = False
        self.work_s = 0.0
        self.gate = threading.Event()  # progress comes back when it is set
        self.gate.set()
        self.inside = threading.Event()  # one waits for it
        self._calling = threading.Lock()

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        alone = self._calling.acquire(blocking=False)
        self.overlaps += not alone
        self.calls.append(name)
        try:
            yield
        finally:
            if alone:
                self._calling.release()

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        with self._call("register"):
            time.sleep(0.001)
            if self.refuses:
                raise NixlError("no more")

    def deregister(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        with self._call("deregister"):
            pass

    def metadata(self) -> bytes:
        with self._call("metadata"):
            return b"told"

    def progress(self) -> None:
        with self._call("progress"):
            self.progressed += 1
            until_s = time.thread_time() + self.work_s
            while time.thread_time() < until_s:
                pass
            if not self.gate.is_set():
                self.inside.set()
                assert self.gate.wait(LONG_S)
            if self.fails:
                raise NixlError("no progress")

    def close(self) -> None:
        with self._call("close"):
            pass


@pytest.fixture
def puppet() -> Puppet:
    return Puppet()


@pytest.fixture
def agent(puppet: Puppet) -> Iterator[ClientAgent]:
    agent = ClientAgent(puppet, keep=None, progresses=False)
    yield agent
    puppet.gate.set()
    agent.close()
    assert agent.ended(LONG_S)
    assert puppet.overlaps == 0


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def test_it_hurries_while_the_hub_moves_and_a_while_after(
    puppet: Puppet, agent: ClientAgent
) -> None:
    def took(count: int) -> float:
        began, first = time.monotonic(), puppet.progressed
        until(lambda: puppet.progressed >= first + count, "progress")
        return time.monotonic() - began

    assert took(4) > 2 * IDLE_S, "nothing moves"
    with agent.moving():
        with agent.moving():
            pass
        assert min(took(4) for _ in range(3)) < 2 * IDLE_S, "on a full machine too"
        time.sleep(LINGER_S)
        assert min(took(4) for _ in range(3)) < 2 * IDLE_S, "the outer one is not over"
        assert took(10) > 8 * BUSY_S, "it does not spin"
    assert min(took(4) for _ in range(3)) < 2 * IDLE_S, "more may come"
    time.sleep(LINGER_S)
    assert took(4) > 2 * IDLE_S


def test_it_looks_again_soon_where_it_found_work(puppet: Puppet, agent: ClientAgent) -> None:
    puppet.work_s = 5 * WORK_S
    first = puppet.progressed + 1
    until(lambda: puppet.progressed > first, "work, though nothing of ours moves")
    began = time.monotonic()
    until(lambda: puppet.progressed > first + 20, "progress")
    assert time.monotonic() - began < 10 * IDLE_S


def test_one_thread_at_a_time_calls_the_agent(puppet: Puppet, agent: ClientAgent) -> None:
    with agent.moving():
        for _ in range(50):
            agent.register(AREA)
            assert agent.metadata() == b"told"
            agent.deregister(AREA)
    assert puppet.progressed


def test_an_area_is_registered_once(puppet: Puppet, agent: ClientAgent) -> None:
    """Who was cancelled while a thread did it does not know, and asks again."""
    agent.register(AREA)
    agent.register(AREA)
    assert agent.known == [AREA]
    agent.deregister(AREA)
    agent.deregister(AREA)
    assert agent.known == []
    assert [call for call in puppet.calls if call != "progress"] == ["register", "deregister"]
    puppet.refuses = True
    with pytest.raises(NixlError):
        agent.register(AREA)
    assert agent.known == []


def test_a_failure_does_not_end_it(puppet: Puppet, agent: ClientAgent) -> None:
    puppet.fails = True
    with agent.moving():
        until(lambda: puppet.progressed > 3, "it goes on")


def test_close_waits_for_nothing_and_what_was_registered_lives_as_long(puppet: Puppet) -> None:
    class Owner:
        pass

    ring, more = Owner(), Owner()
    alive = [weakref.ref(ring), weakref.ref(more)]
    agent = ClientAgent(puppet, keep=ring, progresses=False)
    agent.register(Registered(1, 2, Memory.DRAM, 0, more))
    puppet.gate.clear()
    assert puppet.inside.wait(LONG_S)
    began = time.monotonic()
    agent.close()
    assert time.monotonic() - began < LONG_S / 2
    del ring, more
    assert not agent.ended(0.05)
    assert puppet.calls[-1:] != ["close"]
    assert all(ref() is not None for ref in alive)
    puppet.gate.set()
    assert agent.ended(LONG_S)
    assert puppet.calls[-1] == "close"
    assert [ref() for ref in alive] == [None, None]
    agent.close()
    assert puppet.calls.count("close") == 1


def test_one_that_progresses_by_itself_has_no_thread(puppet: Puppet) -> None:
    agent = ClientAgent(puppet, keep=None, progresses=True)
    with agent.moving():
        time.sleep(10 * BUSY_S)
    assert puppet.progressed == 0
    agent.close()
    assert puppet.calls == ["close"]


FORGETS = """
import os

from kvclient.transfer.progress import ClientAgent
from tests.unit.client.test_progress import Puppet

class Told(Puppet):
    def close(self):
        os.write(1, b"closed ")

agents = [ClientAgent(Told(), keep=None, progresses=False) for _ in range(2)]
"""


def test_an_interpreter_that_ends_closes_who_was_forgotten() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGETS], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["closed", "closed"]


def test_an_agent_that_comes_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loop is gone by then."""
    made: list[Puppet] = []
    go = threading.Event()

    def make(*args: object, **options: object) -> Puppet:
        assert go.wait(LONG_S)
        made.append(Puppet())
        return made[0]

    monkeypatch.setattr(progress.nixlib, "Agent", make)

    async def late() -> None:
        ring, soon = Ring(1 << 20), Deadline(0.05)
        await open_agent("c", ring, backend="UCX", params={}, direct=False, deadline=soon)

    loop = asyncio.new_event_loop()
    with pytest.raises(DeadlineExceeded):
        loop.run_until_complete(late())
    loop.close()
    go.set()
    until(lambda: made and "close" in made[0].calls, "it is closed")


HALF = """
import sys, time
import numpy as np
from kvproto.nixlib import Agent, Memory

agent = Agent("hub", backend="UCX", params={}, progress=False)
memory = np.zeros(1 << 20, np.uint8)
agent.register(memory.ctypes.data, memory.nbytes, Memory.DRAM)
agent.add_peer(bytes.fromhex(sys.stdin.readline()))
time.sleep(0.3)
agent.progress()
print("half", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not nixlib.available(), reason="NIXL is not installed")
def test_it_rests_while_a_connection_is_half_made() -> None:
    """The hub stands still after its first answer: NIXL's thread takes a core from then on."""
    bare = nixlib.Agent("client", backend="UCX", params={}, progress=False)
    memory = np.zeros(1 << 20, np.uint8)
    agent = ClientAgent(bare, keep=memory, progresses=False)
    agent.register(Registered.of(memory))
    with subprocess.Popen(
        [sys.executable, "-c", HALF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hub:
        try:
            assert hub.stdin is not None
            assert hub.stdout is not None
            hub.stdin.write(agent.metadata().hex() + "\n")
            hub.stdin.flush()
            assert hub.stdout.readline() == "half\n"
            with agent.moving():
                before = time.process_time()
                time.sleep(1.0)
                assert time.process_time() - before < 0.3
        finally:
            hub.kill()
            agent.close()
            assert agent.ended(LONG_S)
