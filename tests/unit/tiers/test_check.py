"""The offline check: what it finds, what it counts, and that it changes nothing."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvproto.arena import UNIT
from kvserver.journal.directory import Directory
from kvserver.journal.errors import JOURNAL_NAME
from kvserver.journal.record import DiskRecord
from kvserver.tiers.check import LINES_MAX, AreaReport, Progress, check_disk, check_host
from kvserver.tiers.checksums import cell_checksums, slot_root, store_checksums
from kvserver.tiers.disk import DATA_OFFSET, HEADER_BYTES, SLOTS_NAME, DiskFile
from kvserver.tiers.errors import ArenaError
from kvserver.tiers.host import ARENA_NAME, HostArena
from kvserver.tiers.names import NAMESPACES_NAME, NamespaceLog
from tests.support.payload import Blocks

BUDGET = 8 << 20
BLOCKS = Blocks(layers=2, heads=2, page_bytes=1024)
SLOT_BYTES = -(-BLOCKS.spec.grid.slot_bytes() // UNIT) * UNIT
COUNT = 6
KEYS = BLOCKS.chain(1, COUNT)


def fill(slot: np.ndarray, key: bytes) -> int:
    """Payload and trailer of a block; its root."""
    grid = BLOCKS.spec.grid
    slot[: grid.payload_bytes()] = BLOCKS.payload(key).reshape(-1)
    checksums = cell_checksums(slot[: grid.payload_bytes()], grid.cell_bytes())
    store_checksums(slot, grid.cells, grid.cell_bytes(), range(grid.cells), checksums)
    return slot_root(slot, grid.cells, grid.cell_bytes())


@dataclass
class Files:
    """The files of a stopped server with `COUNT` blocks in each tier."""

    host: Path
    disk: Path

    def flip(self, path: Path, offset: int) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 4]))


@pytest.fixture
def files(shm_dir: Path, tmp_path: Path) -> Files:
    arena = HostArena.open(shm_dir, BUDGET)
    disk = DiskFile.open(tmp_path / SLOTS_NAME, BUDGET)
    journal = Directory.open(tmp_path / JOURNAL_NAME, file_id=disk.file_id)
    log = NamespaceLog.open(shm_dir)
    log.add(BLOCKS.spec.canonical)
    journal.put_namespace(BLOCKS.spec.id, BLOCKS.spec.canonical)
    buffer = np.frombuffer(mmap.mmap(-1, SLOT_BYTES), np.uint8)
    for index, key in enumerate(KEYS):
        offset = index * SLOT_BYTES
        root = fill(arena.slot(offset, SLOT_BYTES), key)
        arena.write_valid(offset, SLOT_BYTES, 1, BLOCKS.spec.tag, key, bytes(32), 128, root)
        fill(buffer, key)
        disk.write(offset, buffer)
        journal.put_valid(
            DiskRecord(offset, SLOT_BYTES, 1, BLOCKS.spec.tag, key, bytes(32), 128, root)
        )
    arena.write_reserved(COUNT * SLOT_BYTES, SLOT_BYTES, 1, (3,))
    for part in (arena, disk, journal, log):
        part.close()
    return Files(shm_dir, tmp_path)


def check_files(
    files: Files, *, verify: bool = True, progress: Progress | None = None
) -> tuple[AreaReport, AreaReport]:
    """Host and disk."""
    host = check_host(files.host, verify=verify, progress=progress)
    journal = Directory.open_readonly(files.disk / JOURNAL_NAME)
    found = journal.scan(1 << 62)
    disk = check_disk(
        files.disk,
        found.records,
        journal.namespaces().values(),
        dropped=found.dropped,
        file_id=journal.file_id,
        verify=verify,
        progress=progress,
    )
    journal.close()
    return host, disk


def test_whole_files_are_good(files: Files) -> None:
    told: list[tuple[int, int]] = []
    reports = check_files(files, progress=lambda done, total: told.append((done, total)))
    for report in reports:
        assert (report.bad, report.lines) == (0, [])
        assert (report.namespaces, report.blocks, report.verified) == (1, COUNT, COUNT)
        assert report.bytes_used == COUNT * SLOT_BYTES
    assert [report.name for report in reports] == ["host", "disk"]
    assert [report.reserved for report in reports] == [1, 0]
    assert told == [(i, COUNT) for i in range(1, COUNT + 1)] * 2
    assert [r.verified for r in check_files(files, verify=False)] == [0, 0]


def test_a_flipped_payload_bit_is_one_corrupt_block(files: Files) -> None:
    arena = HostArena.open(files.host, BUDGET)
    data_offset = arena.data_offset
    arena.close()
    files.flip(files.host / ARENA_NAME, data_offset + 2 * SLOT_BYTES + 77)
    files.flip(files.disk / SLOTS_NAME, DATA_OFFSET + 4 * SLOT_BYTES + 5000)
    host, disk = check_files(files)
    assert (host.corrupt, host.bad, disk.corrupt, disk.bad) == (1, 1, 1, 1)
    assert host.lines == [
        f"host: slot {2 * SLOT_BYTES}: block {KEYS[2].hex()}:"
        " the payload does not match its checksums"
    ]
    assert KEYS[4].hex() in disk.lines[0]
    assert [r.bad for r in check_files(files, verify=False)] == [
        0,
        0,
    ]  # without verify: not looked at


def test_a_flipped_entry_bit_is_one_damaged_entry(files: Files) -> None:
    files.flip(files.host / ARENA_NAME, HEADER_BYTES + SLOT_BYTES // UNIT * 128 + 50)
    host, _ = check_files(files)
    assert (host.damaged, host.bad, host.blocks) == (1, 1, COUNT - 1)
    assert host.lines == [f"host: slot {SLOT_BYTES}: the entry does not count"]


def test_a_lost_namespace_log_leaves_blocks_that_nobody_knows(files: Files) -> None:
    (files.host / NAMESPACES_NAME).write_bytes(b"rubbish")
    host, _ = check_files(files)
    assert (host.unknown_namespace, host.bad, host.verified) == (COUNT, COUNT, 0)
    assert host.notes == ["7 bytes of the namespace log belong to no record"]


def test_overlaps_and_blocks_that_do_not_fit_are_misplaced(files: Files) -> None:
    arena = HostArena.open(files.host, BUDGET)
    tag, key = BLOCKS.spec.tag, KEYS[0]
    arena.write_valid(UNIT, SLOT_BYTES, 1, tag, key, bytes(32), 128, 1)  # within the first slot
    lone = (COUNT + 3) * SLOT_BYTES
    arena.write_valid(lone, UNIT, 1, tag, key, bytes(32), 129, 1)
    arena.close()
    host, _ = check_files(files)
    assert host.misplaced == 3  # the intruder, the slot that it reaches into, the one too small
    assert len(host.lines) == 3


def test_a_header_that_does_not_count_is_reported(files: Files) -> None:
    files.flip(files.host / ARENA_NAME, 90)
    host, _ = check_files(files)
    assert host.damaged == 1
    assert "the header does not count" in host.lines[0]


def test_a_slot_file_that_is_not_the_journals(files: Files) -> None:
    (files.disk / SLOTS_NAME).unlink()
    _, disk = check_files(files)
    assert (disk.damaged, disk.blocks) == (COUNT, 0)
    DiskFile.open(files.disk / SLOTS_NAME, BUDGET).close()
    _, disk = check_files(files)
    assert (disk.damaged, disk.blocks) == (COUNT, 0)
    assert "another slot file" in disk.lines[0]


def test_a_directory_without_an_arena_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="no arena"):
        check_host(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_many_bad_blocks_are_counted_and_the_lines_bounded() -> None:
    report = AreaReport("host")
    for index in range(LINES_MAX + 5):
        report.say(f"slot {index}")
    assert len(report.lines) == LINES_MAX


def test_a_check_changes_nothing(files: Files) -> None:
    files.flip(files.host / ARENA_NAME, HEADER_BYTES + 50)
    names = (files.host / ARENA_NAME, files.host / NAMESPACES_NAME, files.disk / SLOTS_NAME)
    before = [path.read_bytes() for path in names]
    first = check_files(files)
    assert [path.read_bytes() for path in names] == before
    assert check_files(files) == first
