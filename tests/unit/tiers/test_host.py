"""The host arena: warm and cold starts, resize, prefault, and what readers see."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kvproto.arena import (
    DATA_ALIGN,
    EPOCH_OFFSET,
    FORMAT_OFFSET,
    HEADER_BYTES,
    UNIT,
    ArenaHeader,
    ArenaReader,
)
from kvproto.errors import FieldError
from kvserver.tiers import host as host_module
from kvserver.tiers import syscalls
from kvserver.tiers.entry import InvalidEntry, ReservedEntry, ValidEntry
from kvserver.tiers.errors import DirectoryBusy
from kvserver.tiers.host import ARENA_NAME, FRESH_NAME, HostArena, data_bytes_within
from kvserver.tiers.words import SealedRecords

BUDGET = 8 << 20
TAG, KEY, PARENT = b"t" * 16, b"k" * 32, b"p" * 32


def block(offset: int, *, slot_bytes: int = UNIT, generation: int = 1) -> ValidEntry:
    return ValidEntry(offset, slot_bytes, generation, TAG, KEY, PARENT, 128, offset + 1)


def reopen(arena: HostArena, budget: int = BUDGET, **options: bool) -> HostArena:
    """As after a SIGKILL: nothing but the lock is given back, which the kernel would do."""
    arena._lock.release()
    os.close(arena.fd)
    return HostArena.open(arena.path.parent, budget, **options)


def test_a_fresh_arena_is_empty_and_within_its_budget(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    assert not arena.warm
    assert arena.cold_reason == "there was no arena file"
    assert (arena.epoch, arena.generation_max) == (1, 0)
    assert arena.scan() == ([], [], 0)
    assert arena.data_bytes == data_bytes_within(BUDGET) == arena.buffer.nbytes
    assert arena.data_bytes % UNIT == 0
    assert arena.data_bytes + len(arena.entries) * 128 + HEADER_BYTES > BUDGET - 2 * UNIT
    assert arena.data_offset % DATA_ALIGN == 0
    arena.prefault(0, arena.data_bytes)
    assert arena.data_bytes < arena.resident_bytes <= BUDGET
    arena.close()


def test_entries_and_bytes_survive_a_kill(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.slot(UNIT, 100)[:] = 7
    arena.write_valid(*block(UNIT))
    arena.write_reserved(4 * UNIT, 2 * UNIT, 3, (8, 9))
    arena.write_invalid(6 * UNIT, 11)
    first_id = arena.arena_id
    again = reopen(arena)
    assert again.warm
    assert again.cold_reason == ""
    assert (again.epoch, again.arena_id, again.generation_max) == (2, first_id, 11)
    assert again.scan() == ([block(UNIT)], [ReservedEntry(4 * UNIT, 2 * UNIT, 3, (8, 9))], 0)
    assert again.read_entry(6 * UNIT) == InvalidEntry(6 * UNIT, 11, False)
    assert again.slot(UNIT, 100).tolist() == [7] * 100
    again.close()


def test_epochs_grow_over_warm_and_cold_starts(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    epochs = [arena.epoch]
    for keep in (True, False, True):
        arena = reopen(arena, keep=keep)
        assert arena.warm is keep
        epochs.append(arena.epoch)
    assert epochs == [1, 2, 3, 4]
    arena.close()


def test_two_servers_on_one_directory_are_refused(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    with pytest.raises(DirectoryBusy, match=f"in use by pid {os.getpid()}"):
        HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0))
    arena.close()
    again = HostArena.open(shm_dir, BUDGET)
    assert again.scan()[0] == [block(0)]
    again.close()


def test_too_little_space_names_the_field_and_what_is_free(shm_dir: Path) -> None:
    space = os.statvfs(shm_dir)
    too_much = (space.f_bavail * space.f_frsize + (1 << 30)) // UNIT * UNIT
    with pytest.raises(
        FieldError, match=r"host_bytes is \d+, must be at most \d+ \(\d+\.\d GiB\), free in"
    ) as got:
        HostArena.open(shm_dir, too_much)
    assert got.value.field == "host_bytes"
    with pytest.raises(FieldError, match="host_bytes"):
        HostArena.open(shm_dir, 4096)
    HostArena.open(shm_dir, BUDGET).close()  # the lock was given back


def test_a_grown_arena_that_does_not_fit_keeps_the_old_one(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0))
    arena.close()
    header = ArenaHeader.decode((shm_dir / ARENA_NAME).read_bytes()[:128])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module, "_free_bytes", lambda directory: 0)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FieldError, match="host_bytes"):
            HostArena.open(shm_dir, 2 * BUDGET)
        assert len(os.listdir("/proc/self/fd")) == descriptors
    again = HostArena.open(shm_dir, BUDGET)
    assert again.arena_id == header.arena_id
    assert again.scan()[0] == [block(0)]
    again.close()


# ---- files that cannot be reused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "raw", "reason"),
    [
        (0, b"somebody", "arena.magic"),
        (FORMAT_OFFSET, b"\x02\0\0\0", "arena.format is 2, must be 1"),
        (24, b"another arena id", "arena.crc"),
    ],
)
def test_a_file_of_another_kind_is_replaced(
    shm_dir: Path, offset: int, raw: bytes, reason: str
) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0))
    arena.close()
    with (shm_dir / ARENA_NAME).open("r+b") as file:
        file.seek(offset)
        file.write(raw)
    again = HostArena.open(shm_dir, BUDGET)
    assert not again.warm
    assert reason in again.cold_reason
    assert again.arena_id != arena.arena_id
    assert again.scan() == ([], [], 0)
    again.close()


def test_another_boot_starts_cold(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0))
    arena.close()
    monkeypatch.setattr(host_module, "_boot_id", lambda: b"x" * 16)
    again = HostArena.open(shm_dir, BUDGET)
    assert (again.warm, again.cold_reason) == (False, "the machine was booted since")
    assert again.scan()[0] == []
    again.close()


def test_a_kernel_that_does_not_tell_its_boot_id_starts_cold(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_BOOT_ID", shm_dir / "absent")
    HostArena.open(shm_dir, BUDGET).close()
    again = HostArena.open(shm_dir, BUDGET)
    assert not again.warm
    again.close()


def test_a_truncated_file_starts_cold(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    end = arena.file_bytes
    arena.close()
    os.truncate(shm_dir / ARENA_NAME, end - UNIT)
    again = HostArena.open(shm_dir, BUDGET)
    assert (again.warm, again.cold_reason) == (False, "the file is shorter than its header says")
    again.close()


def test_a_file_left_half_made_is_ignored(shm_dir: Path) -> None:
    (shm_dir / FRESH_NAME).write_bytes(b"half")
    arena = HostArena.open(shm_dir, BUDGET)
    assert not arena.warm
    assert not (shm_dir / FRESH_NAME).exists()
    arena.close()


# ---- readers -----------------------------------------------------------------------------------


def reader_of(arena: HostArena) -> ArenaReader:
    fd = os.open(arena.path, os.O_RDONLY)
    file = mmap.mmap(fd, arena.file_bytes, prot=mmap.PROT_READ)
    os.close(fd)
    return ArenaReader(np.frombuffer(file, np.uint8))


def current(reader: ArenaReader, generation: int, epoch: int) -> bool:
    return reader.current(UNIT, generation, epoch)


def test_a_reader_sees_generation_and_epoch_change(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_reserved(UNIT, UNIT, 5, (1,))
    reader = reader_of(arena)
    assert reader.header.arena_id == arena.arena_id
    assert current(reader, 5, 1)
    arena.write_valid(*block(UNIT, generation=5))
    assert current(reader, 5, 1)
    assert not current(reader, 4, 1)
    arena.slot(UNIT, 4)[:] = [1, 2, 3, 4]
    assert reader.data[UNIT : UNIT + 4].tolist() == [1, 2, 3, 4]
    arena.write_invalid(UNIT, 6)
    assert not current(reader, 5, 1)
    again = reopen(arena)
    assert (reader.epoch(), current(reader, 6, 1), current(reader, 6, 2)) == (2, False, True)
    cold = reopen(again, keep=False)
    assert reader.epoch() == 0  # retired: whoever still maps it misses
    cold.close()


# ---- resize ------------------------------------------------------------------------------------


def test_a_smaller_arena_keeps_what_fits_and_gives_memory_back(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.prefault(0, arena.data_bytes)
    small = data_bytes_within(BUDGET // 2)
    end = arena.data_bytes - UNIT
    arena.write_valid(*block(0, generation=2))
    arena.write_valid(*block(small - UNIT, slot_bytes=2 * UNIT, generation=3))  # reaches beyond
    arena.write_valid(*block(end, generation=50))
    arena.slot(0, 1)[:] = 9
    arena = reopen(arena, BUDGET // 2)
    assert arena.warm
    assert arena.data_bytes == small
    assert arena.scan() == ([block(0, generation=2)], [], 1)
    assert arena.slot(0, 1)[0] == 9
    assert arena.resident_bytes <= BUDGET // 2
    assert arena.generation_max == 50  # of an entry that is gone
    assert os.fstat(arena.fd).st_size > arena.file_bytes  # never truncated under a reader
    arena = reopen(arena)
    assert (arena.warm, arena.data_bytes) == (True, data_bytes_within(BUDGET))
    assert arena.scan() == ([block(0, generation=2)], [], 0)
    assert arena.generation_max == 50
    assert not arena.slot(end, UNIT).any()
    arena.close()


def test_a_reservation_beyond_the_end_is_back_when_the_arena_grows(shm_dir: Path) -> None:
    """Its writer may live through both restarts."""
    arena = HostArena.open(shm_dir, BUDGET)
    end, small = arena.data_bytes - 2 * UNIT, data_bytes_within(BUDGET // 2)
    arena.write_reserved(end, 2 * UNIT, 4, (17,))
    arena.write_reserved(small - UNIT, 2 * UNIT, 4, (18,))
    arena = reopen(arena, BUDGET // 2)
    assert arena.scan() == ([], [ReservedEntry(small - UNIT, UNIT, 4, (18,))], 0)
    arena = reopen(arena)
    beyond = [
        ReservedEntry(small - UNIT, 2 * UNIT, 4, (18,)),
        ReservedEntry(end, 2 * UNIT, 4, (17,)),
    ]
    assert arena.scan() == ([], beyond, 0)
    arena.close()


def test_generations_do_not_fall_when_an_arena_shrinks_and_grows(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    end = arena.data_bytes - UNIT
    arena.write_invalid(end, 50)
    arena = reopen(arena, BUDGET // 2)
    arena = reopen(reopen(arena))
    assert arena.generation_max == 50
    assert arena.read_entry(end) == InvalidEntry(end, 0, False)
    arena.close()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("budget", [BUDGET // 2, 2 * BUDGET])
def test_a_kill_in_a_resize_loses_nothing_that_fits(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Stopped before each store to the header, then opened with either size."""
    kept = block(0, generation=2)
    real = SealedRecords.store
    for steps in itertools.count():
        for following in (budget, BUDGET):
            arena = HostArena.open(shm_dir, BUDGET, keep=False)
            arena.write_valid(*kept)
            arena.write_valid(*block(arena.data_bytes - UNIT, generation=50))
            arena.close()
            left = [steps]

            def store(self: SealedRecords, *args: int, left: list[int] = left) -> None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                real(self, *args)

            with monkeypatch.context() as patch:
                patch.setattr(SealedRecords, "store", store)
                try:
                    HostArena.open(shm_dir, budget).close()
                except Killed:
                    ended = False
                else:
                    ended = True
            arena = HostArena.open(shm_dir, following)
            assert arena.warm
            assert arena.scan()[0][0] == kept
            assert arena.generation_max == 50
            assert arena.data_bytes == data_bytes_within(following)
            arena.close()
        if ended:
            assert steps > 6
            return


