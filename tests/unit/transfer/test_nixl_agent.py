"""Agents of a worker: turns, terminal states, lost slots, checks, the transfer that does not end.

NIXL itself is stood in for by an agent whose transfers end when the test says so; the real one is
used in `tests/contract/test_nixl.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.nixl.agent import POSTS_PER_CLIENT, NixlAgent, Stuck
from kvserver.transfer.nixl.jobs import JOIN_POSTS, Job, Jobs
from kvserver.transfer.nixl.messages import Attach, Ended
from kvserver.transfer.nixl.posts import cut

AREA_BYTES = 1 << 16
PIECE = 1024
STUCK_S = 30.0


class Puppet:
    """A Mover that records what it is asked for. Metadata is the peer's name."""

    name = "ours"

    def __init__(self) -> None:
        self.states: dict[int, State] = {}
        self.posted: list[tuple[str, int]] = []  # peer, bytes
        self.at_once = True
        self.peers: set[str] = set()
        self.closed = False
        self.refuses = False
        self.added = 0
        self.progressed = 0
        self.released: list[int] = []

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        assert length == AREA_BYTES

    def metadata(self) -> bytes:
        return b"ours"

    def add_peer(self, metadata: bytes) -> str:
        self.added += 1
        if metadata == b"garbage" or self.refuses:
            raise NixlError("the peer's metadata is refused")
        self.peers.add(metadata.decode())
        return metadata.decode()

    def drop_peer(self, name: str) -> None:
        self.peers.discard(name)

    def progress(self) -> None:
        if self.refuses:
            raise NixlError("no progress")
        self.progressed += 1

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


def attach(client: int, metadata: bytes = b"") -> Attach:
    return Attach(0, client, "c-", metadata or f"c-{client}".encode())


class Bench:
    """A NixlAgent over a Puppet, a clock, and jobs for it. `other` is a second agent of them."""

    def __init__(self) -> None:
        self.area = np.zeros(AREA_BYTES, np.uint8)
        self.puppet, self.others = Puppet(), Puppet()
        self.lost: set[int] = set()
        self.checked: list[list[int]] = []
        self.bad: set[int] = set()  # items that do not match their checksums
        self.ended: list[Job] = []
        self.notes: list[str] = []
        self.now = 100.0
        self.jobs = Jobs()
        self.agent, self.other = self._agent(self.puppet, 0), self._agent(self.others, 1)

    def _agent(self, puppet: Puppet, number: int) -> NixlAgent:
        return NixlAgent(
            puppet,
            self.area,
            self.jobs,
            number=number,
            stuck_s=STUCK_S,
            note=lambda event, reason: self.notes.append(event),
            clock=lambda: self.now,
        )

    def attach(self, *clients: int) -> None:
        for client in clients:
            told = attach(client)
            self.agent.attach(told)
            self.jobs.admit(told)

    def _wrong(self, items: list[int]) -> list[int]:
        self.checked.append(items)
        return [item for item in items if item in self.bad]

    def job(self, client: int, items: int = 1, posts: int = 1) -> Job:
        """Submitted."""
        pieces = np.arange(posts, dtype=np.uint64) * np.uint64(PIECE)
        job = Job(
            client=client,
            read=True,
            memory=Memory.DRAM,
            posts=cut(
                pieces + np.uint64(self.area.ctypes.data),
                pieces,
                np.full(posts, PIECE, np.uint64),
                np.arange(posts) % items,
                device=0,
                post_bytes=PIECE,
            ),
            outcomes=np.zeros(items, np.uint8),
            current=lambda item: item not in self.lost,
            ended=self.ended.append,
            wrong=self._wrong,
        )
        self.jobs.submit(job)
        return job

    def steps(self) -> None:
        """Until nothing moves."""
        for _ in range(1000):
            if not self.agent.step():
                return
        raise AssertionError("it moves for ever")

    def finish(self, handle: int, state: State = State.DONE) -> None:
        assert self.puppet.states[handle] is State.RUNNING
        self.puppet.states[handle] = state
        self.steps()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_job_ends_when_all_its_posts_are_done(bench: Bench) -> None:
    bench.attach(1)
    job = bench.job(1, items=2, posts=6)
    assert bench.ended == []
    bench.steps()
    assert bench.ended == [job]
    assert job.outcomes.tolist() == [Ended.OK, Ended.OK]
    assert bench.puppet.posted == [("c-1", PIECE)] * 6
    assert bench.puppet.released == [1, 2, 3, 4, 5, 6]
    assert bench.agent.totals == (6 * PIECE, 0, 6, 0)
    assert bench.agent.pause_s is None


def test_an_item_is_checked_with_the_last_of_its_posts(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1, items=2, posts=4)  # of items 0, 1, 0, 1
    bench.steps()
    bench.finish(1)
    bench.finish(2)
    assert bench.checked == [], "half of each item"
    bench.finish(3)
    assert (bench.checked, bench.ended) == ([[0]], []), "while the other still moves"
    bench.finish(4)
    assert (bench.checked, bench.ended) == ([[0], [1]], [job])


