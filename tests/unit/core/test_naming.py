"""Names given with the Commit: where a slot's block goes, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest

from kvproto.grid import Region
from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core.errors import CoreError
from kvserver.core.events import BlockState, CommitVerdict
from kvserver.core.hub import HubConfig
from tests.support.world import HOST, UNIT, World, chain, key_of, parents_of

WHOLE, LEFT, RIGHT = Region(0, 2, 0, 2), Region(0, 2, 0, 1), Region(0, 2, 1, 2)
KEYS = chain("prompt", 4)
OK, GONE, TAKEN = CommitVerdict.OK, CommitVerdict.GONE, CommitVerdict.TAKEN


@pytest.fixture
def world() -> World:
    world = World(HubConfig(host_bytes=8 * UNIT))
    world.session(1, 10, 11)
    world.namespace()
    return world


def ahead(world: World, *names: str, **fields: Any) -> ev.ReserveVerdict | Any:
    """A reservation of keys that nobody else knows."""
    return world.reserve(1, [key_of(name) for name in names or ("private",)], **fields)


def commit(
    world: World, held: Any, keys: list[bytes], parents: list[bytes] | None = None, **fields: Any
) -> Any:
    """Write what these keys stand for into the reservation's slots, and commit them so."""
    region = fields.setdefault("region", WHOLE)
    indices = fields.setdefault("indices", list(range(len(keys))))
    cells = world.grid_of(1).cell_indices(region)
    for at, key in zip(indices, keys, strict=False):
        world.write(held.places[at], key, cells)
    given = parents_of(KEYS)[: len(keys)] if parents is None else parents
    asked = {"session": 1, "reservation": held.reservation, "hashes": keys, "parents": given}
    result = world.ask(ev.Commit, **asked, **fields)
    world.hub.validate()
    return result if isinstance(result, CoreError) else result.verdicts


def state(world: World, key: bytes) -> BlockState:
    return BlockState(world.lookup(1, [key]).states[0])


def test_a_block_is_found_under_the_name_that_its_commit_gave(world: World) -> None:
    held = ahead(world)
    assert commit(world, held, KEYS[:1]) == [OK]
    assert state(world, KEYS[0]) is BlockState.COMPLETE
    assert state(world, key_of("private")) is BlockState.ABSENT
    ticket = world.acquire(1, KEYS[:1])
    assert world.granted(ticket) == [0]  # the world compares the bytes with the key
    assert world.tier(HOST).filling == 0


def test_several_at_once_and_a_chain_among_them(world: World) -> None:
    held = ahead(world, "one", "two", "three")
    assert commit(world, held, KEYS[:3]) == [OK] * 3
    assert world.lookup(1, KEYS[:3]).usable_blocks == 3
    assert world.ask(ev.Evict, namespace_id=world.hub.spec_of(1).id, hashes=KEYS[:1]).blocks == 1
    world.hub.validate()  # children stand by the names of their parents


def test_a_name_of_a_block_that_is_there_or_filling_is_taken(world: World) -> None:
    world.put(1, KEYS[:1])
    other = world.reserve(1, KEYS[1:2], client=11)
    held = ahead(world)
    assert commit(world, held, KEYS[:1]) == [TAKEN]
    assert commit(world, held, KEYS[1:2], KEYS[:1]) == [TAKEN]
    assert commit(world, held, KEYS[2:3], KEYS[1:2]) == [OK]  # the slot was still the writer's
    assert world.ask(ev.Abort, session=1, reservation=other.reservation, drained=True) is None
    assert [state(world, key) for key in KEYS[:3]] == [
        BlockState.COMPLETE, BlockState.ABSENT, BlockState.COMPLETE,
    ]  # fmt: skip


def test_who_waits_for_an_announced_block_gets_it(world: World) -> None:
    world.ask(ev.Announce, session=1, namespace=1, hashes=KEYS[:1], ttl=9.0)
    ticket = world.acquire(1, KEYS[:1], wait=5.0)
    assert world.granted(ticket) == []
    assert commit(world, ahead(world), KEYS[:1]) == [OK]
    assert world.granted(ticket) == [0]
    world.advance(10.0)
    assert state(world, KEYS[0]) is BlockState.COMPLETE


def test_parts_of_a_block_may_follow_and_others_may_join(world: World) -> None:
    held = ahead(world)
    assert commit(world, held, KEYS[:1], region=LEFT) == [OK]
    assert state(world, KEYS[0]) is BlockState.FILLING
    refused = commit(world, held, KEYS[1:2], KEYS[:1], region=RIGHT)
    assert (refused.field, refused.kind.name) == ("hashes", "INVALID")
    world.write(held.places[0], KEYS[0], world.grid_of(1).cell_indices(RIGHT))
    rest = world.ask(ev.Commit, session=1, reservation=held.reservation, indices=[0], region=RIGHT)
    assert rest.verdicts == [OK]
    assert state(world, KEYS[0]) is BlockState.COMPLETE


def test_a_commit_that_is_made_again_is_answered_again(world: World) -> None:
    held = ahead(world, "one", "two")
    for _ in range(2):
        assert commit(world, held, KEYS[:1], indices=[0]) == [OK]
    assert world.counter("completed") == 1


def test_an_expired_one_is_gone_and_its_slot_fenced(world: World) -> None:
    held = ahead(world, ttl=1.0)
    world.advance(1.5)
    assert world.tier(HOST).quarantined == 1
    assert commit(world, held, KEYS[:1]) == [GONE]
    assert state(world, KEYS[0]) is BlockState.ABSENT
    assert world.ask(ev.Fence, session=1, reservation=held.reservation) == 1
    assert world.tier(HOST).quarantined == 0


def test_a_parent_without_children_is_a_leaf_again(world: World) -> None:
    """The private key was said to be a child of a block, and so kept that from eviction."""
    world.put(1, KEYS[:1])
    held = world.reserve(1, [key_of("private")], parents=KEYS[:1])
    assert commit(world, held, KEYS[2:3], [ROOT]) == [OK]
    world.put(1, chain("others", 7))  # one more than the tier takes: the oldest leaf goes
    assert state(world, KEYS[0]) is BlockState.ABSENT
    assert state(world, KEYS[2]) is BlockState.COMPLETE


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"keys": [ROOT]}, "hashes"),
        ({"keys": [b"short"]}, "hashes"),
        ({"keys": KEYS[:2], "parents": KEYS[1:3], "indices": [0]}, "hashes"),
        ({"keys": KEYS[:1], "parents": []}, "parents"),
        ({"keys": KEYS[:1], "parents": KEYS[:1]}, "parents"),
        ({"keys": [KEYS[0], KEYS[0]], "indices": [0, 1]}, "hashes"),
    ],
)
def test_what_is_no_name_is_refused_and_changes_nothing(
    world: World, fields: dict[str, Any], named: str
) -> None:
    held = ahead(world, "one", "two")
    refused = commit(world, held, **fields)
    assert (refused.field, refused.kind.name) == (named, "INVALID")
    assert commit(world, held, KEYS[:2]) == [OK, OK]
