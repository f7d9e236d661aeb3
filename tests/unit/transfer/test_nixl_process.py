"""The nixl worker as the hub sees it: its answers, its loss, its silence and its end.

The process and the arena are real, the library is a puppet (`tests.support.nixl_puppet`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvproto.grid import Region
from kvproto.nixlib import Memory, NixlError
from kvserver.tiers.errors import DirectoryBusy
from kvserver.tiers.host import HostArena
from kvserver.tiers.lock import LOCK_NAME, DirectoryLock
from kvserver.transfer.base import TransferError
from kvserver.transfer.nixl import process as processes
from kvserver.transfer.nixl.jobs import JOIN_POSTS
from kvserver.transfer.nixl.messages import Ended
from kvserver.transfer.nixl.process import AgentProcess
from kvserver.transfer.nixl.work import Work

CELL, SLOT_BYTES, CLIENT = 4096, 16384, 5
LONG_S = 20.0
REGION = Region(0, 2, 0, 1)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[HostArena]:
    arena = HostArena.open(tmp_path / "host", 4 << 20)
    arena.prefault(0, arena.data_bytes)
    for offset in (0, SLOT_BYTES):
        arena.write_reserved(offset, slot_bytes=SLOT_BYTES, generation=1, clients=(CLIENT,))
    yield arena
    arena.close()


class Hub:
    """An AgentProcess, and what it says."""

    def __init__(self, arena: HostArena, does: str, stuck_s: float, agents: int = 2) -> None:
        self.lost = 0
        self.reports: list[str] = []
        self.agent = AgentProcess(
            arena,
            arena.lock_fd,
            command=[sys.executable, "-m", "tests.support.nixl_puppet"],
            backend=does,
            params={},
            agents=agents,
            stuck_s=stuck_s,
            nice=0,
            report=lambda where, error: self.reports.append(str(error)),
            log=logging.getLogger("test"),
        )

    def _lost(self) -> None:
        self.lost += 1

    async def start(self) -> None:
        await self.agent.start(self._lost)

    def submit(
        self, number: int, *, sums: list[int] | None = None, client: int = CLIENT
    ) -> asyncio.Future[list[int]]:
        """Of two slots of two cells; with `sums`, of each slot's cells, they are read into."""
        over: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        checksums = None if sums is None else np.array([[s, s] for s in sums], np.uint64)
        work = Work(
            number, client, sums is not None, Memory.DRAM, 0, 2, 1, REGION,
            np.array([0, SLOT_BYTES], np.uint64), np.ones(2, np.uint64),
            np.full(2, CELL, np.uint64), np.array([[1 << 20], [2 << 20]], np.uint64), checksums,
        )  # fmt: skip
        self.agent.submit(work, lambda outcomes: over.set_result(outcomes.tolist()))
        return over


@asynccontextmanager
async def hub(
    arena: HostArena, does: str, stuck_s: float = 30.0, agents: int = 2
) -> AsyncIterator[Hub]:
    one = Hub(arena, does, stuck_s, agents)
    async with asyncio.timeout(60):
        try:
            await one.start()
            await one.agent.attach(CLIENT, b"c-5", "c-")
            yield one
        finally:
            await one.agent.close()
            assert one.agent.pid is None


async def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def test_what_arrived_is_hashed_before_it_is_answered(arena: HostArena) -> None:
    sevens = xxh3_64_intdigest(b"\7" * CELL)
    async with hub(arena, "fill") as one:
        assert await one.submit(1, sums=[sevens, sevens]) == [Ended.OK, Ended.OK]
        assert (arena.slot(0, 2 * CELL) == 7).all()
        assert await one.submit(2, sums=[sevens, sevens + 1]) == [Ended.OK, Ended.CORRUPT]
        assert await one.submit(3) == [Ended.OK, Ended.OK]
        size = 4 * CELL
        assert one.agent.totals == (2 * size, size, 3, 0)
        assert one.lost == 0


