"""Every ring is heard, soon, and ringing wakes nobody."""

from __future__ import annotations

import gc
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvproto import cells
from kvproto.bell import Bell, Watch

LONG_S = 20.0


@pytest.fixture(params=["native", "python"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param == "native" and not cells.NATIVE:
        pytest.skip("no C compiler on this machine")
    if request.param == "python":
        monkeypatch.setattr(cells, "_library", None)
    return request.param == "native"


def heard(bell: Bell, within_s: float) -> bool:
    ready = select.select([bell.fileno()], [], [], within_s)[0]
    if ready:
        bell.heard()
    return bool(ready)


def watchers() -> list[int]:
    found = []
    for comm in Path("/proc/self/task").glob("*/comm"):
        if comm.read_text() == "kvserver-bell\n":
            found.append(int(comm.parent.name))
    return found


def test_a_ring_is_heard_once_whenever_it_came(native: bool) -> None:
    bell = Bell()
    assert not heard(bell, 0)
    bell.ring()
    bell.watch()
    assert heard(bell, LONG_S), "rung before anybody looked"
    assert bell.watched is native
    for _ in range(50):
        bell.ring()
        bell.ring()
        assert heard(bell, LONG_S)
    while heard(bell, 0.02):
        pass  # the second of the last two came after a look
    with pytest.raises(BlockingIOError):
        bell.heard()
    bell.stop()
    assert not bell.watched
    bell.ring()
    assert heard(bell, LONG_S), "rung when nobody looks any more"
    bell.stop()


@pytest.mark.parametrize(
    "how",
    [Watch(), Watch(50e-6, 100e-6, 100e-6, 100e-6), Watch(50e-6, 50e-6, 50e-6, 0.0)],
    ids=["as it is", "soon asleep", "asleep at once"],
)
def test_no_ring_is_lost_however_many_ring(native: bool, how: Watch) -> None:
    """As a link does it: rings while one is unheard are left out."""
    bell, posts, rung, done = Bell(how), [0] * 4, False, threading.Event()
    each, taken = 3000, 0

    def post(number: int) -> None:
        nonlocal rung
        for count in range(each):
            posts[number] += 1
            if not rung:
                rung = True
                bell.ring()
            if count % 100 == number:
                time.sleep(0.0002)

    def answer() -> None:
        nonlocal rung, taken
        bell.watch()
        while taken < each * len(posts):
            if not heard(bell, LONG_S):
                return
            rung = False
            taken = sum(posts)
        done.set()

    threads = [threading.Thread(target=post, args=(number,)) for number in range(len(posts))]
    threads.append(threading.Thread(target=answer))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LONG_S)
    bell.stop()
    assert done.is_set(), f"{taken} of {each * len(posts)} were heard of"


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_ringing_is_a_store_and_the_look_comes_later() -> None:
    bell = Bell(Watch(tick_s=0.2, idle_tick_s=0.2))
    bell.watch()
    time.sleep(0.05)  # within the first wait
    began = time.monotonic()
    bell.ring()
    at_once = heard(bell, 0)
    assert not at_once or time.monotonic() - began > 0.1, "ringing wrote the eventfd"
    assert at_once or heard(bell, LONG_S)
    bell.stop()


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_its_thread_falls_asleep_and_is_woken_by_who_hears() -> None:
    before = set(watchers())
    bell = Bell(Watch(tick_s=1e-3, idle_s=2e-3, idle_tick_s=1e-3, asleep_s=2e-3))
    bell.watch()
    (thread,) = set(watchers()) - before

    def switches() -> int:
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        return int(status.split("voluntary_ctxt_switches:")[1].split()[0])

    def asleep() -> bool:
        before = switches()
        time.sleep(0.05)
        return switches() == before

    for _ in range(3):
        deadline = time.monotonic() + LONG_S
        while not asleep():
            assert time.monotonic() < deadline, "it goes on looking"
        before = switches()
        bell.ring()
        assert select.select([bell.fileno()], [], [], 0)[0], (
            "who rings a sleeper writes the eventfd"
        )
        assert switches() == before
        bell.heard()
        deadline = time.monotonic() + LONG_S
        while switches() == before:
            assert time.monotonic() < deadline, "nobody woke it"
            time.sleep(0.001)
    bell.stop()


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_its_thread_runs_where_its_starter_may_and_ends_with_it() -> None:
    before, cores, found = set(watchers()), {min(os.sched_getaffinity(0))}, []
    bell = Bell()

    def start() -> None:
        os.sched_setaffinity(0, cores)
        bell.watch()
        bell.watch()  # once is enough

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    found = [task for task in watchers() if task not in before]
    assert len(found) == 1
    assert os.sched_getaffinity(found[0]) == cores
    bell.stop()
    assert not set(watchers()) - before


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_a_bell_that_is_forgotten_leaves_nothing() -> None:
    before = set(watchers())
    bell = Bell()
    bell.watch()
    fd = bell.fileno()
    assert len(set(watchers()) - before) == 1
    del bell
    gc.collect()
    assert not set(watchers()) - before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
