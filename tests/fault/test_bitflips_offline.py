"""Bits flipped in the files of a stopped server: what is recovered is byte-exact or not there.

The files are made and read by the tiers and the journal themselves, without a server, so that many
more bits can be tried than in `test_bitflips.py`. `KVSERVER_OFFLINE_FLIPS` sets how many (default
150 in each kind of file).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvproto.arena import ENTRY_BYTES, HEADER_BYTES, RECORD_BYTES, SEALED_BYTES, UNIT
from kvserver.journal.directory import Directory
from kvserver.journal.errors import JOURNAL_NAME
from kvserver.journal.record import DiskRecord
from kvserver.tiers.check import check_host
from kvserver.tiers.checksums import cell_checksums, slot_root, store_checksums, verify_slot
from kvserver.tiers.disk import DATA_OFFSET, SLOTS_NAME, DiskFile
from kvserver.tiers.host import ARENA_NAME, HostArena
from kvserver.tiers.names import NamespaceLog
from tests.support.payload import Blocks

FLIPS = int(os.environ.get("KVSERVER_OFFLINE_FLIPS", "150"))
BUDGET = 2 << 20
BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
GRID = BLOCKS.spec.grid
SLOT_BYTES = -(-GRID.slot_bytes() // UNIT) * UNIT
COUNT = 24
KEYS = BLOCKS.chain(3, COUNT)
PAYLOADS = {key: BLOCKS.payload(key).reshape(-1) for key in KEYS}
Place = tuple[Path, int]  # a file and a bit


@dataclass
class Files:
    """What a killed server left. `original` holds copies to start each try from."""

    host: Path
    disk: Path
    data_offset: int
    original: Path

    def restore(self) -> None:
        """The disk directory as it was; the arena's bytes are put back by `flipped`."""
        shutil.rmtree(self.disk)
        shutil.copytree(self.original, self.disk)


def write_block(slot: np.ndarray, key: bytes) -> int:
    slot[: GRID.payload_bytes()] = PAYLOADS[key]
    checksums = cell_checksums(slot[: GRID.payload_bytes()], GRID.cell_bytes())
    store_checksums(slot, GRID.cells, GRID.cell_bytes(), range(GRID.cells), checksums)
    return slot_root(slot, GRID.cells, GRID.cell_bytes())


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as host, tempfile.TemporaryDirectory() as other:
        made = make_files(Path(host), Path(other) / "disk", Path(other) / "original")
        yield made


def make_files(host: Path, disk_path: Path, original: Path) -> Files:
    disk_path.mkdir()
    arena = HostArena.open(host, BUDGET)
    disk = DiskFile.open(disk_path / SLOTS_NAME, BUDGET, direct=False)
    journal = Directory.open(disk_path / JOURNAL_NAME, file_id=disk.file_id)
    journal.put_namespace(BLOCKS.spec.id, BLOCKS.spec.canonical)
    log = NamespaceLog.open(host)
    log.add(BLOCKS.spec.canonical)
    tag, parent = BLOCKS.spec.tag, bytes(32)
    for index, key in enumerate(KEYS):
        offset = index * SLOT_BYTES
        slot = arena.slot(offset, SLOT_BYTES)
        root = write_block(slot, key)
        arena.write_valid(offset, SLOT_BYTES, 1, tag, key, parent, 128, root)
        disk.write(offset, slot)
        journal.put_valid(DiskRecord(offset, SLOT_BYTES, 1, tag, key, parent, 128, root))
    log.close()
    arena.close()
    disk.sync()
    disk.close()
    shutil.copytree(disk_path, original)  # the journal's log, as a kill leaves it
    journal.close()
    return Files(host, disk_path, arena.data_offset, original)


def flip(place: Place) -> None:
    path, bit = place
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def recover_host(files: Files) -> dict[bytes, np.ndarray]:
    """Key -> payload of all blocks that a restarted server would serve."""
    arena = HostArena.open(files.host, BUDGET)
    served = {
        entry.key: arena.slot(entry.offset, GRID.payload_bytes()).copy()
        for entry in arena.scan()[0]
        if believed(entry.tag, entry.tokens, arena.slot(entry.offset, SLOT_BYTES), entry.root)
    }
    arena.close()
    return served


def recover_disk(files: Files) -> dict[bytes, np.ndarray]:
    disk = DiskFile.open(files.disk / SLOTS_NAME, BUDGET, direct=False)
    journal = Directory.open(files.disk / JOURNAL_NAME, file_id=disk.file_id)
    served, slot = {}, np.empty(SLOT_BYTES, np.uint8)
    for record in journal.scan(BUDGET).records:
        disk.read(record.offset, slot)
        if believed(record.tag, record.tokens, slot, record.root):
            served[record.key] = slot[: GRID.payload_bytes()].copy()
    journal.close()
    disk.close()
    return served


