"""Long requests: a Reserve in turns, and what a Commit is checked for before its first part."""

from __future__ import annotations

from typing import Any

import pytest

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core.errors import CoreError
from kvserver.core.events import BlockState, ReserveVerdict
from kvserver.core.hub import HubConfig
from tests.support.world import HOST, UNIT, World, chain

LEFT = Region(0, 2, 0, 1)
WRITE, PRESENT, BUSY, NO_SPACE = ReserveVerdict


@pytest.fixture
def world() -> World:
    world = World(HubConfig(host_bytes=32 * UNIT))
    world.session(1, 10, 11, 12)
    world.namespace()
    return world


def states(world: World, keys: list[bytes]) -> list[BlockState]:
    return [BlockState(state) for state in world.lookup(1, keys).states]


def many(world: World, count: int, **fields: Any) -> Any:
    """A Reserve of so many new blocks, turn by turn; its first turn has been."""
    world.turns_by_hand = True
    assert world.reserve(1, chain("many", count), **fields) is None
    return world.ticket


def test_a_reserve_takes_its_slots_in_turns_and_others_go_between(world: World) -> None:
    old = chain("old", 32)
    world.put(1, old)
    ticket = many(world, 20)
    assert (world.counter("evicted_host"), world.unfinished) == (8, 1)
    assert states(world, old[:1]) == [BlockState.COMPLETE]  # a call of somebody else
    world.hub.validate()
    world.turn()
    assert world.counter("evicted_host") == 16
    assert ticket not in world.answers
    world.turn()
    result = world.answers[ticket]
    assert result.verdicts == [WRITE] * 20
    assert len({place.offset for place in result.places}) == 20
    assert world.unfinished == 0


def test_two_reserves_take_turns(world: World) -> None:
    first = many(world, 12)
    assert world.reserve(1, chain("other", 12), client=11) is None
    second = world.ticket
    world.turn()
    assert first in world.answers
    assert second not in world.answers
    world.turn()
    assert world.answers[second].verdicts == [WRITE] * 12


def test_a_client_that_leaves_between_the_turns_of_its_reserve_holds_nothing(world: World) -> None:
    ticket = many(world, 20)
    assert world.ask(ev.CloseClient, session=1, client=10, drained=True) is None
    assert isinstance(world.answers[ticket], CoreError)
    world.turn()
    world.hub.validate()
    assert world.tier(HOST).filling == 0
    assert world.unfinished == 0


def test_what_finds_no_space_in_a_later_turn_is_told_so(world: World) -> None:
    ticket = many(world, 40, wait=0.0)
    while ticket not in world.answers:
        world.turn()
    assert world.answers[ticket].verdicts == [WRITE] * 32 + [NO_SPACE] * 8


def test_a_wrong_commit_is_known_before_any_of_it_is_applied(world: World) -> None:
    result = world.reserve(1, chain("a", 2), region=LEFT)
    event = ev.Commit(0, 1, result.reservation, [0, 7], LEFT)
    with pytest.raises(CoreError, match="position 7"):
        world.hub.check_commit(event)
    world.hub.check_commit(ev.Commit(0, 1, result.reservation, [0, 1], LEFT))
    with pytest.raises(CoreError, match="region"):
        world.hub.check_commit(ev.Commit(0, 1, result.reservation, [0], Region(0, 3, 0, 1)))
    with pytest.raises(CoreError, match="no such reservation"):
        world.hub.check_commit(ev.Commit(0, 1, 999, [0], LEFT))
    assert world.counter("commits") == 0
