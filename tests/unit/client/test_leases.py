"""Leases on their way back, and how often the loop is woken for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import numpy as np
import pytest

from kvclient import leases as module
from kvclient.leases import Leases
from kvclient.options import Options
from kvclient.session import Link, Session
from kvclient.timing import Deadline


class _Link:
    session = 1
    lost = None


class _Session:
    """Notes what is released."""

    options = Options(address="nowhere")

    def __init__(self) -> None:
        self.released: list[list[int]] = []

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    async def call(self, name: str, make: Any, deadline: Deadline, *, link: Link) -> None:
        assert name == "Release"
        request = await make(link)
        self.released.append(np.frombuffer(request.leases, "<u8").tolist())


@pytest.fixture
def session() -> _Session:
    return _Session()


@pytest.fixture
def link() -> Link:
    return cast("Link", _Link())


async def test_leases_that_each_acquire_takes_wake_the_loop_once(
    session: _Session, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELEASE_PAUSE_S", 60.0)
    leases = Leases(cast("Session", session))
    posted = 0

    def post(act: Callable[[], None]) -> None:
        nonlocal posted
        posted += 1
        act()

    for lease in range(1, 6):
        leases.leave(link, lease, post)
        assert np.frombuffer(leases.take(link), "<u8").tolist() == [lease]
        for _ in range(3):  # the flush gets its turns
            await asyncio.sleep(0)
    assert posted == 1
    leases.leave(link, 6, post)
    await leases.settle(Deadline(10.0))
    assert session.released == [[6]]
    leases.leave(link, 7, post)
    await leases.settle(Deadline(10.0))
    assert session.released == [[6], [7]]


async def test_what_comes_while_a_release_runs_goes_with_the_next(
    session: _Session, link: Link
) -> None:
    leases = Leases(cast("Session", session))
    sent, let_go = asyncio.Event(), asyncio.Event()
    call = session.call

    async def slowly(name: str, make: Any, deadline: Deadline, *, link: Link) -> None:
        sent.set()
        await let_go.wait()
        await call(name, make, deadline, link=link)

    session.call = slowly  # type: ignore[method-assign]
    leases.give_back(link, 1)
    await sent.wait()
    leases.give_back(link, 2)
    leases.give_back(link, 3)
    let_go.set()
    await leases.settle(Deadline(10.0))
    assert session.released == [[1], [2, 3]]
