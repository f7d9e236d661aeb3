"""The journal: what survives, what is dropped and counted; damage does not stop the start."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import pytest

from kvserver.journal import directory as directory_module
from kvserver.journal.directory import Directory, Scan
from kvserver.journal.errors import JOURNAL_NAME, JournalError
from kvserver.journal.record import DiskRecord, encode_key

FILE_ID = b"f" * 16
SLOT = 16384
EVERYTHING = 1 << 62
CANONICAL = b"canonical encoding"
NAMESPACE = sha256(CANONICAL).digest()


def record(index: int, generation: int = 1) -> DiskRecord:
    key = index.to_bytes(32, "big")
    return DiskRecord(index * SLOT, SLOT, generation, b"t" * 16, key, bytes(32), 128, index + 7)


def killed(path: Path) -> Path:
    """A copy of an open journal's files: what a server killed now would leave."""
    copy = path.with_name(path.name + "-killed")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    return copy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JOURNAL_NAME


def test_records_survive_a_close_and_a_kill(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    assert journal.scan(EVERYTHING) == Scan([], 0)
    journal.put_namespace(NAMESPACE, CANONICAL)
    journal.put_valid(record(3), record(1))
    journal.put_valid(record(2))
    journal.put_valid(record(3, generation=5))
    journal.put_invalid([record(2).offset])
    expected = Scan([record(1), record(3, generation=5)], 0)
    assert journal.scan(EVERYTHING) == expected
    assert journal.get(record(1).offset) == record(1)
    assert journal.get(record(2).offset) is None
    copy = killed(path)
    journal.sync()
    journal.close()
    journal.close()
    for left in (path, copy):
        again = Directory.open(left, file_id=FILE_ID)
        assert again.scan(EVERYTHING) == expected
        assert again.namespaces() == {NAMESPACE: CANONICAL}
        assert (again.foreign, again.notes) == (0, [])
        again.close()


def test_the_journal_of_another_slot_file_is_not_believed(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_namespace(NAMESPACE, CANONICAL)
    journal.put_valid(*map(record, range(5)))
    journal.close()
    other = Directory.open(path, file_id=b"g" * 16)
    assert other.foreign == 5
    assert other.scan(EVERYTHING) == Scan([], 0)
    assert other.namespaces() == {NAMESPACE: CANONICAL}
    other.close()
    again = Directory.open(path, file_id=FILE_ID)  # it is now the other's
    assert (again.foreign, again.scan(EVERYTHING)) == (0, Scan([], 0))
    again.close()


def test_records_beyond_a_smaller_file_are_dropped_for_good(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(*map(record, range(8)))
    assert journal.scan(5 * SLOT + 1) == Scan([record(i) for i in range(5)], 3)
    assert journal.scan(EVERYTHING) == Scan([record(i) for i in range(5)], 0)
    journal.close()


def test_a_damaged_record_is_dropped_and_counted(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(*map(record, range(3)))
    journal._db.put(encode_key(SLOT), b"rubbish")
    assert journal.get(SLOT) is None
    assert journal.scan(EVERYTHING) == Scan([record(0), record(2)], 1)
    assert journal.scan(EVERYTHING).dropped == 0
    journal.close()


def test_a_namespace_that_does_not_match_its_id_is_left_out(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_namespace(NAMESPACE, CANONICAL)
    journal._db.put(b"n" + bytes(32), b"another")
    assert journal.namespaces() == {NAMESPACE: CANONICAL}
    journal.remove_namespaces([NAMESPACE])
    assert journal.namespaces() == {}
    journal.close()


def test_two_opens_are_refused_as_busy_and_not_as_damaged(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(record(0))
    with pytest.raises(JournalError, match="lock hold"):
        Directory.open(path, file_id=FILE_ID)
    assert journal.scan(EVERYTHING).records == [record(0)]
    journal.close()


def test_readonly_changes_nothing(path: Path) -> None:
    with pytest.raises(JournalError):
        Directory.open_readonly(path)
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(*map(record, range(3)))
    journal.close()
    look = Directory.open_readonly(path)
    assert look.file_id == FILE_ID
    assert look.scan(2 * SLOT) == Scan([record(0), record(1)], 1)
    with pytest.raises(JournalError):
        look.put_valid(record(4))
    look.close()
    again = Directory.open(path, file_id=FILE_ID)
    assert len(again.scan(EVERYTHING).records) == 3
    again.close()


# ---- failure and return ------------------------------------------------------------------------


def put_many(journal: Directory, count: int) -> None:
    for index in range(1, count):
        journal.put_valid(record(index))


def test_a_failed_write_is_a_journal_error_and_reopen_brings_it_back(path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: the log cannot grow, RocksDB then refuses all writes."""
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(record(0))
    journal.sync()
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(JournalError, match="File too large"):
            put_many(journal, 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with pytest.raises(JournalError):
        journal.put_valid(record(600))
    journal.reopen()
    journal.put_valid(record(601))
    journal.sync()
    found = journal.scan(EVERYTHING)
    keys = [r.offset // SLOT for r in found.records]
    assert keys[:-1] == list(range(len(keys) - 1))  # the acknowledged prefix, perhaps one more
    assert (keys[-1], found.dropped) == (601, 0)
    journal.close()


def test_a_reopen_that_fails_can_be_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(record(0))

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(directory_module, "Rdict", fail)
        with pytest.raises(JournalError, match="No space"):
            journal.reopen()
        with pytest.raises(JournalError):
            journal.put_valid(record(1))
    journal.reopen()
    assert journal.scan(EVERYTHING).records == [record(0)]
    journal.close()


# ---- damage ------------------------------------------------------------------------------------


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 0x10
    file.write_bytes(bytes(raw))


def filled(path: Path, count: int) -> Path:
    """Makes a journal and closes it, which writes a table; returns a copy that has the log."""
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_namespace(NAMESPACE, CANONICAL)
    for index in range(count):
        journal.put_valid(record(index))
    copy = killed(path)
    journal.close()
    return copy


def test_a_damaged_table_costs_the_records_of_a_block(path: Path) -> None:
    filled(path, 2000)
    (table,) = path.glob("*.sst")
    flip(table, table.stat().st_size // 2)
    journal = Directory.open(path, file_id=FILE_ID)
    found = journal.scan(EVERYTHING)
    assert 1800 < len(found.records) < 2000
    assert found.dropped == 2000 - len(found.records)
    assert all(r == record(r.offset // SLOT) for r in found.records)
    assert any("rebuilt" in note for note in journal.notes)
    assert journal.namespaces() == {NAMESPACE: CANONICAL}
    journal.put_valid(record(5000))
    journal.sync()
    journal.close()
    again = Directory.open(path, file_id=FILE_ID)  # the new database is whole
    assert again.scan(EVERYTHING) == Scan([*found.records, record(5000)], 0)
    again.close()


def test_a_damaged_log_costs_the_records_of_a_block(path: Path) -> None:
    copy = filled(path, 2000)
    (log,) = copy.glob("*.log")
    flip(log, log.stat().st_size // 2)
    journal = Directory.open(copy, file_id=FILE_ID)
    found = journal.scan(EVERYTHING)
    assert 1500 < len(found.records) < 2000
    assert found.dropped == 2000 - len(found.records)
    assert all(r == record(r.offset // SLOT) for r in found.records)
    journal.close()


def test_the_damaged_end_of_a_log_is_counted(path: Path) -> None:
    """The number of records is damaged with them; RocksDB's own log tells."""
    copy = filled(path, 20)
    (log,) = copy.glob("*.log")
    flip(log, log.stat().st_size - 40)
    journal = Directory.open(copy, file_id=FILE_ID)
    assert journal.scan(EVERYTHING) == Scan([record(i) for i in range(19)], 1)
    assert journal.scan(EVERYTHING).dropped == 0
    journal.close()


def test_records_that_vanished_are_counted_once(path: Path) -> None:
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(*map(record, range(8)))
    journal.put_valid(record(3, generation=2))
    journal.put_invalid([record(7).offset, record(9).offset])
    for index in (1, 3):
        journal._db.delete(encode_key(record(index).offset))
    assert journal.scan(EVERYTHING) == Scan([record(i) for i in (0, 2, 4, 5, 6)], 2)
    assert journal.scan(EVERYTHING).dropped == 0
    journal.put_valid(record(1))
    journal.put_invalid([record(2).offset])
    journal.close()
    again = Directory.open(path, file_id=FILE_ID)
    again.put_invalid([record(4).offset])  # before the scan, too
    assert again.scan(EVERYTHING) == Scan([record(i) for i in (0, 1, 5, 6)], 0)
    again.close()


@pytest.mark.parametrize("name", ["MANIFEST-*", "CURRENT", "rocksdict-config.json", "*.sst"])
@pytest.mark.parametrize("how", ["flip", "empty", "remove"])
def test_no_damaged_file_stops_the_start(path: Path, name: str, how: str) -> None:
    filled(path, 300)
    for file in path.glob(name):
        if how == "flip":
            flip(file, min(100, file.stat().st_size - 2))
        elif how == "empty":
            file.write_bytes(b"")
        else:
            file.unlink()
    journal = Directory.open(path, file_id=FILE_ID)
    found = journal.scan(EVERYTHING)
    assert all(r == record(r.offset // SLOT) for r in found.records)
    assert (found.dropped > 0) == (len(found.records) < 300)
    journal.put_valid(record(900))
    journal.sync()
    journal.close()
    again = Directory.open(path, file_id=FILE_ID)
    assert again.scan(EVERYTHING) == Scan([*found.records, record(900)], 0)
    again.close()


def test_the_last_record_of_the_log_torn_at_every_length(path: Path) -> None:
    """Half a record plus a kill gives exactly the acknowledged prefix."""
    journal = Directory.open(path, file_id=FILE_ID)
    journal.put_valid(record(0))
    (log,) = path.glob("*.log")
    whole = log.stat().st_size
    journal.put_valid(record(1))
    end = log.stat().st_size
    copy = killed(path)
    journal.close()
    assert end - whole > 100
    for length in range(whole, end + 1, 7):
        torn = copy.with_name("torn")
        shutil.copytree(copy, torn)
        os.truncate(torn / log.name, length)
        again = Directory.open(torn, file_id=FILE_ID)
        expected = [record(0), record(1)] if length == end else [record(0)]
        assert again.scan(EVERYTHING) == Scan(expected, 0)
        again.close()
        shutil.rmtree(torn)
