"""The driver: answers reach their callers, nothing is left behind, a bug ends it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvproto.checksum import checksum, grid_checksums
from kvproto.grid import Region
from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.limits import HubConfig
from kvserver.observe.logs import get_logger
from kvserver.runtime.copies import Copies
from kvserver.runtime.driver import COMMIT_TURN, Checksums, Driver
from kvserver.runtime.mover import Mover
from kvserver.tiers.entry import InvalidEntry, ReservedEntry, ValidEntry
from kvserver.tiers.host import HostArena
from tests.unit.runtime.conftest import BLOCKS, is_block

KEYS = BLOCKS.chain(1, 4)
GRID = BLOCKS.spec.grid
SESSION, CLIENT = 11, 21


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Rig:
    driver: Driver
    host: HostArena
    clock: Clock
    fatal: list[Exception]
    dead: set[int]
    namespace: int = 0
    posted: list[str] = field(default_factory=list)

    async def reserve(self, *, wait: float = 0.0) -> ins.ReserveResult:
        return await self.driver.ask(self.reservation(wait=wait), ins.ReserveResult)

    def reservation(self, *, wait: float = 0.0) -> ev.Reserve:
        parents = [ROOT, *KEYS[:-1]]
        return ev.Reserve(
            self.driver.ticket(), SESSION, CLIENT, self.namespace, KEYS, parents, [], GRID.whole,
            ttl=5.0, wait=wait,
        )  # fmt: skip

    async def push(self) -> ins.ReserveResult:
        reserved = await self.reserve()
        sums = []
        for key, place in zip(KEYS, reserved.places, strict=True):
            payload = BLOCKS.payload(key)
            assert place is not None
            self.host.slot(place.offset, payload.size)[:] = payload.reshape(-1)
            sums.append(grid_checksums(payload))
        commit = ev.Commit(
            self.driver.ticket(), SESSION, reserved.reservation, [0, 1, 2, 3], GRID.whole
        )
        result = await self.driver.commit(commit, np.stack(sums))
        assert result.completed == 4
        return reserved

    def acquisition(self, *, wait: float = 0.0) -> ev.Acquire:
        return ev.Acquire(
            self.driver.ticket(), SESSION, self.namespace, KEYS, GRID.whole,
            wait=wait, window=1 << 30, lease=5.0,
        )  # fmt: skip

    def leases(self) -> int:
        return self.driver.stats().leases


@pytest.fixture
async def rig(host: HostArena) -> AsyncIterator[Rig]:
    clock, fatal, dead = Clock(), list[Exception](), set[int]()
    driver = Driver(
        HubConfig(host_bytes=host.data_bytes),
        host=host,
        fatal=fatal.append,
        is_dead=dead.__contains__,
        clock=clock,
        log=get_logger("test"),
    )
    mover = Mover(
        host,
        Copies(host, disk=None, device=None),
        None,
        threads=1,
        spec_of=driver.hub.spec_of,
        post=driver.post,
        report=lambda _, error: fatal.append(error),
        log=get_logger("test"),
    )
    driver.attach(mover)
    driver.tell(ev.RestoreDone(ev.Tier.HOST))
    driver.start()
    driver.tell(ev.TierGrew(ev.Tier.HOST, host.data_bytes))
    rig = Rig(driver, host, clock, fatal, dead)
    await driver.ask(ev.OpenSession(driver.ticket(), SESSION), type(None))
    await driver.ask(ev.JoinSession(driver.ticket(), SESSION, CLIENT), type(None))
    rig.namespace = await driver.ask(ev.OpenNamespace(driver.ticket(), SESSION, BLOCKS.spec), int)
    yield rig
    await driver.stop()
    mover.close()
    driver.hub.validate()


async def test_a_push_reaches_the_directory_in_order(rig: Rig) -> None:
    reserved = await rig.reserve()
    place = reserved.places[0]
    assert place is not None
    entry = rig.host.read_entry(place.offset)
    assert isinstance(entry, ReservedEntry)
    assert entry.clients == (CLIENT,)
    await rig.driver.ask(
        ev.Abort(rig.driver.ticket(), SESSION, reserved.reservation, drained=True), type(None)
    )
    entry = rig.host.read_entry(place.offset)
    assert isinstance(entry, InvalidEntry)
    assert entry.generation > place.generation
    again = await rig.push()
    for key, place in zip(KEYS, again.places, strict=True):
        assert place is not None
        entry = rig.host.read_entry(place.offset)
        assert isinstance(entry, ValidEntry)
        assert entry.key == key
        assert rig.driver.entries.root(place) == entry.root
        assert is_block(rig.host, place.offset, key)


async def test_a_refusal_is_raised_where_it_was_asked(rig: Rig) -> None:
    with pytest.raises(CoreError) as caught:
        await rig.driver.ask(ev.Heartbeat(rig.driver.ticket(), 999), type(None))
    assert caught.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(CoreError):
        await anext(aiter(rig.driver.acquire(ev.Acquire(
            rig.driver.ticket(), SESSION, 77, KEYS, GRID.whole, wait=0, window=1, lease=1
        ))))  # fmt: skip
    assert rig.driver.open_requests == 0
    assert rig.fatal == []


async def test_a_stream_grants_what_is_there_and_ends(rig: Rig) -> None:
    await rig.push()
    steps = [step async for step in rig.driver.acquire(rig.acquisition())]
    grants = [step.granted for step in steps if step.granted is not None]
    assert [b.index for granted in grants for b in granted.blocks] == [0, 1, 2, 3]
    assert steps[-1].granted is not None, "the end comes with the last grant"
    assert [step.result is not None for step in steps] == [*([False] * (len(steps) - 1)), True]
    assert rig.leases() > 0
    leases = [granted.lease for granted in grants]
    release = ev.Release(rig.driver.ticket(), SESSION, leases)
    assert await rig.driver.ask(release, int) == len(leases)
    assert rig.leases() == 0


async def test_closing_a_stream_early_gives_its_leases_back(rig: Rig) -> None:
    await rig.push()
    async with contextlib.aclosing(rig.driver.acquire(rig.acquisition(wait=30))) as stream:
        await anext(stream)
        assert rig.leases() > 0
    # The blocks were all granted, so the stream had ended; its leases are the reader's to release
    # or to let expire. One that is still open is cancelled with all that it holds:
    announce = ev.Announce(rig.driver.ticket(), SESSION, rig.namespace, [bytes([7]) * 32], 30.0)
    await rig.driver.ask(announce, int)
    before = rig.leases()
    waiting = ev.Acquire(
        rig.driver.ticket(), SESSION, rig.namespace, [KEYS[0], bytes([7]) * 32], GRID.whole,
        wait=30.0, window=1 << 30, lease=5.0,
    )  # fmt: skip
    async with contextlib.aclosing(rig.driver.acquire(waiting)) as stream:
        await anext(stream)
        assert rig.leases() == before + 1
    assert rig.leases() == before
    assert rig.driver.open_requests == 0


async def test_a_reserve_that_nobody_waits_for_any_more_is_aborted(rig: Rig) -> None:
    """Its answer comes after the caller was cancelled: the slots must not be lost."""
    filler = [bytes([9]) + i.to_bytes(31, "big") for i in range(300)]
    held = await rig.driver.ask(
        ev.Reserve(
            rig.driver.ticket(),
            SESSION,
            CLIENT,
            rig.namespace,
            filler,
            [ROOT] * 300,
            [],
            GRID.whole,
            ttl=50.0,
        ),
        ins.ReserveResult,
    )
    assert ev.ReserveVerdict.NO_SPACE in held.verdicts
    task = asyncio.create_task(rig.reserve(wait=50.0))
    await asyncio.sleep(0)
    assert rig.driver.open_requests == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rig.driver.ask(
        ev.Abort(rig.driver.ticket(), SESSION, held.reservation, drained=True), type(None)
    )
    await asyncio.sleep(0.05)
    assert rig.driver.stats().reservations == 0
    assert rig.driver.stats().tiers[ev.Tier.HOST].filling == 0


async def test_a_standstill_shifts_every_expiry(rig: Rig) -> None:
    reserved = await rig.reserve()
    rig.clock.now += 1_000
    await rig.driver.ask(ev.Heartbeat(rig.driver.ticket(), SESSION), type(None))
    assert rig.driver.stalls == 1
    assert rig.driver.stats().reservations == 1
    for _ in range(100):  # the same time, felt: it expires
        rig.clock.now += 0.5
        rig.driver.tell(ev.Tick())
    assert rig.driver.stats().reservations == 0
    assert rig.driver.stalls == 1
    assert reserved.reservation


async def test_the_death_of_a_writer_lifts_its_quarantine(rig: Rig) -> None:
    reserved = await rig.reserve()
    abort = ev.Abort(rig.driver.ticket(), SESSION, reserved.reservation, drained=False)
    await rig.driver.ask(abort, type(None))
    tier = rig.driver.stats().tiers[ev.Tier.HOST]
    assert tier.quarantined == 4
    rig.dead.add(CLIENT)
    for _ in range(200):
        rig.clock.now += 0.1
        await asyncio.sleep(0.01)
        if not rig.driver.stats().tiers[ev.Tier.HOST].quarantined:
            break
    assert rig.driver.stats().tiers[ev.Tier.HOST].quarantined == 0


async def test_a_liveness_that_cannot_be_asked_keeps_the_quarantine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_: int) -> bool:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(rig.driver, "_is_dead", exhausted)
    reserved = await rig.reserve()
    abort = ev.Abort(rig.driver.ticket(), SESSION, reserved.reservation, drained=False)
    await rig.driver.ask(abort, type(None))
    for _ in range(10):
        rig.clock.now += 0.5
        await asyncio.sleep(0.01)
    assert rig.driver.stats().tiers[ev.Tier.HOST].quarantined == 4
    monkeypatch.setattr(rig.driver, "_is_dead", lambda _: True)
    for _ in range(200):
        rig.clock.now += 0.1
        await asyncio.sleep(0.01)
        if not rig.driver.stats().tiers[ev.Tier.HOST].quarantined:
            break
    assert rig.driver.stats().tiers[ev.Tier.HOST].quarantined == 0


async def test_posted_events_share_one_wake_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wakes: list[object] = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *a, **k: (wakes.append(a[0]), wake(*a, **k))[1]
    )
    thread = threading.Thread(target=lambda: [rig.driver.post(ev.Tick()) for _ in range(50)])
    thread.start()
    thread.join()  # the loop does not run meanwhile
    assert wakes.count(rig.driver._take_posted) == 1
    await asyncio.sleep(0)


async def test_an_exception_out_of_the_hub_is_fatal(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(rig.driver.hub, "handle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await rig.driver.ask(ev.Heartbeat(rig.driver.ticket(), SESSION), type(None))
    assert [type(error) for error in rig.fatal] == [ZeroDivisionError]


async def test_other_bytes_for_committed_cells_are_a_mismatch_and_the_first_stay(rig: Rig) -> None:
    """Whether the block is still filling or already complete; the right bytes again are fine."""
    reserved = await rig.reserve()
    place = reserved.places[0]
    assert place is not None
    payload = BLOCKS.payload(KEYS[0])
    rig.host.slot(place.offset, payload.size)[:] = payload.reshape(-1)
    sums = grid_checksums(payload)

    async def commit(region: Region, checksums: np.ndarray) -> list[int]:
        event = ev.Commit(rig.driver.ticket(), SESSION, reserved.reservation, [0], region)
        return list((await rig.driver.commit(event, checksums[None])).verdicts)

    left, right = Region(0, 2, 0, 1), Region(0, 2, 1, 2)
    halves = sums.reshape(GRID.layers, GRID.heads)
    assert await commit(left, halves[:, 0].copy()) == [ev.CommitVerdict.OK]
    assert await commit(left, halves[:, 1].copy()) == [ev.CommitVerdict.MISMATCH]
    assert await commit(left, halves[:, 0].copy()) == [ev.CommitVerdict.OK]
    assert await commit(right, halves[:, 1].copy()) == [ev.CommitVerdict.OK]
    assert await commit(GRID.whole, sums) == [ev.CommitVerdict.OK]
    wrong = sums.copy()
    wrong[-1] ^= 1
    assert await commit(GRID.whole, wrong) == [ev.CommitVerdict.MISMATCH]
    assert rig.driver.commit_mismatches == 2
    assert is_block(rig.host, place.offset, KEYS[0])
    assert rig.driver.entries.root(place) == checksum(sums.view(np.uint8))


# ---- long requests -------------------------------------------------------------------------------

LONG = BLOCKS.chain(2, 2 * COMMIT_TURN + 1)


async def long_reserve(rig: Rig) -> ins.ReserveResult:
    event = ev.Reserve(
        rig.driver.ticket(), SESSION, CLIENT, rig.namespace, LONG, [ROOT, *LONG[:-1]], [],
        GRID.whole, ttl=5.0, wait=0.0,
    )  # fmt: skip
    result = await rig.driver.ask(event, ins.ReserveResult)
    assert result.verdicts == [ev.ReserveVerdict.WRITE] * len(LONG)
    return result


def long_commit(rig: Rig, reserved: ins.ReserveResult, indices: list[int]) -> ev.Commit:
    return ev.Commit(rig.driver.ticket(), SESSION, reserved.reservation, indices, GRID.whole)


def sums_for(count: int) -> Checksums:
    return np.arange(count * GRID.cells, dtype=np.uint64).reshape(count, GRID.cells)


async def test_a_long_reserve_and_its_commit_let_others_in_between(rig: Rig) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(other())
    reserved = await long_reserve(rig)
    assert turns >= len(LONG) // rig.driver.hub.config.reserve_turn
    turns = 0
    everything = list(range(len(LONG)))
    result = await rig.driver.commit(long_commit(rig, reserved, everything), sums_for(len(LONG)))
    assert turns >= len(LONG) // COMMIT_TURN
    counting.cancel()
    assert result.verdicts == [ev.CommitVerdict.OK] * len(LONG)
    assert result.completed == len(LONG)
    for at, place in enumerate(reserved.places):
        assert place is not None
        entry = rig.host.read_entry(place.offset)
        assert isinstance(entry, ValidEntry)
        assert entry.key == LONG[at]
        trailer = rig.host.slot(place.offset + GRID.payload_bytes(GRID.block_tokens), 8)
        assert int(trailer.view("<u8")[0]) == at * GRID.cells, "each block has its own checksums"


async def test_the_names_of_a_long_commit_go_with_its_parts(rig: Rig) -> None:
    reserved = await long_reserve(rig)
    names = [bytes([at]) * 32 for at in range(100, 100 + len(LONG))]
    event = long_commit(rig, reserved, list(range(len(LONG))))
    event = replace(event, hashes=names, parents=[ROOT, *names[:-1]])
    result = await rig.driver.commit(event, sums_for(len(LONG)))
    assert result.verdicts == [ev.CommitVerdict.OK] * len(LONG)
    for at, place in enumerate(reserved.places):
        assert place is not None
        entry = rig.host.read_entry(place.offset)
        assert isinstance(entry, ValidEntry)
        assert (entry.key, entry.parent) == (names[at], names[at - 1] if at else ROOT)


async def test_a_long_commit_that_is_wrong_at_its_end_changes_nothing(rig: Rig) -> None:
    reserved = await long_reserve(rig)
    wrong = [*range(len(LONG) - 1), len(LONG)]
    with pytest.raises(CoreError, match="indices"):
        await rig.driver.commit(long_commit(rig, reserved, wrong), sums_for(len(LONG)))
    assert rig.driver.stats().counters["commits"] == 0


async def test_a_reservation_that_ends_during_its_commit_loses_the_rest(rig: Rig) -> None:
    reserved = await long_reserve(rig)

    def abort(indices: list[int]) -> None:
        if indices[0] == COMMIT_TURN:
            ticket = rig.driver.ticket()
            rig.driver.tell(ev.Abort(ticket, SESSION, reserved.reservation, drained=True))

    event = long_commit(rig, reserved, list(range(len(LONG))))
    result = await rig.driver.commit(event, sums_for(len(LONG)), check=abort)
    lost = len(LONG) - COMMIT_TURN
    assert result.verdicts == [ev.CommitVerdict.OK] * COMMIT_TURN + [ev.CommitVerdict.GONE] * lost
    assert result.completed == COMMIT_TURN


async def test_each_part_of_a_commit_is_checked_right_before_it_is_applied(rig: Rig) -> None:
    reserved = await long_reserve(rig)
    asked: list[int] = []

    def check(indices: list[int]) -> None:
        if asked and indices[0] == COMMIT_TURN:
            raise CoreError(ErrorKind.CONFLICT, "a move runs", field="indices")
        asked.extend(indices)

    event = long_commit(rig, reserved, list(range(len(LONG))))
    with pytest.raises(CoreError, match="a move runs"):
        await rig.driver.commit(event, sums_for(len(LONG)), check=check)
    place = reserved.places[COMMIT_TURN]
    assert place is not None
    assert isinstance(rig.host.read_entry(place.offset), ReservedEntry)