async def test_a_slot_that_is_no_longer_reserved_is_not_written(arena: HostArena) -> None:
    async with hub(arena, "fill") as one:
        arena.write_invalid(SLOT_BYTES, 1)
        outcomes = await one.submit(1, sums=[0, 0])
        assert outcomes[1] == Ended.STALE
        assert not arena.slot(SLOT_BYTES, SLOT_BYTES).any()
        arena.write_reserved(SLOT_BYTES, slot_bytes=SLOT_BYTES, generation=2, clients=(CLIENT,))
        assert (await one.submit(2, sums=[0, 0]))[1] == Ended.STALE, "of another generation"
        assert (await one.submit(3))[1] == Ended.STALE, "nor read"
        assert not arena.slot(SLOT_BYTES, SLOT_BYTES).any()


async def test_a_worker_that_dies_ends_its_works_and_another_one_stands(arena: HostArena) -> None:
    async with hub(arena, "run") as one:
        first = one.agent.pid
        assert first is not None
        over = one.submit(1)
        await asyncio.sleep(0.1)
        assert not over.done(), "no deadline ends it"
        os.kill(first, signal.SIGKILL)
        assert await over == [Ended.FAILED, Ended.FAILED]
        assert one.lost == 1, "told before"
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        await one.agent.attach(CLIENT, b"c-5", "c-")  # waits for the next one
        assert one.agent.pid not in (None, first)
        assert one.agent.rebuilds == 1


async def test_a_transfer_that_never_ends_costs_the_worker(arena: HostArena) -> None:
    async with hub(arena, "run", stuck_s=0.3) as one:
        first = one.agent.pid
        assert await one.submit(1) == [Ended.FAILED, Ended.FAILED]
        await one.agent.attach(CLIENT, b"c-5", "c-")
        assert one.agent.pid != first
        assert one.reports == [], "it is no bug of ours"


