"""A withdrawn announcement ends at once, for its own session only, and its readers are told."""

from __future__ import annotations

from typing import Any

import pytest

from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.events import BlockState
from kvserver.core.hub import HubConfig
from tests.support.world import UNIT, World, chain

KEYS = chain("a", 3)


@pytest.fixture
def world() -> World:
    world = World(HubConfig(host_bytes=32 * UNIT))
    world.session(1, 10)
    world.session(2, 20)
    world.namespace(1)
    world.namespace(2)
    return world


def announce(world: World, session: int, keys: list[bytes], **fields: Any) -> Any:
    return world.ask(ev.Announce, session=session, namespace=1, hashes=keys, ttl=60.0, **fields)


def states(world: World) -> list[BlockState]:
    world.hub.validate()
    return [BlockState(state) for state in world.lookup(1, KEYS).states]


def test_readers_of_what_is_withdrawn_are_told_at_once(world: World) -> None:
    announce(world, 1, KEYS)
    ticket = world.acquire(1, KEYS, session=2, wait=60.0)
    assert ticket not in world.answers
    assert announce(world, 1, KEYS, withdraw=True) == 3
    assert world.answers[ticket] == ins.AcquireResult(0, [0, 1, 2])
    assert states(world) == [BlockState.ABSENT] * 3


def test_a_part_is_withdrawn_and_the_rest_stays(world: World) -> None:
    announce(world, 1, KEYS)
    assert announce(world, 1, KEYS[1:], withdraw=True) == 2
    assert states(world) == [BlockState.ANNOUNCED, BlockState.ABSENT, BlockState.ABSENT]
    assert announce(world, 1, KEYS, withdraw=True) == 1
    assert states(world) == [BlockState.ABSENT] * 3


def test_what_another_session_announced_stays(world: World) -> None:
    announce(world, 1, KEYS)
    announce(world, 2, KEYS[:1])
    assert announce(world, 1, KEYS, withdraw=True) == 3
    assert states(world) == [BlockState.ANNOUNCED, BlockState.ABSENT, BlockState.ABSENT]
    assert announce(world, 1, KEYS, withdraw=True) == 0


def test_blocks_that_are_written_or_complete_are_left_alone(world: World) -> None:
    announce(world, 1, KEYS)
    world.put(1, KEYS[:1])
    world.reserve(1, KEYS[1:2])
    assert announce(world, 1, KEYS, withdraw=True) == 1
    assert states(world) == [BlockState.COMPLETE, BlockState.FILLING, BlockState.ABSENT]
