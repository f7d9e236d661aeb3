"""Watchers: one log a tenant, bounded; who is too slow starts again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.hub import HubConfig
from kvserver.runtime.watches import Kind, Segment, Step, Watches
from tests.support.world import UNIT, World, chain, key_of, make_spec

CHANGES_MAX = 40


class Shell(World):
    """A world whose watch instructions go where the driver sends them."""

    def open(self, *, watchers_max: int = 4, idle_s: float = 5.0) -> Watches:
        self.watches = Watches(
            self.hub, self.send, watchers_max=watchers_max, changes_max=CHANGES_MAX, idle_s=idle_s
        )
        return self.watches

    def _carry_out(self, instruction: Any) -> None:
        if isinstance(instruction, ins.Moved | ins.MovedTooMuch | ins.TiersUp):
            self.watches.carry_out(instruction)
        else:
            super()._carry_out(instruction)


@pytest.fixture
def shell() -> Shell:
    shell = Shell(HubConfig(host_bytes=128 * UNIT, disk_bytes=128 * UNIT, moved_max=64))
    shell.session()
    return shell


Steps = AsyncGenerator[Step, None]


async def until(steps: Steps, kind: Kind) -> list[Step]:
    """Steps up to the first of this kind, which is the last."""
    seen: list[Step] = []
    async with asyncio.timeout(10):
        async for step in steps:
            seen.append(step)
            if step.kind is kind:
                return seen
    raise AssertionError("the steps ended")


def table(steps: list[Step]) -> dict[bytes, tuple[bytes, int]]:
    """Parent and tiers by key, from the last reset on."""
    known: dict[bytes, tuple[bytes, int]] = {}
    for step in steps:
        if step.kind is Kind.RESET:
            known.clear()
        elif step.segment is not None:
            hear(known, step.segment)
    return known


def hear(known: dict[bytes, tuple[bytes, int]], segment: Segment) -> None:
    assert len(segment.hashes) == len(segment.parents) == 32 * segment.count
    assert len(segment.tokens) == 4 * segment.count
    for at, tiers in enumerate(segment.tiers):
        key = segment.hashes[32 * at : 32 * at + 32]
        known[key] = (segment.parents[32 * at : 32 * at + 32], tiers)
        if not tiers:
            del known[key]


async def test_a_snapshot_and_then_changes_gathered(shell: Shell) -> None:
    namespace, keys = shell.namespace(), chain("a", 3)
    shell.put(namespace, keys)
    watches = shell.open()
    steps = watches.steps(1, "", b"")
    seen = await until(steps, Kind.SYNCED)
    assert [step.kind for step in seen] == [Kind.RESET, Kind.BLOCKS, Kind.SYNCED]
    assert seen[0].reason == "start"
    shell.put(namespace, chain("b", 1))
    shell.put(namespace, chain("c", 1))
    shell.finish_all()
    seen += await until(steps, Kind.BLOCKS)  # one message for all of it
    parents = dict(zip(keys, [ROOT, *keys[:-1]], strict=True))
    parents |= {chain("b", 1)[0]: ROOT, chain("c", 1)[0]: ROOT}
    assert table(seen) == {key: (parent, 6) for key, parent in parents.items()}
    await steps.aclose()
    assert watches.open == 0


async def test_a_watcher_that_lags_starts_again_and_memory_stays_bounded(shell: Shell) -> None:
    namespace = shell.namespace()
    watches = shell.open()
    slow, quick = watches.steps(1, "", b""), watches.steps(1, "", b"")
    await until(slow, Kind.SYNCED)
    heard = await until(quick, Kind.SYNCED)
    for at in range(3 * CHANGES_MAX):
        shell.put(namespace, [key_of(f"k{at}")])
        watches.flush()
        heard += await until(quick, Kind.BLOCKS)
        (log,) = watches._logs.values()
        assert log.changes <= CHANGES_MAX
        assert len(log.segments) <= CHANGES_MAX
    shell.finish_all()
    watches.flush()
    late = await until(slow, Kind.SYNCED)
    assert late[0] == Step(Kind.RESET, "overflow")
    assert watches.overflows == 1
    heard += await until(quick, Kind.BLOCKS)
    while table(heard) != table(late):  # copies to disk take several segments
        heard += await until(quick, Kind.BLOCKS)
    blocks = {key: (parent, tiers) for key, parent, tiers in known(shell)}
    assert table(late) == blocks
    assert [step.reason for step in heard if step.kind is Kind.RESET] == ["start"]
    await slow.aclose()
    await quick.aclose()


def known(shell: Shell) -> list[tuple[bytes, bytes, int]]:
    found, _ = shell.hub.walk(0, 1 << 20, lambda spec: True)
    return [(b.key, b.parent, b.tiers) for moved in found for b in moved.blocks]


async def test_too_much_at_once_starts_every_watcher_again(shell: Shell) -> None:
    namespace = shell.namespace()
    for at in range(70):
        shell.put(namespace, [key_of(f"k{at}")])
    shell.finish_all()
    watches = shell.open()
    steps = watches.steps(1, "", b"")
    await until(steps, Kind.SYNCED)
    shell.ask(ev.Evict, namespace_id=make_spec().id, hashes=[])
    seen = await until(steps, Kind.SYNCED)
    assert (seen[0], table(seen)) == (Step(Kind.RESET, "overflow"), {})
    await steps.aclose()


async def test_a_tenant_is_told_of_its_own_namespaces_only(shell: Shell) -> None:
    shell.session(2, tenant="other")
    theirs = shell.namespace(2, make_spec(tenant="other"))
    mine, second = shell.namespace(), shell.namespace(spec=make_spec("second"))
    watches = shell.open()
    all_mine, one = watches.steps(1, "", b""), watches.steps(1, "", make_spec("second").id)
    for steps in (all_mine, one):
        await until(steps, Kind.SYNCED)
    put = {"session": 2, "client": 20}
    shell.put(theirs, chain("theirs", 1), **put)
    shell.put(mine, chain("mine", 1))
    shell.put(second, chain("second", 1))
    for steps, models in ((all_mine, ["m", "second"]), (one, ["second"])):
        told = [(await until(steps, Kind.BLOCKS))[-1].segment for _ in models]
        assert [segment.spec.model for segment in told if segment] == models
    with pytest.raises(CoreError) as refused:
        await anext(watches.steps(1, "", make_spec(tenant="other").id))
    assert (refused.value.kind, refused.value.field) == (ErrorKind.NOT_FOUND, "namespace_id")
    await all_mine.aclose()
    await one.aclose()


async def test_a_dropped_namespace_is_told_after_what_it_held(shell: Shell) -> None:
    namespace = shell.namespace()
    watches = shell.open()
    steps = watches.steps(1, "", make_spec().id)
    await until(steps, Kind.SYNCED)
    shell.put(namespace, chain("a", 1))
    shell.ask(ev.DropNamespace, namespace_id=make_spec().id)
    assert [s.kind for s in await until(steps, Kind.FORGOTTEN)] == [Kind.BLOCKS, Kind.FORGOTTEN]
    shell.put(shell.namespace(), chain("a", 1))  # opened again, it has the same id
    assert (await until(steps, Kind.BLOCKS))[-1].segment is not None
    await steps.aclose()


async def test_watchers_are_bounded_and_the_core_is_told_when_nobody_is_left(shell: Shell) -> None:
    watches = shell.open(watchers_max=2)
    some = [watches.steps(1, "", b"") for _ in range(2)]
    for steps in some:
        await anext(steps)
    with pytest.raises(CoreError) as refused:
        await anext(watches.steps(1, "", b""))
    assert (refused.value.kind, refused.value.field) == (ErrorKind.LIMIT, "watchers_max")
    assert shell.hub._books.moved is not None
    for steps in some:
        await steps.aclose()
    assert shell.hub._books.moved is None


async def test_an_idle_watcher_hears_something_even_where_others_are_busy(shell: Shell) -> None:
    watches = shell.open(idle_s=0.15)
    quiet, busy = shell.namespace(spec=make_spec("quiet")), shell.namespace()
    assert quiet != busy
    steps = watches.steps(1, "", make_spec("quiet").id)
    await until(steps, Kind.SYNCED)

    async def disturb() -> None:
        for at in range(100):
            shell.put(busy, [key_of(at)])
            watches.flush()
            await asyncio.sleep(0.01)

    disturbing = asyncio.create_task(disturb())
    assert [s.kind for s in await until(steps, Kind.IDLE)] == [Kind.IDLE]
    assert not disturbing.done()
    await disturbing
    await steps.aclose()


async def test_a_tier_that_fails_stirs_idle_watchers(shell: Shell) -> None:
    steps = shell.open().steps(1, "", b"")
    await until(steps, Kind.SYNCED)
    shell.send(ev.TierDown(ev.Tier.DISK, "EIO"))
    assert (await anext(steps)).kind is Kind.IDLE
    await steps.aclose()


async def test_a_watcher_ends_with_its_session_and_with_the_server(shell: Shell) -> None:
    watches = shell.open()
    for end, kind in (
        (lambda: watches.keep_only({2}), ErrorKind.NOT_FOUND),
        (watches.close, ErrorKind.UNAVAILABLE),
    ):
        steps = watches.steps(1, "", b"")
        await until(steps, Kind.SYNCED)
        waiting = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        end()
        with pytest.raises(CoreError) as ended:
            await waiting
        assert ended.value.kind is kind
    assert watches.open == 0
