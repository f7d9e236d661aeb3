"""Grids of cells through a socket: the bytes and checksums that a loop in Python would see."""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvproto import cells, wires
from kvproto.cells import ROW_BYTES_MIN
from kvproto.wires import Arrival, Came, Guard
from tests.support.threads import none_left, threads_named

pytestmark = pytest.mark.skipif(
    not cells.NATIVE, reason="no native code: no C compiler, or KVSERVER_NATIVE=0"
)
LONG_S = 20.0
HEAD = b"the head of a frame"


@contextmanager
def linked(timeout_s: float = LONG_S) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends over tcp, as blocking as a client's: a limit, but no Python timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with one, other:
        for end in (one, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        yield one, other


@contextmanager
def beside(work: object, *arguments: object) -> Iterator[None]:
    thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
    thread.start()
    yield
    thread.join(LONG_S)
    assert not thread.is_alive()


def region_of(shape: tuple[int, int, int], gaps: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """A larger grid, all 0xA5, and the region [layers, heads, bytes] of it."""
    layers, heads, size = shape
    whole = np.full((layers + gaps[0], heads + gaps[1], size + gaps[2]), 0xA5, np.uint8)
    return whole, whole[gaps[0] :, gaps[1] :, gaps[2] :]


def sums_of(grid: np.ndarray) -> list[int]:
    return [xxh3_64_intdigest(cell.tobytes()) for layer in grid for cell in layer]


def guard_of(word: np.ndarray) -> Guard:
    return Guard(word[:1], int(word[0]), word[1:], int(word[1]))


SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(ROW_BYTES_MIN, 5000)),
    st.tuples(st.integers(1, 3), st.integers(1, 90), st.sampled_from([241, 256, 4096, 16384])),
    st.sampled_from([(1, 300, 4096), (300, 1, 4096), (2, 1, 700_000), (1, 2, 1_500_000)]),
)
GAPS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from([0, 0, 1, 64]))


@settings(max_examples=25, deadline=None)
@given(
    shape=SHAPES, gaps=st.tuples(GAPS, GAPS), guarded=st.booleans(), seed=st.integers(0, 99),
    apart=st.booleans(),
)  # fmt: skip
def test_a_grid_arrives_with_its_checksums(
    shape: tuple[int, int, int], gaps: tuple[tuple[int, int, int], tuple[int, int, int]],
    guarded: bool, seed: int, apart: bool,
) -> None:  # fmt: skip
    _, source = region_of(shape, gaps[0])
    source[:] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    wanted = sums_of(source)
    whole, target = region_of(shape, gaps[1])
    sent, got = np.zeros((2, len(wanted)), np.uint64)
    send = partial(wires.send, apart=apart)
    with linked() as (one, other), beside(send, one.fileno(), HEAD, source, sent):
        assert other.recv(len(HEAD), socket.MSG_WAITALL) == HEAD
        if guarded:
            arrival = Arrival(target, guard_of(np.array([7, 9], np.uint64)))
            low = ctypes.c_int(1)
            while True:
                came = wires.receive_guarded(
                    other.fileno(), arrival, more_bytes=300_000, wait_s=0.05, low=low, apart=apart
                )
                if came is Came.WHOLE:
                    break
                assert came is Came.WAITED
            assert arrival.done == target.size
            assert low.value == other.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
            got[:] = arrival.sums
            other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        else:
            wires.receive(other.fileno(), target, got, apart=apart)
        told = other.recv(8 * len(wanted), socket.MSG_WAITALL)
    assert np.array_equal(target, source)
    assert sent.tolist() == got.tolist() == np.frombuffer(told, "<u8").tolist() == wanted
    target[:] = 0xA5
    assert (whole == 0xA5).all(), "bytes between the cells"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("word", [0, 1])
def test_nothing_lands_once_a_word_of_the_guard_is_another_one(word: int, apart: bool) -> None:
    target, words = np.zeros((2, 2, 1000), np.uint8), np.array([7, 9], np.uint64)
    arrival, low = Arrival(target, guard_of(words)), ctypes.c_int(1)

    def receive() -> Came:
        return wires.receive_guarded(
            other.fileno(), arrival, more_bytes=1, wait_s=0.01, low=low, apart=apart
        )

    with linked() as (one, other):
        one.sendall(b"\1" * 1500)
        assert receive() is Came.WAITED
        assert (arrival.done, arrival.sums[0]) == (1500, xxh3_64_intdigest(b"\1" * 1000))
        words[word] += np.uint64(1)
        one.sendall(b"\2" * 2500)
        assert receive() is Came.LOST
        assert (arrival.done, int(target.max())) == (1500, 1)
        assert len(other.recv(4000)) > 0, "it is left for the caller to throw away"


