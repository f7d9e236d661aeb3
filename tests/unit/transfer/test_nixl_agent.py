"""The agent's thread: turns, terminal states, lost slots and the rebuilt agent.

NIXL itself is stood in for by an agent whose transfers end when the test says so; the real one is
used in `tests/contract/test_nixl.py`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.base import TransferError
from kvserver.transfer.nixl import POSTS_PER_CLIENT, Ended, Job, NixlAgent
from kvserver.transfer.posts import cut

AREA_BYTES = 1 << 16
PIECE = 1024


class Puppet:
    """A Mover that records what it is asked for. Metadata is the peer's name."""

    made: list[Puppet]

    def __init__(self, name: str) -> None:
        self.name = name
        self.states: dict[int, State] = {}
        self.posted: list[tuple[str, int]] = []  # peer, bytes
        self.at_once = True
        self.peers: set[str] = set()
        self.closed = False
        self.released: list[int] = []

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        assert length == AREA_BYTES

    def metadata(self) -> bytes:
        return b"ours"

    def add_peer(self, metadata: bytes) -> str:
        if metadata == b"garbage":
            raise NixlError("the peer's metadata is refused")
        self.peers.add(metadata.decode())
        return metadata.decode()

    def drop_peer(self, name: str) -> None:
        self.peers.discard(name)

    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]:
        if peer not in self.peers:
            raise NixlError("no such peer")
        assert (local[:, 1] == remote[:, 1]).all()
        handle = len(self.posted) + 1
        state = self.states[handle] = State.DONE if self.at_once else State.RUNNING
        self.posted.append((peer, int(local[:, 1].sum())))  # a test that sees it says how it ends
        return handle, state

    def state(self, handle: int) -> State:
        return self.states[handle]

    def release(self, handle: int) -> None:
        self.released.append(handle)
        if self.states[handle] is State.RUNNING and not self.closed:
            raise NixlError("still running")

    def close(self) -> None:
        self.closed = True


class Bench:
    """A NixlAgent over Puppets, and jobs for it."""

    def __init__(self, rebuild_s: float = 30.0, nice: int = 0) -> None:
        self.area = np.zeros(AREA_BYTES, np.uint8)
        self.puppets: list[Puppet] = []
        self.reports: list[tuple[str, BaseException]] = []
        self.rebuilt = 0
        self.lost: set[int] = set()
        self.arrived: list[list[int]] = []
        self.agent = NixlAgent(
            self.area,
            backend="UCX",
            params={},
            rebuild_s=rebuild_s,
            rebuilt=self._rebuilt,
            report=lambda where, error: self.reports.append((where, error)),
            log=logging.getLogger("test"),
            nice=nice,
            make=self._make,
        )
        self.agent.start().result(5)

    def _make(self, name: str) -> Puppet:
        self.puppets.append(Puppet(name))
        return self.puppets[-1]

    def _rebuilt(self) -> None:
        self.rebuilt += 1

    @property
    def puppet(self) -> Puppet:
        return self.puppets[-1]

    def attach(self, client: int) -> None:
        self.agent.attach(client, f"c-{client}".encode(), "c-").result(5)

    def job(self, client: int, items: int = 1, posts: int = 1) -> tuple[Job, threading.Event]:
        over = threading.Event()
        pieces = np.arange(posts, dtype=np.uint64) * np.uint64(PIECE)
        job = Job(
            client=client,
            read=True,
            memory=Memory.DRAM,
            posts=cut(
                pieces + np.uint64(self.agent.base),
                pieces,
                np.full(posts, PIECE, np.uint64),
                np.arange(posts) % items,
                device=0,
                post_bytes=PIECE,
            ),
            outcomes=np.zeros(items, np.uint8),
            current=lambda item: item not in self.lost,
            ended=lambda _: over.set(),
            arrived=self.arrived.append,
        )
        return job, over


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.agent.close()
    assert bench.reports == []


def eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def test_a_job_ends_when_all_its_posts_are_done(bench: Bench) -> None:
    bench.attach(1)
    job, over = bench.job(1, items=2, posts=6)
    bench.agent.submit(job)
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.OK, Ended.OK]
    assert bench.puppet.posted == [("c-1", PIECE)] * 6
    assert bench.agent.bytes_read == 6 * PIECE


