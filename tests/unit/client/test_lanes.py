"""Lanes: one thread, one connection, shares one behind the other, whatever breaks or is stopped."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvclient.errors import Unavailable
from kvclient.transfer.lanes import TAKE_FROM, Lane, Share
from kvproto.frames import Op, Status


@dataclass
class Frame:
    size: int = 10
    status: Status | None = None


class FakeWire:
    """A connection whose peer answers once `answers` is set; `break_at` operations it breaks."""

    def __init__(self, break_at: int = -1, late: int = 0) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.left = break_at
        self.late = late  # answers that had arrived when it was shut down
        self.down = threading.Event()
        self.closed = False
        self.owed: list[tuple[Op, int]] = []

    def pass_(self) -> None:
        assert not self.closed
        if self.down.is_set() and self.late > 0 and self.owed:
            self.late -= 1
        elif self.down.is_set() or self.left == 0:
            raise ConnectionResetError("broken")
        self.left -= 1

    @property
    def readable(self) -> bool:
        return self.answers.is_set() and bool(self.owed)

    def shutdown(self) -> None:
        self.down.set()

    def close(self) -> None:
        self.closed = True


@dataclass
class Job:
    """A put or get; says what was done to it."""

    op: Op = Op.WRITE
    frames: list[Frame] = field(default_factory=lambda: [Frame() for _ in range(3)])
    owed_max: int = 100
    answer: Callable[[int], Status] = lambda frame: Status.OK
    log: list[tuple[str, int]] = field(default_factory=list)
    most_owed: int = 0

    def send(self, wire: Any, frame: int, tag: int) -> None:
        wire.pass_()
        assert not (self.op is Op.WRITE and any(op is Op.READ for op, _ in wire.owed))
        wire.owed.append((self.op, tag))
        self.most_owed = max(self.most_owed, len(wire.owed))
        self.log.append(("send", frame))

    def take(self, wire: Any, frame: int, tag: int) -> None:
        while not wire.answers.wait(0.002) and not wire.down.is_set():
            pass
        wire.pass_()
        assert wire.owed.pop(0) == (self.op, tag), "answers come in order"
        self.log.append(("take", frame))
        self.frames[frame].status = self.answer(frame)

    def share(self) -> Share:
        return Share(self, self.frames, range(len(self.frames)))

    @property
    def statuses(self) -> list[Status | None]:
        return [frame.status for frame in self.frames]


class Dialler:
    def __init__(self, *wires: FakeWire) -> None:
        self.wires = list(wires)
        self.dialled: list[FakeWire] = []
        self.reached = threading.Event()  # nobody is, before
        self.reached.set()

    def __call__(self, limit_s: float) -> Any:
        assert self.reached.wait(limit_s)
        if not self.wires:
            raise Unavailable("nobody answers")
        self.dialled.append(self.wires.pop(0))
        return self.dialled[-1]


def lane_of(*wires: FakeWire, shares: list[Share]) -> Lane:
    """A lane that has all of these before it sends any."""
    dialler = Dialler(*wires)
    dialler.reached.clear()
    lane = Lane(dialler)
    for share in shares:
        lane.add(share)
    dialler.reached.set()
    return lane


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


OK = [Status.OK] * 3


def test_the_next_share_is_sent_before_the_last_ones_answers_are_in() -> None:
    wire = FakeWire()
    wire.answers.clear()
    jobs = [Job(), Job(), Job(Op.READ)]
    shares = [job.share() for job in jobs]
    lane = lane_of(wire, shares=shares)
    until(lambda: len(wire.owed) == 9)
    assert not any(share.over.done() for share in shares)
    wire.answers.set()
    for job, share in zip(jobs, shares, strict=True):
        share.over.result(10)
        assert job.statuses == OK
    assert lane.backlog == 0
    lane.close()


def test_answers_are_taken_as_they_come() -> None:
    """Whatever waits: a share is over when it was answered."""
    jobs = [Job() for _ in range(40)]
    log: list[tuple[str, int]] = []
    for job in jobs:
        job.log = log
    shares = [job.share() for job in jobs]
    lane = lane_of(FakeWire(), shares=shares)
    shares[-1].over.result(10)
    assert all(share.over.done() for share in shares)
    assert max(job.most_owed for job in jobs) == TAKE_FROM
    begun = log.index(("take", 0))
    assert log[begun : begun + 24 : 3] == [("take", 0)] * 8, "one behind the other"
    lane.close()


def test_a_lane_without_a_thread_says_so_and_takes_the_next_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire = FakeWire()
    lane = Lane(Dialler(wire))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable, match="thread"):
            lane.add(Job().share())
    assert lane.backlog == 0
    job = Job()
    lane.add(share := job.share())
    share.over.result(10)
    assert job.statuses == OK
    lane.close()


def test_no_cells_are_sent_while_cells_are_owed_and_no_more_than_a_share_allows() -> None:
    wire = FakeWire()
    wire.answers.clear()
    read, write = Job(Op.READ, owed_max=2), Job()
    last = write.share()
    lane = lane_of(wire, shares=[read.share(), last])
    until(lambda: len(wire.owed) == 2)
    time.sleep(0.02)
    assert [frame for what, frame in read.log if what == "send"] == [0, 1]
    wire.answers.set()
    last.over.result(10)
    assert (read.statuses, write.statuses) == (OK, OK)
    assert read.most_owed == 2
    lane.close()


@pytest.mark.parametrize("broken", range(6))
def test_a_broken_connection_costs_one_repetition_of_what_was_not_answered(broken: int) -> None:
    lane, job = Lane(Dialler(FakeWire(broken), FakeWire())), Job(owed_max=1)
    lane.add(share := job.share())
    share.over.result(10)
    assert job.statuses == OK
    taken = [frame for what, frame in job.log if what == "take"]
    assert taken == [0, 1, 2], "what was answered is not sent again"
    lane.close()


def test_what_breaks_twice_or_finds_nobody_ends_without_an_answer() -> None:
    for wires in ([FakeWire(2), FakeWire(1)], [FakeWire(0)], []):
        for wire in wires:
            wire.answers.clear()
        lane, job = Lane(Dialler(*wires)), Job()
        lane.add(share := job.share())
        share.over.result(10)
        assert job.statuses == [None] * 3
        assert all(wire.closed for wire in wires)
        lane.close()


def test_a_frame_that_was_damaged_is_tried_once_more() -> None:
    lane, job = Lane(Dialler(FakeWire())), Job()
    job.answer = lambda frame: (
        Status.CORRUPT if frame == 1 and job.log.count(("take", 1)) < 2 else Status.OK
    )
    lane.add(share := job.share())
    share.over.result(10)
    assert job.statuses == OK
    assert job.log.count(("send", 1)) == 2
    job = Job(answer=lambda frame: Status.CORRUPT)
    lane.add(share := job.share())
    share.over.result(10)
    assert job.log.count(("send", 0)) == 2
    lane.close()


def test_a_share_that_is_stopped_while_it_waits_is_never_touched() -> None:
    wire = FakeWire()
    wire.answers.clear()
    lane, first, second = Lane(Dialler(wire)), Job(owed_max=1), Job()
    lane.add(one := first.share())
    lane.add(two := second.share())
    until(lambda: len(wire.owed) == 1)
    lane.stop(two)
    assert not two.touching
    wire.answers.set()
    two.over.result(10)
    assert (first.statuses, second.log) == (OK, [])
    assert one.over.done()
    assert not wire.down.is_set()
    lane.close()


def test_others_survive_any_number_of_stopped_shares_on_their_connection() -> None:
    wires = [FakeWire() for _ in range(6)]
    for wire in wires[:-1]:
        wire.answers.clear()
    job, victims = Job(), [Job() for _ in range(5)]
    share, stopped = job.share(), [victim.share() for victim in victims]
    lane = lane_of(*wires, shares=[stopped[0], share, *stopped[1:]])
    for number, victim in enumerate(stopped):
        wire, sent = wires[number], 18 - 3 * number
        until(lambda wire=wire, sent=sent: len(wire.owed) == sent)  # type: ignore[misc]
        lane.stop(victim)
        victim.over.result(10)
    share.over.result(10)
    assert job.statuses == OK
    assert all(victim.statuses == [None] * 3 for victim in victims)
    lane.close()


def test_a_share_that_was_stopped_and_answered_all_the_same_costs_others_no_try() -> None:
    """A socket that is shut down still gives what had arrived."""
    shut, broken = FakeWire(late=3), FakeWire(2)
    shut.answers.clear()
    broken.answers.clear()
    victim, job = Job(), Job()
    stopped, share = victim.share(), job.share()
    lane = lane_of(shut, broken, FakeWire(), shares=[stopped, share])
    until(lambda: len(shut.owed) == 6)
    lane.stop(stopped)
    share.over.result(10)
    assert (victim.statuses, job.statuses) == (OK, OK)
    lane.close()


def test_an_error_of_a_shares_own_is_told_to_its_owner_alone() -> None:
    lane, bad, good = Lane(Dialler(FakeWire(), FakeWire())), Job(), Job()

    def fail(frame: int) -> Status:
        raise ValueError("a bug")

    bad.answer = fail
    lane.add(one := bad.share())
    lane.add(two := good.share())
    with pytest.raises(ValueError, match="a bug"):
        one.over.result(10)
    two.over.result(10)
    assert good.statuses == OK
    lane.close()


def test_what_runs_ends_and_what_waits_does_not_begin_once_closed() -> None:
    wire = FakeWire()
    wire.answers.clear()
    lane, first, second = Lane(Dialler(wire)), Job(owed_max=1), Job()
    lane.add(one := first.share())
    lane.add(two := second.share())
    until(lambda: len(wire.owed) == 1)
    lane.close()
    with pytest.raises(Unavailable):
        lane.add(Job().share())
    wire.answers.set()
    one.over.result(10)
    two.over.result(10)
    assert (first.statuses, second.log) == (OK, [])
    until(lambda: wire.closed)


@pytest.mark.parametrize("seed", range(20))
def test_every_share_ends_once_whatever_happens(seed: int) -> None:
    """Random puts and gets, connections that break, shares that are stopped."""
    rng = random.Random(seed)
    wires = [FakeWire(rng.randrange(30)) for _ in range(rng.randrange(6))]
    dialler = Dialler(*wires, *(FakeWire() for _ in range(200)))
    lane = Lane(dialler)
    jobs, shares = [], []
    for _ in range(40):
        frames = [Frame() for _ in range(rng.randrange(1, 6))]
        job = Job(rng.choice([Op.WRITE, Op.READ]), frames, rng.randrange(1, 8))
        jobs.append(job)
        shares.append(job.share())
        lane.add(shares[-1])
        if rng.random() < 0.2:
            lane.stop(rng.choice(shares))
        if rng.random() < 0.3:
            time.sleep(0.001)
    for job, share in zip(jobs, shares, strict=True):
        share.over.result(10)
        assert not share.touching
        if not share.stopped and len(wires) < 2:
            assert set(job.statuses) == {Status.OK}
    assert lane.backlog == 0
    lane.close()
    until(lambda: all(wire.closed for wire in dialler.dialled))
