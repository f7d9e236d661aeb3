"""The slot file: direct and buffered I/O, short transfers, headers, resize, what disks refuse."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvproto.errors import FieldError
from kvserver.tiers import syscalls
from kvserver.tiers.disk import (
    DATA_OFFSET,
    DISK_BYTES_MIN,
    HEADER_BYTES,
    SLOTS_NAME,
    DiskFile,
    DiskHeader,
)
from kvserver.tiers.errors import DiskError

BYTES = 1 << 20
HEADER = DiskHeader(BYTES, bytes(range(16)))


def pages(length: int, seed: int | None = None) -> np.ndarray:
    """Memory that begins on a page, as arena slots do."""
    view = np.frombuffer(mmap.mmap(-1, length), np.uint8)
    if seed is not None:
        view[:] = np.random.default_rng(seed).integers(0, 256, length, np.uint8)
    return view


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(tmp_path: Path, direct: bool) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES, direct=direct)
    assert not file.warm
    assert file.cold_reason == "there was no slot file"
    assert len(file.file_id) == 16
    one, two, back = pages(65536, 1), pages(16384, 2), pages(65536)
    file.write(0, one)
    file.write(BYTES - 16384, two)
    file.sync()
    file.read(0, back)
    assert np.array_equal(back, one)
    file.close()
    again = DiskFile.open(tmp_path / SLOTS_NAME, BYTES, direct=direct)
    assert again.warm
    assert again.file_id == file.file_id
    again.read(BYTES - 16384, back[:16384])
    assert np.array_equal(back[:16384], two)
    again.close()
    again.close()


def test_the_file_is_allocated_whole(tmp_path: Path) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    stat = (tmp_path / SLOTS_NAME).stat()
    assert stat.st_size == DATA_OFFSET + BYTES
    assert stat.st_blocks * 512 >= BYTES
    file.close()


def test_direct_io_is_used_where_the_filesystem_takes_it(tmp_path: Path) -> None:
    """On a filesystem without it, the note must say so."""
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    assert file.direct == (not any("O_DIRECT" in note for note in file.notes))
    file.close()


# ---- what a filesystem refuses -----------------------------------------------------------------


def test_a_filesystem_that_refuses_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    check_fallback(tmp_path, "O_DIRECT is refused")


def test_a_filesystem_that_takes_the_flag_and_refuses_the_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def refuse_first(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_first)
    check_fallback(tmp_path, "O_DIRECT does not work")


def check_fallback(tmp_path: Path, note: str) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    assert not file.direct
    assert [n for n in file.notes if n.startswith(note)] == file.notes
    unaligned = np.random.default_rng(3).integers(0, 256, 4097, np.uint8)[1:]
    back = np.zeros(4097, np.uint8)[1:]
    file.write(4096, unaligned)  # without O_DIRECT any memory will do
    file.read(4096, back)
    assert np.array_equal(back, unaligned)
    file.close()


def test_a_filesystem_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(syscalls, "allocate", refuse)
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    assert any(note.startswith("fallocate is refused") for note in file.notes)
    assert (tmp_path / SLOTS_NAME).stat().st_size == DATA_OFFSET + BYTES
    file.write(0, pages(4096, 1))
    file.close()


def test_too_little_space_names_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = os.statvfs(tmp_path)
    with pytest.raises(
        FieldError, match=r"disk_bytes is \d+, must be at most \d+ \(\d+\.\d GiB\), free"
    ):
        DiskFile.open(tmp_path / SLOTS_NAME, (space.f_bavail + 1000) * space.f_frsize)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(syscalls, "allocate", full)
    with pytest.raises(FieldError, match=r"disk_bytes is \d+, must be what is free"):
        DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    for size in (0, DISK_BYTES_MIN - 4096, DISK_BYTES_MIN + 1):
        with pytest.raises(FieldError, match="disk_bytes"):
            DiskFile.open(tmp_path / SLOTS_NAME, size)


def test_a_place_that_cannot_be_opened_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as got:
        DiskFile.open(tmp_path / "absent" / SLOTS_NAME, BYTES)
    assert got.value.errno == errno.ENOENT


# ---- transfers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4096, 8192])
def test_short_transfers_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    calls = {"preadv": 0, "pwritev": 0}

    def short(name: str) -> Callable[[int, list[memoryview], int], int]:
        real = getattr(os, name)

        def call(fd: int, buffers: list[memoryview], offset: int) -> int:
            calls[name] += 1
            moved: int = real(fd, [buffers[0][:step]], offset)
            return moved

        return call

    for name in calls:
        monkeypatch.setattr(os, name, short(name))
    sent, back = pages(65536, 4), pages(65536)
    file.write(16384, sent)
    file.read(16384, back)
    assert np.array_equal(sent, back)
    assert calls == {"preadv": 65536 // step, "pwritev": 65536 // step}
    file.close()


def test_an_end_of_file_is_an_error_and_not_old_bytes(tmp_path: Path) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    os.truncate(tmp_path / SLOTS_NAME, DATA_OFFSET + 4096)
    file.read(0, pages(4096))
    with pytest.raises(DiskError) as got:
        file.read(0, pages(8192))
    assert (got.value.errno, got.value.operation) == (errno.EIO, "read")
    file.close()


@pytest.mark.parametrize(
    ("call", "operation"), [("preadv", "read"), ("pwritev", "write"), ("fdatasync", "sync")]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_disk_is_a_disk_error_with_its_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, operation: str, number: int
) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)

    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    arguments = () if operation == "sync" else (0, pages(4096))
    with pytest.raises(DiskError, match=os.strerror(number)) as got:
        getattr(file, operation)(*arguments)
    assert (got.value.errno, got.value.operation) == (number, operation)
    file.close()


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (0, 100), (BYTES, 4096), (-4096, 4096)])
def test_extents_outside_the_rules_are_our_bug(tmp_path: Path, offset: int, length: int) -> None:
    file = DiskFile.open(tmp_path / SLOTS_NAME, BYTES)
    with pytest.raises(AssertionError):
        file.read(offset, pages(length))
    file.close()


# ---- header and resize -------------------------------------------------------------------------


def test_no_flipped_bit_of_the_header_is_accepted() -> None:
    raw = bytearray(HEADER.encode())
    assert len(raw) == HEADER_BYTES
    assert DiskHeader.decode(bytes(raw)) == HEADER
    for bit in range(8 * HEADER_BYTES):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FieldError):
            DiskHeader.decode(bytes(raw))
        raw[bit // 8] ^= 1 << bit % 8


def test_one_torn_header_is_survived_two_make_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / SLOTS_NAME
    first = DiskFile.open(path, BYTES)
    first.close()
    tear(path, 0)
    again = DiskFile.open(path, BYTES)
    assert (again.warm, again.file_id) == (True, first.file_id)
    again.close()
    tear(path, HEADER_BYTES)
    other = DiskFile.open(path, BYTES)
    assert not other.warm
    assert "slots.magic" in other.cold_reason
    assert other.file_id != first.file_id  # no record of the old file's journal is believed
    other.close()


def tear(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(512))


def test_a_file_grows_and_shrinks_and_keeps_what_fits(tmp_path: Path) -> None:
    path = tmp_path / SLOTS_NAME
    sent, back = pages(16384, 5), pages(16384)
    file = DiskFile.open(path, 2 * BYTES)
    file.write(0, sent)
    file.close()
    for size in (BYTES, 4 * BYTES, 4 * BYTES):
        again = DiskFile.open(path, size)
        assert (again.warm, again.file_id, again.data_bytes) == (True, file.file_id, size)
        assert path.stat().st_size == DATA_OFFSET + size
        again.read(0, back)
        assert np.array_equal(back, sent)
        again.close()


def test_readonly_looks_and_does_not_touch(tmp_path: Path) -> None:
    path = tmp_path / SLOTS_NAME
    with pytest.raises(DiskError):
        DiskFile.open_readonly(path)
    assert not path.exists()
    DiskFile.open(path, BYTES).close()
    before = path.read_bytes()
    file = DiskFile.open_readonly(path)
    assert file.data_bytes == BYTES
    with pytest.raises(DiskError):
        file.write(0, pages(4096, 1))
    file.close()
    tear(path, 0)
    tear(path, HEADER_BYTES)
    with pytest.raises(FieldError, match="slots"):
        DiskFile.open_readonly(path)
    assert path.read_bytes()[DATA_OFFSET:] == before[DATA_OFFSET:]