@pytest.mark.parametrize("nice", [0, 3])
def test_the_thread_steps_back_behind_the_others(nice: int) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    bench = Bench(nice=nice)
    try:
        thread = bench.agent._thread.native_id
        assert thread is not None
        told = os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)
        assert told == ((min(19, usual[0] + nice), os.SCHED_BATCH) if nice else usual)
        assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)) == usual
    finally:
        bench.agent.close()


def test_an_item_has_arrived_with_the_last_of_its_posts(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1, items=2, posts=4)  # of items 0, 1, 0, 1
    bench.agent.submit(job)
    for handle in (1, 2):
        eventually(lambda: handle in bench.puppet.states, "posted")  # noqa: B023
        bench.puppet.states[handle] = State.DONE
    eventually(lambda: len(bench.puppet.posted) == 4, "all posted")
    assert bench.arrived == [], "half of each item"
    bench.puppet.states[3] = State.DONE
    eventually(lambda: bench.arrived == [[0]], "the first item has arrived")
    assert not over.is_set(), "while the other still moves"
    bench.puppet.states[4] = State.DONE
    assert over.wait(5)
    assert bench.arrived == [[0], [1]]


def test_an_item_of_which_a_post_failed_has_not_arrived(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1, items=2, posts=3)  # of items 0, 1, 0
    bench.agent.submit(job)
    for handle, state in ((1, State.DONE), (2, State.DONE), (3, State.FAILED)):
        eventually(lambda: handle in bench.puppet.states, "posted")  # noqa: B023
        bench.puppet.states[handle] = state
    assert over.wait(5)
    assert bench.arrived == [[1]]
    assert job.outcomes.tolist() == [Ended.FAILED, Ended.OK]


def test_clients_take_turns(bench: Bench) -> None:
    for client in (1, 2):
        bench.attach(client)
    bench.puppet.at_once = False
    first, first_over = bench.job(1, posts=50)
    second, second_over = bench.job(2, posts=2)
    bench.agent.submit(first)
    bench.agent.submit(second)
    eventually(lambda: len(bench.puppet.posted) >= 4, "two posts each")
    assert [peer for peer, _ in bench.puppet.posted].count("c-2") == 2
    assert [peer for peer, _ in bench.puppet.posted].count("c-1") == POSTS_PER_CLIENT

    def finish() -> bool:
        for handle in list(bench.puppet.states):
            bench.puppet.states[handle] = State.DONE
        return first_over.is_set() and second_over.is_set()

    eventually(finish, "both end")


def test_a_client_that_stands_still_holds_up_nobody(bench: Bench) -> None:
    bench.attach(1)
    bench.attach(2)
    bench.puppet.at_once = False
    stuck, stuck_over = bench.job(1, posts=20)
    bench.agent.submit(stuck)
    eventually(lambda: len(bench.puppet.posted) == POSTS_PER_CLIENT, "what one client may have")
    bench.puppet.at_once = True
    other, other_over = bench.job(2, posts=20)
    bench.agent.submit(other)
    assert other_over.wait(5)
    assert not stuck_over.is_set()
    for handle in (1, 2):
        bench.puppet.states[handle] = State.DONE
    assert stuck_over.wait(5)


def test_a_stopped_job_ends_only_when_what_runs_is_terminal(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1, items=4, posts=4)
    bench.agent.submit(job)
    eventually(lambda: len(bench.puppet.posted) == POSTS_PER_CLIENT, "posted")
    job.stop()
    assert not over.wait(0.2), "two transfers still run"
    assert bench.puppet.released == []
    bench.puppet.states[1] = State.DONE
    assert not over.wait(0.2), "one transfer still runs"
    bench.puppet.states[2] = State.DONE
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.OK, Ended.OK, Ended.FAILED, Ended.FAILED]
    assert len(bench.puppet.posted) == POSTS_PER_CLIENT, "nothing was posted after the stop"


def test_a_lost_slot_is_not_posted(bench: Bench) -> None:
    bench.attach(1)
    bench.lost = {1}
    job, over = bench.job(1, items=3, posts=3)
    bench.agent.submit(job)
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.OK, Ended.STALE, Ended.OK]
    assert len(bench.puppet.posted) == 2


def test_a_slot_that_was_lost_on_the_way_is_stale(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1)
    bench.agent.submit(job)
    eventually(lambda: len(bench.puppet.posted) == 1, "posted")
    bench.lost = {0}
    bench.puppet.states[1] = State.DONE
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.STALE]


