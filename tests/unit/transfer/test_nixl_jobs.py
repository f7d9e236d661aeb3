"""What there is to move: turns, ends, stops, and a model of several agents that take posts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvproto.nixlib import Memory, NixlError
from kvserver.transfer.nixl.jobs import JOBS_PER_CLIENT_MAX, JOIN_POSTS, Job, Jobs
from kvserver.transfer.nixl.messages import Attach, Ended
from kvserver.transfer.nixl.posts import Post

NOTHING = np.zeros((0, 3), np.uint64)


def job_of(
    client: int,
    items: list[tuple[int, ...]],
    ended: Callable[[Job], None],
    current: Callable[[int], bool] = lambda item: True,
) -> Job:
    """With a post of each of these items."""
    count = max((item for post in items for item in post), default=-1) + 1
    posts = [Post(NOTHING, NOTHING, post, 0) for post in items]
    return Job(client, True, Memory.DRAM, posts, np.zeros(count, np.uint8), current, ended)


def told(client: int, ask: int = 0) -> Attach:
    return Attach(ask, client, "", b"")


class Bench:
    def __init__(self, *clients: int) -> None:
        self.jobs = Jobs()
        self.ended: list[Job] = []
        for client in clients:
            self.jobs.admit(told(client))

    def job(self, client: int, *items: tuple[int, ...]) -> Job:
        """Submitted."""
        job = job_of(client, list(items), self.ended.append)
        self.jobs.submit(job)
        return job

    def reached(self) -> Job:
        """Client 1, of which more waits than JOIN_POSTS; a post is taken."""
        job = self.job(1, *[(0,)] * (JOIN_POSTS + 2))
        self.jobs.whole(*self.take())
        return job

    def take(self, *busy: int) -> tuple[Job, Post]:
        taken = self.jobs.take(0, busy)
        assert taken is not None
        return taken


def test_a_job_ends_when_its_last_post_is_put_back() -> None:
    bench = Bench(1)
    job = bench.job(1, (0,), (1,))
    bench.take()
    bench.take()
    assert bench.jobs.take() is None
    bench.jobs.put_back(job, {1: Ended.CORRUPT})
    assert bench.ended == []
    bench.jobs.put_back(job, {})
    assert bench.ended == [job]
    assert job.outcomes.tolist() == [Ended.OK, Ended.CORRUPT]


def test_an_item_is_whole_with_the_last_of_its_posts() -> None:
    bench = Bench(1)
    job = bench.job(1, (0, 1), (1, 2), (2,))
    posts = [bench.take()[1] for _ in range(3)]
    assert bench.jobs.whole(job, posts[1]) == []
    assert bench.jobs.whole(job, posts[0]) == [0, 1]
    assert bench.jobs.whole(job, posts[2]) == [2]


def test_clients_take_turns() -> None:
    bench = Bench(1, 2, 3)
    for client in (1, 1, 2):
        bench.job(client, (0,), (0,))
    order = [bench.take()[0].client for _ in range(5)]
    assert order == [1, 2, 1, 2, 1]


def test_a_second_agent_joins_who_was_reached_while_much_waits() -> None:
    bench = Bench(1)
    bench.job(1, *[(0,)] * JOIN_POSTS)
    job = bench.job(1, *[(0,)] * 3)
    first, post = bench.take()
    assert bench.jobs.to_join(1) is None, "nothing of it was moved yet"
    bench.jobs.whole(first, post)
    bench.take()
    bench.take()
    assert bench.jobs.take(1) is None, "it has not joined"
    assert bench.jobs.to_join(1) == told(1), "as many wait, in two jobs"
    assert bench.jobs.to_join(1) is None, "once"
    assert bench.jobs.take(1) is not None
    assert bench.jobs.to_join(2) is None, "one less"
    assert bench.jobs.take(1) is not None, "it has joined"
    bench.jobs.stop(job)
    assert bench.jobs.take(0) is None


def test_who_joins_is_told_of_the_last_attach_and_who_has_of_the_next() -> None:
    bench = Bench(1)
    job = bench.reached()
    assert bench.jobs.admit(told(1, ask=7)) == set()
    assert bench.jobs.to_join(1) == told(1, ask=7)
    assert bench.jobs.admit(told(1, ask=8)) == {1}
    bench.jobs.leave(1, 1)
    assert bench.jobs.admit(told(1, ask=9)) == set()
    assert bench.jobs.take(1) is None
    assert bench.jobs.to_join(1) is None, "it could not"
    assert bench.jobs.to_join(2) == told(1, ask=9)
    bench.jobs.stop(job)
    bench.jobs.put_back(job, {})
    bench.jobs.forget(1)
    bench.jobs.leave(2, 1)  # nobody by that name
    bench.jobs.admit(told(1))
    bench.reached()
    assert bench.jobs.to_join(1) == told(1), "another time"


def test_the_first_agent_alone_begins_with_a_client() -> None:
    bench = Bench(1, 2)
    for client in (1, 2):
        bench.job(client, *[(0,)] * (JOIN_POSTS + 1))
    assert bench.jobs.to_join(1) is None
    assert [bench.take()[0].client for _ in range(2)] == [1, 2]
    assert bench.jobs.to_join(1) is None, "neither was reached"


def test_a_client_that_is_busy_with_the_asker_is_passed_over() -> None:
    bench = Bench(1, 2)
    bench.job(1, (0,))
    assert bench.jobs.take(0, [1]) is None
    bench.job(2, (0,))
    assert bench.take(1)[0].client == 2
    assert bench.take(2)[0].client == 1


def test_a_job_that_is_stopped_before_its_turn_ends_at_once() -> None:
    bench = Bench(1)
    job = bench.job(1, (0,))
    bench.jobs.stop(job)
    assert bench.ended == [job]
    assert job.outcomes.tolist() == [Ended.FAILED]
    assert bench.jobs.take() is None


def test_a_stopped_job_ends_when_what_was_taken_is_put_back() -> None:
    bench = Bench(1)
    job = bench.job(1, (0,), (1,), (2,))
    bench.take()
    bench.take()
    bench.jobs.stop(job)
    assert bench.jobs.take() is None
    bench.jobs.put_back(job, {})
    assert bench.ended == []
    bench.jobs.put_back(job, {})
    assert bench.ended == [job]
    assert job.outcomes.tolist() == [Ended.OK, Ended.OK, Ended.FAILED]
    bench.jobs.stop(job)
    assert bench.ended == [job], "once"


def test_a_slot_that_was_lost_on_the_way_is_stale() -> None:
    bench = Bench(1)
    lost: set[int] = set()
    job = job_of(1, [(0, 1)], bench.ended.append, lambda item: item not in lost)
    bench.jobs.submit(job)
    bench.take()
    lost.add(1)
    bench.jobs.put_back(job, {})
    assert job.outcomes.tolist() == [Ended.OK, Ended.STALE]


def test_what_shares_a_post_with_a_lost_slot_is_lost_as_well() -> None:
    job = job_of(1, [(0, 1, 2), (0, 2)], lambda job: None, lambda item: item != 1)
    assert job.lost(job.posts[0]) == {0: Ended.FAILED, 1: Ended.STALE, 2: Ended.FAILED}
    assert job.lost(job.posts[1]) == {}


def test_who_is_not_known_or_has_too_much_is_refused() -> None:
    bench = Bench(1)
    stranger = bench.job(2, (0,))
    assert bench.ended == [stranger]
    for _ in range(JOBS_PER_CLIENT_MAX):
        bench.job(1, (0,))
    more = bench.job(1, (0,))
    assert bench.ended == [stranger, more]
    assert more.outcomes.tolist() == [Ended.FAILED]


def test_a_job_without_posts_ends_at_once() -> None:
    bench = Bench(1)
    job = bench.job(1)
    assert bench.ended == [job]


def test_a_client_is_not_forgotten_while_a_post_of_it_is_taken() -> None:
    bench = Bench(1, 2)
    running, waiting = bench.job(1, (0,), (0,)), bench.job(1, (0,))
    bench.take()
    with pytest.raises(NixlError, match="still runs"):
        bench.jobs.forget(1)
    assert bench.ended == [waiting]
    assert bench.jobs.take() is None, "nothing of it is given out any more"
    bench.jobs.put_back(running, {})
    assert bench.ended == [waiting, running]
    bench.jobs.forget(1)
    bench.jobs.forget(1)  # nobody by that name
    refused = bench.job(1, (0,))
    assert bench.ended == [waiting, running, refused]
    bench.job(2, (0,))
    assert bench.take()[0].client == 2


def test_after_close_nothing_is_given_out() -> None:
    bench = Bench(1, 2)
    running, waiting = bench.job(1, (0,), (0,)), bench.job(2, (0,))
    bench.take()
    bench.jobs.close()
    assert bench.ended == [waiting]
    late = bench.job(2, (0,))
    assert bench.ended == [waiting, late]
    assert bench.jobs.take() is None
    bench.jobs.put_back(running, {})
    assert bench.ended == [waiting, late, running]


def test_who_waits_is_woken_by_a_job_and_not_before() -> None:
    bench = Bench(1)
    woken = threading.Event()

    def wait() -> None:
        bench.jobs.wait(bench.jobs.changes, None)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert not woken.wait(0.05)
        bench.job(1, (0,))
        assert woken.wait(20)
    finally:
        bench.jobs.wake()
        thread.join()
    before = time.monotonic()
    bench.jobs.wait(bench.jobs.changes - 1, 60)  # what came since is not waited for
    bench.jobs.wait(bench.jobs.changes, 0.01)
    assert time.monotonic() - before < 20


@settings(max_examples=200, stateful_step_count=40, deadline=None)
class Agents(RuleBasedStateMachine):
    """Any interleaving of the hub's orders with what several agents take and put back.

    Every post is given out once at most, a job ends once, never before its last post is back, and
    never without an outcome that says what became of each item.
    """

    clients = st.integers(1, 3)

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs()
        self.submitted: list[Job] = []
        self.ended: list[Job] = []
        self.taken: list[tuple[Job, Post]] = []
        self.given: dict[int, list[Post]] = {}  # by id of the job
        self.done: dict[int, set[int]] = {}  # items of which a post failed or was not given out
        self.known: set[int] = set()
        self.joined: dict[int, set[int]] = {}  # client -> agents
        self.left: dict[int, set[int]] = {}
        self.reached: set[int] = set()
        self.asks = 0
        self.told: dict[int, Attach] = {}
        self.was_closed = False

    @rule(client=clients)
    def admit(self, client: int) -> None:
        self.asks += 1
        self.told[client] = told(client, self.asks)
        again = self.jobs.admit(self.told[client])
        assert again == self.joined.setdefault(client, {0}) - {0}
        self.known.add(client)

    @rule(agent=st.integers(1, 2))
    def join(self, agent: int) -> None:
        want = [
            client
            for client in self.known & self.reached
            if agent not in self.joined[client] | self.left.get(client, set())
            and sum(j.left for j in self.submitted if j.client == client and j not in self.ended
                    and not j.stopped) >= JOIN_POSTS
        ]  # fmt: skip
        got = self.jobs.to_join(agent)
        assert (got is None) == (not want)
        if got is not None:
            assert got == self.told[got.client]
            assert got.client in want
            self.joined[got.client].add(agent)

    @rule(client=clients, agent=st.integers(1, 2))
    def leave(self, client: int, agent: int) -> None:
        self.jobs.leave(agent, client)
        if client in self.known:
            self.joined[client].discard(agent)
            self.left.setdefault(client, set()).add(agent)

    @rule(client=clients, items=st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=6))
    def submit(self, client: int, items: list[set[int]]) -> None:
        job = job_of(client, [tuple(post) for post in items], self.ended.append)
        self.submitted.append(job)
        self.given[id(job)] = []
        self.done[id(job)] = set()
        self.jobs.submit(job)
        if client not in self.known or self.was_closed or not items:
            assert job in self.ended
            assert job.stopped or not items

    @rule(agent=st.integers(0, 2), busy=st.sets(clients))
    def take(self, agent: int, busy: set[int]) -> None:
        taken = self.jobs.take(agent, busy)
        if taken is None:
            assert not any(
                job.client not in busy and agent in self.joined.get(job.client, set())
                for job in self.submitted
                if job not in self.ended and job.left and not job.stopped
            ), "there was something for it"
            return
        job, post = taken
        assert agent in self.joined[job.client]
        assert job.client in self.known - busy
        assert not self.was_closed
        assert not job.stopped
        assert post is job.posts[len(self.given[id(job)])], "in order, each once"
        self.given[id(job)].append(post)
        self.taken.append(taken)

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, 100), good=st.booleans())
    def put_back(self, which: int, good: bool) -> None:
        job, post = self.taken.pop(which % len(self.taken))
        assert job not in self.ended
        if good:
            self.jobs.whole(job, post)
            self.reached.add(job.client)
        else:
            self.done[id(job)] |= set(post.items)
        self.jobs.put_back(job, {} if good else dict.fromkeys(post.items, Ended.CORRUPT))

    @precondition(lambda self: self.submitted)
    @rule(which=st.integers(0, 100))
    def stop(self, which: int) -> None:
        self.jobs.stop(self.submitted[which % len(self.submitted)])

    @rule(client=clients)
    def forget(self, client: int) -> None:
        if any(job.client == client for job, _ in self.taken):
            with pytest.raises(NixlError):
                self.jobs.forget(client)
        else:
            self.jobs.forget(client)
            self.known.discard(client)
            self.joined.pop(client, None)
            self.left.pop(client, None)
            self.reached.discard(client)

    @rule()
    def close(self) -> None:
        self.jobs.close()
        self.was_closed = True

    @invariant()
    def ends_follow_from_what_was_given_out(self) -> None:
        assert len({id(job) for job in self.ended}) == len(self.ended), "once"
        for job in self.submitted:
            running = any(job is one for one, _ in self.taken)
            given = self.given[id(job)]
            over = job.stopped or len(given) == len(job.posts)
            assert (job in self.ended) == (over and not running)
            if job not in self.ended:
                continue
            never = {item for post in job.posts[len(given) :] for item in post.items}
            for item in {item for post in job.posts for item in post.items}:
                good = item not in never | self.done[id(job)]
                assert (job.outcomes[item] == Ended.OK) == good


test_any_interleaving = Agents.TestCase