def test_growth_beyond_the_tables_room_starts_cold(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "TABLE_DATA_BYTES_MIN", 1 << 20)
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0))
    arena = reopen(arena, 3 * BUDGET)
    assert arena.warm
    arena = reopen(arena, 8 * BUDGET)
    assert (arena.warm, arena.epoch) == (False, 3)
    assert arena.cold_reason == "its table has no room for an arena this large"
    arena.close()


# ---- damage ------------------------------------------------------------------------------------


def test_damaged_entries_are_dropped_counted_and_made_invalid(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.write_valid(*block(0, generation=9))
    arena.write_valid(*block(UNIT))
    arena.entries.words[1, 4] ^= np.uint64(1)
    assert arena.scan() == ([block(0, generation=9)], [], 1)
    assert arena.read_entry(UNIT) == InvalidEntry(UNIT, 9, False)
    assert arena.scan()[2] == 0
    arena.close()


# ---- memory ------------------------------------------------------------------------------------


def test_prefault_makes_pages_resident_and_changes_nothing(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    arena.slot(0, 4)[:] = 5
    before = arena.resident_bytes
    arena.prefault(0, 1 << 20)
    assert arena.resident_bytes - before == pytest.approx(1 << 20, abs=8192)
    assert arena.slot(0, 4).tolist() == [5] * 4
    arena.close()


def test_prefault_without_the_madvise_falls_back(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(view: np.ndarray, advice: int) -> None:
        raise OSError(errno.EINVAL, "madvise: Invalid argument")

    monkeypatch.setattr(syscalls, "madvise", refuse)
    arena = HostArena.open(shm_dir, BUDGET)
    arena.slot(0, 4)[:] = 5
    arena.prefault(0, arena.data_bytes)
    assert arena.resident_bytes > arena.data_bytes
    assert arena.slot(0, 4).tolist() == [5] * 4
    assert [n for n in arena.notes if "MADV_POPULATE_WRITE" in n] == arena.notes
    arena.close()


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_prefault_without_memory_is_an_error_that_names_the_field(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    arena = HostArena.open(shm_dir, BUDGET)

    def fail(view: np.ndarray, advice: int) -> None:
        raise OSError(number, "madvise")

    monkeypatch.setattr(syscalls, "madvise", fail)
    with pytest.raises(FieldError, match="host_bytes"):
        arena.prefault(0, 1 << 20)
    arena.close()


def test_what_the_machine_refuses_becomes_a_note(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = shm_dir / "shmem_enabled"
    setting.write_text("always [never]")

    def refuse(view: np.ndarray) -> None:
        raise OSError(errno.EPERM, "mlock: Operation not permitted")

    monkeypatch.setattr(host_module, "_SHMEM_HUGE", setting)
    monkeypatch.setattr(syscalls, "mlock", refuse)
    arena = HostArena.open(shm_dir, BUDGET, hugepages=True, mlock=True)
    arena.prefault(0, arena.data_bytes)
    assert len(arena.notes) == 2
    assert "huge pages are off" in arena.notes[0]
    assert "RLIMIT_MEMLOCK" in arena.notes[1]
    arena.close()


def test_close_without_keep_removes_the_file_and_tells_readers(shm_dir: Path) -> None:
    arena = HostArena.open(shm_dir, BUDGET)
    reader = reader_of(arena)
    arena.close(keep=False)
    arena.close()
    assert reader.epoch() == 0
    assert not (shm_dir / ARENA_NAME).exists()
    assert EPOCH_OFFSET % 8 == 0
