"""Size classes, slabs, slots, and the transfer of slabs between classes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserver.core import events as ev
from kvserver.core.blocks import Action, BlockTable, History
from kvserver.core.errors import ErrorKind, InvariantError
from kvserver.core.events import ReserveVerdict
from kvserver.core.hub import HubConfig
from kvserver.core.slabs import SLOT_UNIT, SlabMap, slot_bytes_max, slot_class_bytes
from kvserver.core.slots import SlotAction, SlotState, SlotTable
from tests.support.world import DISK, HOST, UNIT, World, chain, key_of, make_spec

MIB = 1 << 20


@given(st.integers(1, 1 << 40))
def test_a_class_holds_its_size_and_wastes_little(size: int) -> None:
    slot = slot_class_bytes(size)
    assert slot >= size
    assert slot % SLOT_UNIT == 0
    assert slot_class_bytes(slot) == slot
    assert slot - size < SLOT_UNIT or (slot - size) <= slot / 8


@given(st.integers(1, 1 << 40))
def test_the_largest_class_fits_an_eighth_of_the_tier(total: int) -> None:
    largest = slot_bytes_max(total)
    assert largest * 8 <= total
    assert largest == 0 or slot_class_bytes(largest) == largest
    assert slot_class_bytes(largest + 1) * 8 > total


def test_slab_sizes() -> None:
    assert SlabMap(1 << 30, 0).slab_bytes(64 << 10) == 4 * MIB
    assert SlabMap(1 << 30, 0).slab_bytes(2 * MIB) == 8 * MIB
    assert SlabMap(64 << 30, 0).slab_bytes(2 * MIB) == 256 * MIB
    assert SlabMap(1 << 30, 0).slab_bytes(128 * MIB) == 128 * MIB
    assert SlabMap(1 << 30, 0).slab_bytes(48 * MIB) == 96 * MIB


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60))
def test_runs_and_slabs_always_cover_the_tier(steps: list[tuple[int, int]]) -> None:
    slabs = SlabMap(200 * UNIT, 200 * UNIT)
    taken: list[tuple[int, int]] = []
    for size, at in steps:
        if size:
            room = slabs.carve(size * UNIT)
            if room:
                taken.append((room[0], room[0] + room[1] * size * UNIT))
        elif taken:
            slabs.give_back(*taken.pop(at % len(taken)))
        extents = sorted([*taken, *slabs.runs()])
        assert extents[0][0] == 0
        assert extents[-1][1] == 200 * UNIT
        assert all(left[1] == right[0] for left, right in pairwise(extents))
        runs = list(slabs.runs())
        assert all(left[1] < right[0] for left, right in pairwise(runs)), "runs coalesce"


def test_a_short_run_takes_a_short_slab() -> None:
    slabs = SlabMap(64 * UNIT, 64 * UNIT)
    assert [slabs.carve(3 * UNIT) for _ in range(4)] == [
        (0, 2), (6 * UNIT, 2), (12 * UNIT, 2), (18 * UNIT, 2),
    ]  # fmt: skip
    for _ in range(6):
        slabs.carve(3 * UNIT)
    assert slabs.carve(3 * UNIT) == (60 * UNIT, 1)
    assert slabs.carve(3 * UNIT) is None
    assert slabs.carve(UNIT) == (63 * UNIT, 1)


def test_only_ready_bytes_are_given() -> None:
    table = SlotTable(HOST, 64 * UNIT, 0)
    assert table.take(UNIT, SlotAction.RESERVE) == 0
    table.grow(3 * UNIT)
    assert [table.take(UNIT, SlotAction.RESERVE) > 0 for _ in range(4)] == [True] * 3 + [False]
    table.grow(1000 * UNIT)
    assert table.map.ready == 64 * UNIT


def test_impossible_transitions_tell_their_story() -> None:
    table = SlotTable(HOST, 64 * UNIT, 64 * UNIT)
    slot = table.take(UNIT, SlotAction.RESERVE)
    table.move(slot, SlotAction.COMPLETE)
    with pytest.raises(InvariantError, match="COMMITTED, impossible: COMPLETE"):
        table.move(slot, SlotAction.COMPLETE)
    with pytest.raises(InvariantError, match="without a pin"):
        table.unpin(slot)
    blocks = BlockTable(History(100))
    blocks.index[1] = {}
    row = blocks.obtain(1, key_of("a"))
    blocks.move(row, Action.RESERVE)
    with pytest.raises(InvariantError, match=r"RESERVE: ABSENT -> FILLING"):
        blocks.move(row, Action.RESTORE)


def test_every_use_of_an_offset_has_a_larger_generation() -> None:
    table = SlotTable(HOST, 8 * UNIT, 8 * UNIT)
    last: dict[int, int] = {}
    rng = random.Random(1)
    held: list[int] = []
    for _ in range(500):
        slot = table.take(rng.choice([1, 1]) * UNIT, SlotAction.RESERVE)
        if slot:
            assert table.generation[slot] > last.get(table.offset[slot], 0)
            last[table.offset[slot]] = table.generation[slot]
            held.append(slot)
        else:
            table.give(held.pop(rng.randrange(len(held))))
    assert table.counts[SlotState.FILLING] == len(held)


def test_a_block_that_can_never_fit_is_refused_with_its_limit() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT))
    world.session()
    assert world.hub.slot_bytes_max == 8 * UNIT
    answer = world.ask(ev.OpenNamespace, session=1, spec=make_spec(slot_units=9))
    assert (answer.kind, answer.field, answer.limit) == (
        ErrorKind.NO_SPACE, "slot_bytes", 8 * UNIT,
    )  # fmt: skip
    world.namespace(1, make_spec(slot_units=8))


# ---- slabs that move


def test_a_starving_class_takes_slabs_from_another() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT))
    world.session()
    small, large = world.namespace(1, make_spec("s")), world.namespace(1, make_spec(slot_units=8))
    for i in range(64):
        world.put(small, chain(f"s{i}", 1))
    assert world.tier(HOST).committed == 64
    result = world.put(large, chain("l", 3))
    assert result.verdicts == [ReserveVerdict.WRITE] * 3
    assert world.tier(HOST).bytes_used <= 64 * UNIT
    world.hub.validate()


def test_a_leased_slab_moves_when_its_readers_release() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT))
    world.session()
    small, large = world.namespace(1, make_spec("s")), world.namespace(1, make_spec(slot_units=8))
    keys = chain("s", 64)
    world.put(small, keys)
    ticket = world.acquire(small, keys, window=1 << 30, lease=29.0)
    assert len(world.granted(ticket)) == 64
    assert world.reserve(large, chain("l", 1)).verdicts == [ReserveVerdict.NO_SPACE]
    assert world.reserve(large, chain("l", 1), wait=60.0) is None
    waiting = world.ticket
    world.hub.validate()
    world.check_leases()
    world.release(*world.leases_of(ticket))
    assert world.answers[waiting].verdicts == [ReserveVerdict.WRITE]
    world.hub.validate()


def test_a_slot_that_stays_quarantined_does_not_hold_up_a_starving_class() -> None:
    """A stopped client's slot in the first slab; another slab must be taken."""
    world = World(HubConfig(host_bytes=64 * UNIT))
    world.session(1, 10, 11)
    small, large = world.namespace(1, make_spec("s")), world.namespace(1, make_spec(slot_units=8))
    world.reserve(small, chain("stopped", 1), ttl=1.0)
    world.advance(1.0)
    keys = chain("s", 63)
    world.put(small, keys)
    ticket = world.acquire(small, keys, lease=10.0)
    assert world.reserve(large, chain("l", 1), wait=60.0) is None
    waiting = world.ticket
    world.release(*world.leases_of(ticket))
    assert world.answers[waiting].verdicts == [ReserveVerdict.WRITE]
    assert world.tier(HOST).quarantined == 1
    world.hub.validate()