def believed(tag: bytes, tokens: int, slot: np.ndarray, root: int) -> bool:
    known = (tag, tokens) == (BLOCKS.spec.tag, 128)
    return known and verify_slot(slot, GRID.cells, GRID.cell_bytes(), root)


def wrong(served: dict[bytes, np.ndarray]) -> list[bytes]:
    return [
        key
        for key, payload in served.items()
        if key not in PAYLOADS or not np.array_equal(payload, PAYLOADS[key])
    ]


def test_without_a_flip_everything_comes_back(files: Files) -> None:
    files.restore()
    for served in (recover_host(files), recover_disk(files)):
        assert sorted(served) == sorted(KEYS)
        assert wrong(served) == []


def test_every_bit_of_the_arenas_header(files: Files) -> None:
    """A header that does not count makes the arena cold; one that does, says what it said."""
    path = files.host / ARENA_NAME
    table_bytes = COUNT * (SLOT_BYTES // UNIT) * ENTRY_BYTES
    parts = [
        (start, read_bytes(path, start, length))
        for start, length in (
            (0, RECORD_BYTES),
            (HEADER_BYTES, table_bytes),
            (files.data_offset, COUNT * SLOT_BYTES),
        )
    ]
    cold = 0
    for bit in range(8 * RECORD_BYTES):
        flip((path, bit))
        served = recover_host(files)
        assert wrong(served) == []
        assert len(served) in (0, COUNT)
        if not served:  # a fresh file of the same geometry: put back what there was
            cold += 1
            for start, raw in parts:
                write_bytes(path, start, raw)
    assert cold == 8 * SEALED_BYTES  # all but the two CRCs, of which one is enough
    assert len(recover_host(files)) == COUNT


@pytest.mark.parametrize("part", ["entries", "payload"])
def test_bits_of_the_arena(files: Files, part: str) -> None:
    rng = random.Random(7)
    start = HEADER_BYTES if part == "entries" else files.data_offset
    unit = ENTRY_BYTES if part == "entries" else UNIT
    path = files.host / ARENA_NAME
    for _ in range(FLIPS):
        index = rng.randrange(COUNT) * (SLOT_BYTES // UNIT)
        used = ENTRY_BYTES if part == "entries" else GRID.slot_bytes()
        place = (path, 8 * (start + index * unit) + rng.randrange(8 * used))
        before = read_bytes(path, HEADER_BYTES, COUNT * (SLOT_BYTES // UNIT) * ENTRY_BYTES)
        flip(place)
        report = check_host(files.host, verify=True)
        served = recover_host(files)
        assert wrong(served) == []
        assert len(served) == report.blocks - report.corrupt == COUNT - 1
        if part == "entries":  # recovery made it INVALID: put all entries back
            write_bytes(path, HEADER_BYTES, before)
        else:
            flip(place)


def read_bytes(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def write_bytes(path: Path, start: int, raw: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(raw)


def test_bits_of_the_slot_file(files: Files) -> None:
    files.restore()
    rng = random.Random(8)
    path = files.disk / SLOTS_NAME
    for _ in range(FLIPS):
        slot = rng.randrange(COUNT)
        place = (path, 8 * (DATA_OFFSET + slot * SLOT_BYTES) + rng.randrange(8 * GRID.slot_bytes()))
        flip(place)
        served = recover_disk(files)
        assert wrong(served) == []
        assert len(served) == COUNT - 1
        flip(place)


def test_bits_of_the_journal(files: Files) -> None:
    """Any file of the database, its log as a kill leaves it or the table that a close writes."""
    rng = random.Random(9)
    lost = 0
    for turn in range(FLIPS):
        files.restore()
        if turn % 2:
            recover_disk(files)  # closes the journal: what was in the log is in a table then
        candidates = [
            path
            for path in sorted((files.disk / JOURNAL_NAME).iterdir())
            if path.stat().st_size and not path.name.startswith("LOG")
        ]
        path = rng.choice(candidates)
        flip((path, rng.randrange(8 * path.stat().st_size)))
        served = recover_disk(files)
        assert wrong(served) == []
        lost += COUNT - len(served)
        assert recover_disk(files).keys() == served.keys()  # what is left stays
    assert lost > 0  # or the flips hit nothing