@pytest.mark.parametrize("does", ["hang", "run"])
async def test_a_silent_worker_is_killed(
    arena: HostArena, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a post that does not come back, or stopped."""
    monkeypatch.setattr(processes, "PING_S", 0.05)
    async with hub(arena, does, stuck_s=0.5) as one:
        first = one.agent.pid
        assert first is not None
        if does == "run":
            os.kill(first, signal.SIGSTOP)
        assert await one.submit(1) == [Ended.FAILED, Ended.FAILED]
        await until(lambda: one.agent.rebuilds == 1, "another one")


async def test_agents_move_at_the_same_time(arena: HostArena) -> None:
    async with hub(arena, "pair") as one:
        assert await one.submit(1) == [Ended.OK, Ended.OK]
        pairs = [one.submit(number) for number in range(2, JOIN_POSTS + 4)]
        assert await asyncio.gather(*pairs) == [[Ended.OK, Ended.OK]] * (JOIN_POSTS + 2)


async def test_a_post_that_does_not_come_back_holds_up_one_agent(arena: HostArena) -> None:
    async with hub(arena, f"hang c-{CLIENT}", stuck_s=3.0) as one:
        await one.agent.attach(6, b"c-6", "c-")
        assert await one.submit(1, client=6) == [Ended.OK, Ended.OK], "it is reached"
        over = one.submit(2)
        others = [one.submit(number, client=6) for number in range(3, JOIN_POSTS + 5)]
        assert await asyncio.gather(*others) == [[Ended.OK, Ended.OK]] * (JOIN_POSTS + 2)
        assert not over.done()
        assert await over == [Ended.FAILED, Ended.FAILED], "the worker is replaced in the end"
        assert one.agent.rebuilds == 1


async def test_an_agent_that_cannot_join_leaves_a_client_to_the_others(
    arena: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub(arena, "second") as one:
        assert await one.submit(1) == [Ended.OK, Ended.OK]

        def tries() -> int:
            return sum(record.message == "nixl_join" for record in caplog.records)

        numbers, after = itertools.count(2), 0
        deadline = time.monotonic() + LONG_S
        while after < 3:
            works = [one.submit(next(numbers)) for _ in range(4 * JOIN_POSTS)]
            assert await asyncio.gather(*works) == [[Ended.OK, Ended.OK]] * len(works)
            after += bool(tries())
            assert time.monotonic() < deadline, "it does not try"
        await one.agent.attach(CLIENT, b"c-5", "c-")
        assert tries() == 1


async def test_it_ends_in_order_while_a_client_is_attached(arena: HostArena) -> None:
    """Nobody calls an agent that is closed."""
    for pause_s in (0.0, 0.05):
        one = Hub(arena, "closed", 30.0)
        await one.start()
        await one.agent.attach(CLIENT, b"c-5", "c-")
        link = one.agent._link
        assert link is not None
        await asyncio.sleep(pause_s)
        await one.agent.close()
        assert (link.process.returncode, one.reports) == (0, [])


async def test_a_connection_goes_on_while_nothing_is_moved(arena: HostArena) -> None:
    async with hub(arena, "wire") as one:
        numbers = itertools.count(1)
        deadline = time.monotonic() + LONG_S
        while await one.submit(next(numbers)) != [Ended.OK, Ended.OK]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def test_an_idle_worker_may_be_silent(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PING_S", 0.02)
    async with hub(arena, "fill", stuck_s=0.1) as one:
        assert one.agent.pid is not None
        os.kill(one.agent.pid, signal.SIGSTOP)
        await asyncio.sleep(0.4)
        os.kill(one.agent.pid, signal.SIGCONT)
        assert await one.submit(1) == [Ended.OK, Ended.OK]
        assert one.agent.rebuilds == 0


async def test_a_stopped_work_ends_as_failed(arena: HostArena) -> None:
    async with hub(arena, "run", agents=1) as one:
        running = one.submit(1)
        waiting = [one.submit(number) for number in (2, 3)]
        one.agent.stop(3)
        assert await waiting[1] == [Ended.FAILED, Ended.FAILED]
        assert not running.done()


async def test_close_waits_for_what_runs_and_no_longer(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "END_S", -4.5)  # with CLOSE_S: half a second
    async with hub(arena, "hang") as one:
        over = one.submit(1)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await one.agent.close()
        assert 0.4 < time.monotonic() - began < 3
        assert await over == [Ended.FAILED, Ended.FAILED]
        assert await one.submit(2) == [Ended.FAILED, Ended.FAILED]


async def test_an_agent_that_cannot_be_made_is_told(arena: HostArena) -> None:
    one = Hub(arena, "none", 30.0)
    with pytest.raises(TransferError, match="NIXL has no backend 'none'"):
        await one.start()
    await one.agent.close()


async def test_a_worker_that_does_not_start_is_told(arena: HostArena) -> None:
    one = Hub(arena, "fill", 30.0)
    one.agent._command = [sys.executable, "-c", "raise SystemExit(3)"]
    one.agent.spawn()
    with pytest.raises(TransferError, match="status 3"):
        await one.start()
    one.agent._command = ["/nowhere"]
    with pytest.raises(TransferError, match="nowhere"):
        one.agent.spawn()
    await one.agent.close()


async def test_an_attach_is_refused_with_the_reason(arena: HostArena) -> None:
    async with hub(arena, "fill") as one:
        with pytest.raises(NixlError, match="must begin with 'd-'"):
            await one.agent.attach(6, b"c-6", "d-")
        one.agent.detach(CLIENT)
        assert await one.submit(1) == [Ended.FAILED, Ended.FAILED], "not attached any more"


HUB = """
import asyncio, logging, sys, os, signal
from pathlib import Path
from kvserver.tiers.host import HostArena
from tests.unit.transfer.test_nixl_process import Hub

async def main():
    arena = HostArena.open(Path(sys.argv[1]), 4 << 20)
    arena.prefault(0, arena.data_bytes)
    one = Hub(arena, "fill", 30.0)
    await one.start()
    if sys.argv[2] == "stopped":
        os.kill(one.agent.pid, signal.SIGSTOP)
    print(one.agent.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["running", "stopped"])
def test_it_ends_with_the_hub_and_holds_the_lock_until_then(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "host"
    with subprocess.Popen(
        [sys.executable, "-c", HUB, str(directory), how], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            with pytest.raises(DirectoryBusy):
                DirectoryLock.acquire(directory)
            held = [os.readlink(fd) for fd in Path(f"/proc/{worker}/fd").iterdir()]
            assert str(directory / LOCK_NAME) in held
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
    with DirectoryLock.acquire(directory):
        state = Path(f"/proc/{worker}/stat")
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
