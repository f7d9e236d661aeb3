"""Who hashes what arrived: what it answers, and what the loss of the process costs."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvproto.checksum import cell_checksums
from kvproto.frames import Place
from kvproto.grid import Region
from kvserver.tiers.host import HostArena
from kvserver.transfer import hashing
from kvserver.transfer.hashing import Hashing, sums_here

CELL, LAYERS, HEADS = 512, 6, 4
WHOLE = Region(0, LAYERS, 0, HEADS)
PLACES = [
    Place(1, at, 1, cell, LAYERS, HEADS, WHOLE)
    for at, cell in ((0, CELL), (1 << 20, 48), (2 << 20, CELL))
]


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[HostArena]:
    arena = HostArena.open(tmp_path / "host", 4 << 20)
    arena.prefault(0, arena.data_bytes)
    whole = arena.slot(0, 3 << 20)
    whole[:] = np.random.default_rng(1).integers(0, 256, whole.size, np.uint8)
    del whole
    yield arena
    arena.close()


@pytest.fixture
def hasher(arena: HostArena) -> Iterator[Hashing]:
    log = logging.getLogger("test")
    hasher = Hashing(arena, arena.slot, nice=0, log=log, native=False, clock=lambda: 0.0)
    hasher.start()
    yield hasher
    hasher.close()


@pytest.mark.parametrize("region", [WHOLE, Region(1, 5, 0, HEADS), Region(2, 4, 1, 3)])
def test_checksums_are_of_the_cells_as_they_stand(
    arena: HostArena, hasher: Hashing, region: Region
) -> None:
    for _ in range(2):
        found = hasher.sums(region, PLACES)
        assert found.shape == (len(PLACES), region.cells)
        assert np.array_equal(found, sums_here(arena.slot, region, PLACES))
        first = PLACES[0].offset + (region.layer_start * HEADS + region.head_start) * CELL
        arena.slot(first, 1)[0] ^= 1  # seen the next time
        assert not np.array_equal(found, sums_here(arena.slot, region, PLACES))
    assert hasher.pid is not None, "it was the process that answered"


def test_native_code_needs_no_process(arena: HostArena) -> None:
    native = Hashing(arena, arena.slot, nice=0, log=logging.getLogger("test"), native=True)
    native.start()
    assert native.pid is None
    found = native.sums(WHOLE, PLACES)
    for sums, place in zip(found, PLACES, strict=True):
        slot = arena.slot(place.offset, place.payload_bytes)
        assert sums.tolist() == cell_checksums(slot, place.cell_bytes).tolist()
    assert native.pid is None
    native.close()


def test_without_the_process_the_caller_hashes(
    arena: HostArena, hasher: Hashing, caplog: pytest.LogCaptureFixture
) -> None:
    first = hasher.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    expected = sums_here(arena.slot, WHOLE, PLACES)
    assert np.array_equal(hasher.sums(WHOLE, PLACES), expected)
    assert "hasher_lost" in caplog.text
    assert hasher.pid is None, "it has ended, and is not started again at once"
    assert np.array_equal(hasher.sums(WHOLE, PLACES), expected)
    assert hasher.pid is None
    hasher._clock = lambda: hashing.RESTART_S
    assert np.array_equal(hasher.sums(WHOLE, PLACES), expected)
    assert hasher.pid not in (None, first)


def test_a_process_that_stands_still_is_not_waited_for(arena: HostArena, hasher: Hashing) -> None:
    assert hasher.pid is not None
    os.kill(hasher.pid, signal.SIGSTOP)
    assert hasher._socket is not None
    hasher._socket.settimeout(0.2)
    assert np.array_equal(hasher.sums(WHOLE, PLACES), sums_here(arena.slot, WHOLE, PLACES))
    assert hasher.pid is None, "it is gone"


def test_it_ends_with_the_server(hasher: Hashing) -> None:
    process = hasher._process
    assert process is not None
    hasher.close()
    assert process.returncode == 0