@pytest.mark.parametrize("apart", [False, True])
def test_a_silent_peer_and_one_that_hangs_up(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "_apart", lambda asked, left: int(apart))
    grid, sums = np.zeros((2, 2, 1000), np.uint8), np.zeros(4, np.uint64)
    with linked(0.05) as (one, other):
        one.sendall(bytes(1500))
        with pytest.raises(BlockingIOError):
            wires.receive(other.fileno(), grid, sums)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            wires.receive(other.fileno(), grid, sums)
        arrival = Arrival(grid, guard_of(np.zeros(2, np.uint64)))
        with pytest.raises(ConnectionResetError):
            wires.receive_guarded(
                other.fileno(), arrival, more_bytes=1, wait_s=1, low=ctypes.c_int(1)
            )
    much = np.zeros((64, 1, 1 << 20), np.uint8)
    seen, done = set(), threading.Event()

    def give_up() -> None:
        try:
            with pytest.raises(BlockingIOError):
                wires.send(one.fileno(), HEAD, much, np.zeros(64, np.uint64))
        finally:
            done.set()

    with linked(0.5) as (one, _), beside(give_up):
        while not done.wait(0.001):
            seen |= threads_named("kvserver-hash")
    assert len(seen) == apart
    with linked() as (one, other):
        other.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            wires.send(one.fileno(), HEAD, much, np.zeros(64, np.uint64))
    assert none_left("kvserver-hash")


@pytest.mark.parametrize("apart", [False, True])
def test_a_shutdown_by_another_thread_ends_a_call(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "_apart", lambda asked, left: int(apart))
    much, sums = np.zeros((64, 1, 1 << 20), np.uint8), np.zeros(64, np.uint64)
    for call in (wires.receive, lambda fd, *what: wires.send(fd, HEAD, *what)):
        with linked() as (one, _):
            later = threading.Timer(0.05, one.shutdown, [socket.SHUT_RDWR])
            later.start()
            with pytest.raises(OSError, match=r"reset|pipe"):
                call(one.fileno(), much, sums)
            later.join()


GRID, SUMS = np.zeros((2, 3, 512), np.uint8), np.zeros(6, np.uint64)
FROZEN = GRID.copy()
FROZEN.setflags(write=False)


@pytest.mark.parametrize(
    ("grid", "sums", "told"),
    [
        (GRID.reshape(6, 512), SUMS, "grid"),
        (GRID.view(np.int8), SUMS, "grid"),
        (GRID[:0], SUMS[:0], "grid"),
        (GRID[..., ::2], SUMS, "not contiguous"),
        (GRID[..., : ROW_BYTES_MIN - 1], SUMS, "below 241"),
        (GRID, SUMS[:5], "sums"),
        (GRID, np.zeros(12, np.uint64)[::2], "sums"),
        (FROZEN, SUMS, "read-only"),
    ],
)
def test_arrays_of_another_kind_are_refused(grid: np.ndarray, sums: np.ndarray, told: str) -> None:
    """Before native code is given an address."""
    with pytest.raises(ValueError, match=told):
        wires.receive(-1, grid, sums)
    if told != "read-only":
        with pytest.raises(ValueError, match=told):
            wires.send(-1, HEAD, grid, sums)


def test_a_guard_of_another_kind_is_refused() -> None:
    words = np.zeros(2, np.uint64)
    for generation in (words, words.view(np.int64)[:1], np.zeros(12, np.uint8)[4:].view("u8")):
        arrival = Arrival(GRID, Guard(generation, 0, words[:1], 0))
        with pytest.raises(ValueError, match="generation"):
            wires.receive_guarded(-1, arrival, more_bytes=1, wait_s=0, low=ctypes.c_int(1))


def test_small_cells_are_left_to_their_callers() -> None:
    assert not wires.usable(ROW_BYTES_MIN - 1)
    assert wires.usable(ROW_BYTES_MIN)