def test_a_failed_transfer_fails_its_items_only(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1, items=2, posts=2)
    bench.agent.submit(job)
    eventually(lambda: len(bench.puppet.posted) == 2, "posted")
    bench.puppet.states[1] = State.FAILED
    bench.puppet.states[2] = State.DONE
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.FAILED, Ended.OK]
    assert bench.agent.posts_failed == 1


def test_a_transfer_that_never_ends_costs_the_agent() -> None:
    bench = Bench(rebuild_s=0.2)
    for client in (1, 2):
        bench.attach(client)
    bench.puppet.at_once = False
    stuck, stuck_over = bench.job(1)
    bystander, bystander_over = bench.job(2)
    bench.agent.submit(stuck)
    bench.agent.submit(bystander)
    old = bench.puppet
    assert stuck_over.wait(5)
    assert bystander_over.wait(5)
    assert old.closed, "the old agent was destroyed before anybody was told"
    assert stuck.outcomes.tolist() == bystander.outcomes.tolist() == [Ended.FAILED]
    eventually(lambda: len(bench.puppets) == 2, "a new agent")
    assert bench.rebuilt == 1
    job, over = bench.job(2)
    bench.agent.submit(job)
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.FAILED], "everybody has to attach again"
    bench.attach(2)
    job, over = bench.job(2)
    bench.agent.submit(job)
    assert over.wait(5)
    assert job.outcomes.tolist() == [Ended.OK]
    bench.agent.close()


def test_an_agent_of_another_name_is_refused(bench: Bench) -> None:
    with pytest.raises(NixlError, match="must begin with"):
        bench.agent.attach(1, b"kvserver-main", "c-").result(5)
    assert bench.puppet.peers == set()
    with pytest.raises(NixlError, match="refused"):
        bench.agent.attach(1, b"garbage", "c-").result(5)


def test_a_client_is_not_forgotten_while_a_transfer_of_it_runs(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job, over = bench.job(1)
    bench.agent.submit(job)
    eventually(lambda: len(bench.puppet.posted) == 1, "posted")
    with pytest.raises(NixlError, match="still runs"):
        bench.agent.detach(1).result(5)
    bench.puppet.states[1] = State.DONE
    assert over.wait(5)
    bench.agent.detach(1).result(5)
    assert bench.puppet.peers == set()


def test_close_ends_every_job() -> None:
    bench = Bench()
    bench.attach(1)
    job, over = bench.job(1, posts=3)
    bench.agent.submit(job)
    assert over.wait(5)
    bench.agent.close()
    late, late_over = bench.job(1)
    bench.agent.submit(late)
    assert late_over.wait(5)
    assert late.outcomes.tolist() == [Ended.FAILED]
    assert bench.puppet.closed


def test_an_agent_that_cannot_be_made_is_told() -> None:
    def refuse(_: str) -> Puppet:
        raise NixlError("NIXL has no backend 'NOPE'")

    agent = NixlAgent(
        np.zeros(AREA_BYTES, np.uint8), backend="NOPE", params={}, rebuild_s=1,
        rebuilt=lambda: None, report=lambda *_: None, log=logging.getLogger("test"), make=refuse,
    )  # fmt: skip
    with pytest.raises(TransferError, match="NOPE"):
        agent.start().result(5)
    agent.close()


@pytest.mark.parametrize("lengths", [[1], [10, 10, 10], [100], [7, 64, 200, 1], [64] * 9])
def test_cut_covers_every_byte_once(lengths: list[int]) -> None:
    sizes = np.array(lengths, np.uint64)
    starts = np.cumsum(sizes, dtype=np.uint64) - sizes
    remote = starts + np.uint64(1 << 40)
    posts = cut(starts, remote, sizes, np.arange(len(lengths)), device=3, post_bytes=64)
    covered = []
    for post in posts:
        assert post.nbytes == post.local[:, 1].sum() <= 64
        assert (post.remote[:, 0] - post.local[:, 0] == 1 << 40).all()
        assert (post.remote[:, 2] == 3).all()
        for start, size, _ in post.local.tolist():
            whose = int(np.searchsorted(starts, start, side="right")) - 1
            assert whose in post.items
            covered += range(start, start + size)
    assert covered == list(range(sum(lengths)))
