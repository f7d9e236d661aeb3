"""The link to a hub that is not there: nobody waits for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvclient import DeadlineExceeded, InvalidArgument, Unavailable
from kvproto.namespace import NamespaceSpec
from kvserver_vllm.common import Answer
from kvserver_vllm.events import EventLog
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import Section

NOBODY = "127.0.0.1:9"
SPEC = NamespaceSpec("m", bytes(32), "float32", "e/1", 1, 1, 64)
SECTION = Section(SPEC.canonical, {0: 0})


def shared(address: str = NOBODY) -> HubLink:
    return HubLink.shared(address, tenant="", name="test", lookup_s=0.1, log=EventLog(""))


@pytest.fixture
def link() -> Iterator[HubLink]:
    link = shared()
    yield link
    link.close()


def test_without_a_hub_every_question_has_an_answer_at_once(link: HubLink) -> None:
    answers: list[Answer | None] = []
    done = threading.Event()

    async def ask() -> None:
        answers.append(await link.lookup([SECTION], [bytes(32)], 1.0, tail=False))
        await link.announce([SECTION], [bytes(32)], 1.0)
        done.set()

    began = time.monotonic()
    link.submit(ask())
    assert done.wait(5)
    assert time.monotonic() - began < 3
    assert answers == [None]
    assert not link.responsive


def test_a_process_has_one_link_per_hub(link: HubLink) -> None:
    again = shared()
    assert again is link
    again.close()
    done = threading.Event()
    link.post(done.set)
    assert done.wait(10), "its thread goes on"


def test_the_last_holder_ends_the_thread() -> None:
    link = shared("127.0.0.1:7")
    link.close()
    assert not link._thread.is_alive()
    assert link.loop.is_closed()

    async def late() -> None:
        raise AssertionError("ran after the end")

    link.submit(late())
    other = shared("127.0.0.1:7")
    assert other is not link
    other.close()


def test_who_posts_keeps_the_interpreters_lock(link: HubLink) -> None:
    """Else whoever waits for it, such as the link's thread with a prompt to hash, runs first."""
    turns, gate, over = [0], threading.Event(), False

    def other() -> None:
        gate.wait()
        while not over:
            turns[0] += 1

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    sys.setswitchinterval(10.0)
    try:
        gate.set()
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass  # the other one wakes up, and waits for the lock
        before = turns[0]
        for _ in range(300):
            link._rung = False
            link.post(int)
        after = turns[0]
    finally:
        over = True
        sys.setswitchinterval(interval)
        thread.join()
    assert after == before


@pytest.mark.parametrize(
    ("error", "suspected"),
    [
        (Unavailable("gone"), True),
        (DeadlineExceeded("late"), True),
        (TimeoutError(), True),
        (InvalidArgument("a limit"), False),
    ],
)
def test_only_silence_makes_a_hub_suspect(error: Exception, suspected: bool) -> None:
    link = HubLink(NOBODY, "", "test", 0.1, EventLog(""))  # its thread is not started
    link.doubt(error)
    assert link._suspect is suspected
    link.loop.close()
