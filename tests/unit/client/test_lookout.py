"""How long a caller looks for an answer before it sleeps."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvclient.lookout import (
    AWAKE_S,
    CALM,
    PAUSE_FIRST_S,
    PAUSE_LAST_S,
    TAKEN_S,
    Lookout,
)

LOOK_S = TAKEN_S / 10


class World:
    """A clock that goes on with each look, and with what others do on the core meanwhile."""

    def __init__(self, watched: socket.socket) -> None:
        self.now = 5.0
        self.looks = 0
        self.others_s = 0.0
        self.lookout = Lookout(watched, clock=lambda: self.now, give_way=self._give_way)

    def _give_way(self) -> None:
        self.looks += 1
        self.now += LOOK_S + self.others_s


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_an_answer_that_is_there_is_seen_at_once(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    world = World(pair[0])
    pair[1].send(b"answer")
    assert world.lookout.look()
    assert world.looks == 0


def test_a_peer_that_hangs_up_is_seen(pair: tuple[socket.socket, socket.socket]) -> None:
    world = World(pair[0])
    pair[1].close()
    assert world.lookout.look()


def test_nobody_looks_for_longer_than_a_moment(pair: tuple[socket.socket, socket.socket]) -> None:
    world = World(pair[0])
    began = world.now
    assert not world.lookout.look()
    assert AWAKE_S <= world.now - began <= AWAKE_S + 2 * LOOK_S
    assert world.looks > 1


def test_who_loses_the_core_sleeps_longer_each_time(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    world = World(pair[0])
    pause_s, paused = PAUSE_FIRST_S, []
    for _ in range(12):
        world.others_s = TAKEN_S
        before = world.looks
        assert not world.lookout.look()
        assert world.looks == before + 1, "it gives up at once"
        world.now += pause_s - LOOK_S
        assert not world.lookout.look()
        assert world.looks == before + 1, "it does not look"
        world.now += 2 * LOOK_S
        paused.append(pause_s)
        pause_s = min(2 * pause_s, PAUSE_LAST_S)
    assert paused[-1] == PAUSE_LAST_S


def test_after_many_looks_that_lost_nothing_the_pause_is_short_again(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    world = World(pair[0])
    world.others_s = TAKEN_S
    for _ in range(5):
        assert not world.lookout.look()
        world.now += PAUSE_LAST_S + LOOK_S
    pair[1].send(b"answer")
    for _ in range(CALM):
        assert world.lookout.look()
    pair[0].recv(6)
    assert not world.lookout.look()
    pair[1].send(b"answer")
    world.now += PAUSE_FIRST_S + LOOK_S
    assert world.lookout.look()