def test_bytes_follow_the_load_to_the_class_that_is_used() -> None:
    """The colder class loses slabs even though the other has blocks of its own to evict."""
    world = World(HubConfig(host_bytes=512 * UNIT))
    world.session()
    old, new = world.namespace(1, make_spec("o")), world.namespace(1, make_spec(slot_units=2))
    for i in range(500):
        world.put(old, chain(f"o{i}", 1))
    for i in range(1500):
        world.put(new, chain(f"n{i}", 1))
        world.lookup(new, chain(f"n{i}", 1))
    sizes = {n.handle: n.bytes for n in world.hub.stats(world.now).namespaces}
    assert sizes[new] > 0.7 * 512 * UNIT
    world.hub.validate()


def test_what_is_in_use_stays_while_another_class_keeps_colder_blocks() -> None:
    """Also right after a search for colder blocks that was in vain."""
    world = World(HubConfig(host_bytes=256 * UNIT))
    world.session()
    small, used = world.namespace(1, make_spec("s")), world.namespace(1, make_spec(slot_units=4))
    for i in range(40):
        world.put(used, chain(f"u{i}", 1))
    for i in range(120):
        world.put(small, chain(f"s{i}", 1))  # the tier is full, `used` has the colder blocks
    for i in range(8):
        world.put(used, chain(f"v{i}", 1))  # nothing colder elsewhere: it evicts its own
    keys = chain("kept", 32)
    world.put(used, keys)
    for i in range(16):
        assert world.lookup(used, keys).usable_blocks == 32, i
        world.put(used, chain(f"w{i}", 1))
    world.hub.validate()


