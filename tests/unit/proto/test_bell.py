"""Every ring is heard, soon, and ringing wakes nobody."""

from __future__ import annotations

import gc
import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from kvproto import cells
from kvproto.bell import Bell, Watch
from tests.support.threads import none_left, threads_named

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


def watchers() -> set[int]:
    return threads_named("kvserver-bell")


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
    bell = Bell(Watch(tick_s=1.0, idle_s=100.0))
    bell.watch()
    time.sleep(0.05)  # within the first wait
    bell.ring()
    assert not heard(bell, 0), "ringing wrote the eventfd"
    assert heard(bell, LONG_S)
    bell.stop()


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_its_thread_falls_asleep_and_is_woken_by_who_hears() -> None:
    bell = Bell(Watch(tick_s=1e-3, idle_s=2e-3, idle_tick_s=10e-3, asleep_s=1.0))
    bell.watch()
    for _ in range(2):
        deadline = time.monotonic() + LONG_S
        while not bell._asleep.value:
            assert time.monotonic() < deadline, "it goes on looking"
            time.sleep(0.001)
        bell.ring()
        assert heard(bell, 0), "who rings a sleeper writes the eventfd"
        assert not bell._asleep.value, "it was not woken"
        bell.ring()
        assert heard(bell, LONG_S), "it does not look"
    bell.stop()


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_its_thread_runs_where_its_starter_may_and_ends_with_it() -> None:
    before, cores = watchers(), {min(os.sched_getaffinity(0))}
    bell = Bell()

    def start() -> None:
        os.sched_setaffinity(0, cores)
        bell.watch()
        bell.watch()  # once is enough

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    (found,) = watchers() - before
    assert os.sched_getaffinity(found) == cores
    bell.stop()
    assert none_left("kvserver-bell", but=before)


@pytest.mark.skipif(not cells.NATIVE, reason="no C compiler on this machine")
def test_a_bell_that_is_forgotten_leaves_nothing() -> None:
    before = watchers()
    bell = Bell()
    bell.watch()
    fd = bell.fileno()
    assert len(watchers() - before) == 1
    del bell
    gc.collect()
    assert none_left("kvserver-bell", but=before)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