def test_what_does_not_match_is_corrupt_and_stale_where_its_slot_is_gone(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    bench.bad = {1, 2}
    job = bench.job(1, items=3, posts=3)
    bench.steps()
    bench.finish(1)
    bench.finish(2)
    bench.lost = {2}
    bench.finish(3)
    assert bench.checked == [[0], [1], [2]]
    assert job.outcomes.tolist() == [Ended.OK, Ended.CORRUPT, Ended.STALE]


def test_agents_take_posts_of_one_job(bench: Bench) -> None:
    bench.attach(1)
    job = bench.job(1, items=2, posts=2 + JOIN_POSTS)
    bench.agent.step()  # the first one reaches the client
    assert bench.others.peers == set()
    for agent in (bench.agent, bench.other) * 10:
        agent.step()
    assert bench.others.peers == {"c-1"}
    assert (len(bench.puppet.posted), len(bench.others.posted)) == (4, 2), "by turns"
    assert (bench.ended, job.outcomes.tolist()) == ([job], [Ended.OK, Ended.OK])
    assert bench.agent.totals == (4 * PIECE, 0, 4, 0)
    assert bench.other.totals == (2 * PIECE, 0, 2, 0)


def test_an_agent_whose_transfers_stand_still_leaves_the_rest_to_the_other(bench: Bench) -> None:
    bench.attach(1)
    job = bench.job(1, posts=20)
    bench.agent.step()
    bench.puppet.at_once = False
    bench.steps()
    while bench.other.step():
        pass
    assert len(bench.others.posted) == 20 - 1 - POSTS_PER_CLIENT
    assert bench.ended == []
    bench.finish(2)
    bench.finish(3)
    assert bench.ended == [job]


def test_an_item_of_which_a_post_failed_is_not_checked(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1, items=2, posts=3)  # of items 0, 1, 0
    bench.steps()
    for handle, state in ((1, State.DONE), (2, State.DONE), (3, State.FAILED)):
        bench.finish(handle, state)
    assert (bench.checked, bench.ended) == ([[1]], [job])
    assert job.outcomes.tolist() == [Ended.FAILED, Ended.OK]


def test_clients_take_turns(bench: Bench) -> None:
    bench.attach(1, 2)
    bench.puppet.at_once = False
    first, second = bench.job(1, posts=50), bench.job(2, posts=2)
    bench.steps()
    assert [peer for peer, _ in bench.puppet.posted] == ["c-1", "c-2"] * POSTS_PER_CLIENT
    assert bench.agent.in_flight == 2 * POSTS_PER_CLIENT
    while bench.agent.in_flight:
        for handle, state in list(bench.puppet.states.items()):
            if state is State.RUNNING:
                bench.finish(handle)
    assert bench.ended == [second, first]


def test_a_client_that_stands_still_holds_up_nobody(bench: Bench) -> None:
    bench.attach(1, 2)
    bench.puppet.at_once = False
    stuck = bench.job(1, posts=20)
    bench.steps()
    assert len(bench.puppet.posted) == POSTS_PER_CLIENT
    bench.puppet.at_once = True
    other = bench.job(2, posts=20)
    bench.steps()
    assert bench.ended == [other]
    bench.finish(1)
    bench.finish(2)
    assert bench.ended == [other, stuck]


def test_a_stopped_job_ends_only_when_what_runs_is_terminal(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1, items=4, posts=4)
    bench.steps()
    bench.jobs.stop(job)
    bench.steps()
    assert (bench.ended, bench.puppet.released) == ([], []), "two transfers still run"
    bench.finish(1)
    assert bench.ended == [], "one transfer still runs"
    bench.finish(2)
    assert bench.ended == [job]
    assert job.outcomes.tolist() == [Ended.OK, Ended.OK, Ended.FAILED, Ended.FAILED]
    assert len(bench.puppet.posted) == POSTS_PER_CLIENT, "nothing was posted after the stop"


def test_a_lost_slot_is_not_posted(bench: Bench) -> None:
    bench.attach(1)
    bench.lost = {1}
    job = bench.job(1, items=3, posts=3)
    bench.steps()
    assert job.outcomes.tolist() == [Ended.OK, Ended.STALE, Ended.OK]
    assert len(bench.puppet.posted) == 2


def test_a_slot_that_was_lost_on_the_way_is_stale(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1)
    bench.steps()
    bench.lost = {0}
    bench.finish(1)
    assert (bench.ended, job.outcomes.tolist()) == ([job], [Ended.STALE])


def test_a_failed_transfer_fails_its_items_only(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1, items=2, posts=2)
    bench.steps()
    bench.finish(1, State.FAILED)
    bench.finish(2)
    assert job.outcomes.tolist() == [Ended.FAILED, Ended.OK]
    assert bench.agent.posts_failed == 1


def test_a_post_that_is_refused_is_a_failed_one(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.peers.clear()
    job = bench.job(1, posts=2)
    bench.steps()
    assert (bench.ended, job.outcomes.tolist()) == ([job], [Ended.FAILED])
    assert bench.notes == ["nixl_post"] * 2


def test_a_transfer_that_does_not_end_is_told(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    bench.job(1)
    bench.steps()
    bench.now += STUCK_S
    bench.steps()
    bench.now += 0.1
    with pytest.raises(Stuck, match="not terminal after"):
        bench.agent.step()
    assert bench.ended == []


def test_an_agent_that_cannot_join_leaves_it_to_the_other(bench: Bench) -> None:
    bench.attach(1)
    bench.others.refuses = True
    job = bench.job(1, posts=20)
    bench.agent.step()
    while bench.other.step():
        pass
    assert (bench.others.posted, bench.notes) == ([], ["nixl_join"])
    bench.others.refuses = False
    assert not bench.other.step(), "it is not asked again"
    bench.steps()
    assert (bench.ended, job.outcomes.tolist()) == ([job], [Ended.OK])


def test_who_has_joined_attaches_to_what_a_client_registers_later(bench: Bench) -> None:
    bench.attach(1)
    bench.job(1, posts=20)
    bench.agent.step()
    assert bench.jobs.admit(attach(1)) == set()
    bench.other.step()
    assert bench.jobs.admit(attach(1)) == {1}
    bench.other.join(attach(1))
    assert bench.others.added == 2
    bench.others.refuses = True
    bench.other.join(attach(1))
    posted = len(bench.others.posted)
    while bench.other.step():
        pass
    assert len(bench.others.posted) == posted
    assert bench.jobs.admit(attach(1)) == set(), "it has left"
    bench.steps()
    assert len(bench.ended) == 1


def test_somebody_has_to_wire_from_an_attach_on(bench: Bench) -> None:
    """UCX's thread in the client may be spinning, whether anything is moved or not."""
    assert bench.agent.wiring is None
    bench.attach(1)
    soon = bench.agent.wiring
    assert soon is not None
    assert soon <= 1e-3
    bench.now += 2
    later = bench.agent.wiring
    assert later is not None
    assert soon < later < 0.1
    bench.now += 3600
    idle = bench.agent.wiring
    assert idle is not None
    assert later < idle <= 0.1, "a client that was stopped goes on some time"
    bench.attach(2)
    assert bench.agent.wiring == soon
    bench.agent.detach(1)
    bench.agent.detach(2)
    assert bench.agent.wiring is None


def test_somebody_has_to_wire_until_the_first_transfer_is_done(bench: Bench) -> None:
    bench.attach(1)
    bench.now += 3600
    bench.puppet.at_once = False
    bench.job(1, posts=POSTS_PER_CLIENT + 1)
    bench.steps()
    soon = bench.agent.wiring
    assert soon is not None
    assert soon <= 1e-3
    assert bench.agent.pause_s == soon, "its own thread need not hurry meanwhile"
    bench.agent.wire()
    assert bench.puppet.progressed == 1
    bench.puppet.refuses = True
    bench.agent.wire()
    bench.agent.wire()
    assert bench.notes == ["nixl_wire"], "said once, and it goes on"
    bench.puppet.refuses = False
    bench.now += STUCK_S / 2
    later = bench.agent.wiring
    assert later is not None
    assert soon < later < 0.1, "a client that stands still is worth less"
    bench.finish(1)
    assert bench.agent.in_flight
    assert bench.agent.wiring is None
    assert bench.agent.pause_s is not None
    assert bench.agent.pause_s < soon


def test_an_agent_of_another_name_is_refused(bench: Bench) -> None:
    with pytest.raises(NixlError, match="must begin with"):
        bench.agent.attach(attach(1, b"kvserver-main"))
    assert bench.puppet.peers == set()
    with pytest.raises(NixlError, match="refused"):
        bench.agent.attach(attach(1, b"garbage"))
    bench.attach(1)
    with pytest.raises(NixlError, match="has attached as 'c-1'"):
        bench.agent.attach(attach(1, b"c-2"))
    assert bench.puppet.peers == {"c-1"}


def test_a_peer_that_is_forgotten_is_dropped(bench: Bench) -> None:
    bench.attach(1, 2)
    bench.agent.detach(1)
    assert bench.puppet.peers == {"c-2"}
    bench.agent.detach(1)  # nobody by that name


def test_after_close_what_runs_is_still_looked_at(bench: Bench) -> None:
    bench.attach(1)
    bench.puppet.at_once = False
    job = bench.job(1, posts=3)
    bench.agent.step()
    bench.jobs.close()
    bench.steps()
    assert (bench.ended, bench.agent.in_flight, len(bench.puppet.posted)) == ([], 1, 1)
    bench.finish(1)
    assert (bench.ended, bench.agent.in_flight) == ([job], 0)


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