def test_classes_of_equal_worth_leave_each_other_alone() -> None:
    """In six histories together: a single one may happen to move more."""
    moved = evicted = 0
    for seed in range(6):
        rng = random.Random(seed)
        world = World(HubConfig(host_bytes=512 * UNIT))
        world.session()
        handles = [world.namespace(1, make_spec(f"m{u}", slot_units=u)) for u in (1, 2, 3)]
        for i in range(2400):
            if i == 1200:
                moved -= world.counter("slabs_moved")
                evicted -= world.counter("evicted_host")
            world.put(handles[rng.randrange(3)], chain(f"n{i}", 1))
        moved += world.counter("slabs_moved")
        evicted += world.counter("evicted_host")
        world.hub.validate()
    assert 0 < moved < 0.04 * evicted, (moved, evicted)


def test_a_thousand_namespaces_of_twelve_sizes_use_the_tier() -> None:
    """At least 85 % of the bytes hold blocks, with the load shifting twice from class to class."""
    rng = random.Random(7)
    host = 16384 * UNIT
    world = World(HubConfig(host_bytes=host, disk_bytes=0))
    world.session()
    sizes = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 18, 26]
    handles = [
        world.namespace(1, make_spec(f"m{i}", slot_units=sizes[i % 12])) for i in range(1000)
    ]
    for phase in range(3):
        favoured = [h for i, h in enumerate(handles) if i % 12 % 3 == phase]
        written = 0
        while written < 1.7 * host:
            handle = rng.choice(favoured if rng.random() < 0.9 else handles)
            keys = chain(f"{phase}.{rng.randrange(1 << 30)}", rng.randrange(1, 6))
            result = world.put(handle, keys)
            assert ReserveVerdict.NO_SPACE not in result.verdicts
            written += sum(place.slot_bytes for place in result.places if place)
        tier = world.tier(HOST)
        assert tier.bytes_used <= host
        stats = world.hub.stats(world.now).namespaces
        payload = sum(n.blocks * n.spec.grid.slot_bytes() for n in stats)
        assert payload >= 0.85 * host, f"phase {phase}: {payload / host:.3f} of the tier is used"
        liked = sum(n.bytes for n in stats if n.handle in favoured)
        assert liked > 0.6 * host, f"phase {phase}: the load's classes have {liked / host:.3f}"
    world.hub.validate()


def test_disk_and_host_may_differ_in_what_fits() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT, disk_bytes=16 * UNIT))
    world.session()
    handle = world.namespace(1, make_spec(slot_units=8))
    world.put(handle, chain("a", 1))
    world.finish_all()
    assert world.tier(DISK).committed == 0
    world.hub.validate()
