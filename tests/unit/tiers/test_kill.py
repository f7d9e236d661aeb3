"""A real SIGKILL, at random times, of a process that writes slots and entries in a loop.

Afterwards each slot is whole (its bytes are those of its key) or absent, and no generation fell.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kvproto.arena import GENERATION_WORD, UNIT
from kvserver.tiers.checksums import cell_checksums, slot_root, store_checksums, verify_slot
from kvserver.tiers.host import HostArena

BUDGET = 4 << 20
SLOT_BYTES = 2 * UNIT
SLOTS = 64
CELLS, CELL_BYTES = 4, 4096
PAYLOAD_BYTES = CELLS * CELL_BYTES
SECONDS, ROUNDS_MIN, ROUNDS_MAX = 8.0, 4, 25
TAG = b"t" * 16

WRITER = """
import sys
from pathlib import Path
from tests.unit.tiers.test_kill import write_forever
write_forever(Path(sys.argv[1]), int(sys.argv[2]))
"""


def payload_of(key: bytes) -> np.ndarray:
    seed = np.frombuffer(key, np.uint8)
    return np.resize(seed, PAYLOAD_BYTES) ^ np.arange(PAYLOAD_BYTES, dtype=np.uint32).astype(
        np.uint8
    )


def write_forever(directory: Path, seed: int) -> None:
    """What the server does to a slot's life, without end: free, reserve, fill, complete."""
    arena = HostArena.open(directory, BUDGET)
    rng = random.Random(seed)
    print(arena.epoch, flush=True)
    while True:
        offset = rng.randrange(SLOTS) * SLOT_BYTES
        index = offset // UNIT
        generation = int(arena.entries.words[index, GENERATION_WORD]) + 1
        key = rng.randbytes(32)
        arena.write_invalid(offset, generation)
        arena.write_reserved(offset, SLOT_BYTES, generation, (1,))
        arena.write_reserved(offset, SLOT_BYTES, generation, (1, 2))
        slot = arena.slot(offset, SLOT_BYTES)
        slot[:PAYLOAD_BYTES] = payload_of(key)
        checksums = cell_checksums(slot[:PAYLOAD_BYTES], CELL_BYTES)
        store_checksums(slot, CELLS, CELL_BYTES, range(CELLS), checksums)
        root = slot_root(slot, CELLS, CELL_BYTES)
        arena.write_valid(offset, SLOT_BYTES, generation, TAG, key, key[::-1], 128, root)


def run_and_kill(directory: Path, seed: int, pause_s: float) -> int:
    """The epoch of the writer that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdout is not None
        epoch = int(process.stdout.readline())
        time.sleep(pause_s)
        assert process.poll() is None
        process.kill()
    return epoch


def test_after_a_kill_each_slot_is_whole_or_absent(shm_dir: Path) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    ends = time.monotonic() + SECONDS
    floor = np.zeros(SLOTS, np.uint64)
    whole = rounds = 0
    while rounds < ROUNDS_MIN or (rounds < ROUNDS_MAX and time.monotonic() < ends):
        rounds += 1
        epoch = run_and_kill(shm_dir, rng.randrange(1 << 32), rng.uniform(0.002, 0.08))
        arena = HostArena.open(shm_dir, BUDGET)
        assert arena.warm, f"seed {seed}"
        assert arena.epoch == epoch + 1
        valid, reserved, dropped = arena.scan()
        assert dropped == 0, f"seed {seed}"
        for entry in valid:
            assert entry.parent == entry.key[::-1], f"seed {seed}"
            slot = arena.slot(entry.offset, SLOT_BYTES)
            assert np.array_equal(slot[:PAYLOAD_BYTES], payload_of(entry.key)), f"seed {seed}"
            assert verify_slot(slot, CELLS, CELL_BYTES, entry.root), f"seed {seed}"
        assert all(set(entry.clients) <= {1, 2} for entry in reserved)
        generations = arena.entries.words[: 2 * SLOTS : 2, GENERATION_WORD].copy()
        assert (generations >= floor).all(), f"seed {seed}"
        floor = generations
        whole += len(valid)
        arena.close()
    assert whole > 0  # or nothing was tested
