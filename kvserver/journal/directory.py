"""The disk tier's directory: which block each slot of the slot file holds, in RocksDB.

Keys: "c" -> number of records, u64 little-endian | "m" -> id of the slot file
    | "n" + namespace id -> canonical encoding | "s" + offset -> record (`kvserver.journal.record`)

Rule 1: metadata only, never payload.
Rule 2: one record per slot, keyed by its offset: a put replaces what the slot held before. A slot
        without a record holds nothing; the generation of a disk slot lives no longer than its
        record, for nobody outside the server ever refers to one.
Rule 3: a put survives a kill of the server at once, a power cut after the next `sync`.
Rule 4: the journal names its slot file. One that names another file knows nothing: its records are
        dropped and counted in `foreign`, durably.
Rule 5: damage never stops the start. A damaged record is dropped and counted; a database with
        unreadable stretches is built anew from what can be read; one that cannot be opened is
        repaired or, at last, set aside as `<name>.damaged`. `notes` says so.
Rule 6: after a failed write RocksDB refuses all others: JournalError until `reopen`.
Rule 7: the number of records is written in one batch with each change of them. A scan that finds
        fewer knows how many are gone; where damage took the number too, it counts at least one.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rocksdict import (
    AccessType,
    DbClosedError,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
)

from kvserver.journal import record as codec
from kvserver.journal.errors import JournalError
from kvserver.journal.record import DiskRecord, RecordError

WRITE_BUFFER_BYTES = 16 << 20
WAL_BYTES_MAX = 64 << 20
_COUNT = b"c"
_COUNT_FORM = struct.Struct("<Q")
_META = b"m"
_NAMESPACE = b"n"
_SLOTS_END = b"t"  # the first key after those of the slots
_SALVAGE_STEP_BYTES = 16 * 1024
_SALVAGE_STEP_BYTES_MAX = 1 << 60
_RECOVERY_DROPPED = b": dropping "  # what RocksDB logs for a stretch of its log that it cannot read


class Scan(NamedTuple):
    """What the journal knows, ascending by offset; `dropped` counts what it lost, at least."""

    records: list[DiskRecord]
    dropped: int


class Directory:
    """The open journal. Safe to use from any thread, but for `reopen` and `close`."""

    def __init__(self, path: Path, db: Rdict, notes: list[str], *, writable: bool) -> None:
        self.path = path
        self.notes = notes
        self.foreign = 0  # records of another slot file, dropped at open
        self.file_id = b""
        self._db = db
        self._writable = writable
        self._changes = threading.Lock()
        self._offsets: set[int] | None = None  # of all records; None: not known yet
        self._lost = 0  # stretches of RocksDB's log that could not be read at open

    @classmethod
    def open(cls, path: Path, *, file_id: bytes) -> Directory:
        """Open or make the journal of the slot file `file_id`. JournalError when that fails."""
        notes: list[str] = []
        used = _has_content(path)
        journal = cls(path, _open_or_restore(path, notes), notes, writable=True)
        try:
            journal._lost = _skipped_by_recovery(path)
            journal._claim(file_id, used=used or bool(notes))
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open_readonly(cls, path: Path) -> Directory:
        """For an offline check: changes nothing. JournalError when it cannot be opened."""
        with _wrapped("open"):
            db = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
        journal = cls(path, db, [], writable=False)
        with contextlib.suppress(JournalError):
            journal.file_id = journal._get(_META) or b""
        return journal

    def get(self, offset: int) -> DiskRecord | None:
        """The slot's record; None when there is none that counts."""
        key = codec.encode_key(offset)
        value = self._get(key)
        if value is None:
            return None
        try:
            return codec.decode(key, value)
        except RecordError:
            return None

    def put_valid(self, *records: DiskRecord) -> None:
        """These slots hold these blocks, all or none; the caller has synced their bytes."""
        batch = WriteBatch(raw_mode=True)
        for record in records:
            batch.put(*codec.encode(record))
        self._change("put", batch, {record.offset for record in records}, present=True)

    def put_invalid(self, offsets: Iterable[int]) -> None:
        """These slots hold nothing; `sync` before their bytes change."""
        batch, gone = WriteBatch(raw_mode=True), set(offsets)
        for offset in gone:
            batch.delete(codec.encode_key(offset))
        self._change("delete", batch, gone, present=False)

    def put_namespace(self, identity: bytes, canonical: bytes) -> None:
        """Remember a namespace, before the first record that names it."""
        assert sha256(canonical).digest() == identity, identity.hex()
        batch = WriteBatch(raw_mode=True)
        batch.put(_NAMESPACE + identity, canonical)
        self._write("put", batch)

    def remove_namespaces(self, identities: Iterable[bytes]) -> None:
        batch = WriteBatch(raw_mode=True)
        for identity in identities:
            batch.delete(_NAMESPACE + identity)
        self._write("delete", batch)

    def namespaces(self) -> dict[bytes, bytes]:
        """Namespace id -> canonical encoding; those that do not match their id are left out."""
        found, _ = self._walk(_NAMESPACE)
        pairs = ((key[1:], value) for key, value in found if key[:1] == _NAMESPACE)
        return {key: value for key, value in pairs if sha256(value).digest() == key}

    def sync(self) -> None:
        """Returns when every put so far is durable. After an error nothing is known."""
        with _wrapped("sync"):
            self._db.flush_wal(True)

    def scan(self, data_bytes: int) -> Scan:
        """All records within a slot file of `data_bytes`; the others are removed and counted."""
        expected = self._count()
        found, unreadable = self._walk(codec.KEY_PREFIX)
        records, bad = [], []
        for key, value in found:
            try:
                record = codec.decode(key, value)
            except RecordError:
                bad.append(key)
                continue
            if record.offset + record.slot_bytes <= data_bytes:
                records.append(record)
            else:
                bad.append(key)
        missing = max(0, expected - len(found)) if expected is not None else 1
        missing = max(missing, unreadable, self._lost)
        if self._writable:
            self._clean(records, bad, damaged=unreadable > 0, uncounted=expected != len(records))
        return Scan(records, len(bad) + missing)

    def reopen(self) -> None:
        """Open the database again after a failure. JournalError when it still fails."""
        with contextlib.suppress(Exception):  # it has failed already; rocksdict has no own type
            self._db.close()
        self._offsets = None
        with _wrapped("reopen"):
            self._db = Rdict(str(self.path), _options())
        self._claim(self.file_id)

    def close(self) -> None:
        """A second call does nothing."""
        try:
            self._db.close()
        except DbClosedError:
            return
        except Exception as error:  # rocksdict raises plain Exception
            raise JournalError("close", error) from error

    def _claim(self, file_id: bytes, *, used: bool = True) -> None:
        """Make this the journal of `file_id`: records of another file go.

        Where damage has taken the id the records stay: their checksums judge the slots' bytes.
        Where the journal was `used` before, a number of records that is not there is lost.
        """
        self.file_id = file_id
        stored: bytes | None = None
        try:
            stored = self._db.get(_META)
        except Exception as error:  # rocksdict raises plain Exception
            if not _is_damage(error):
                raise JournalError("read", error) from error
            return  # the scan rebuilds
        if stored is None:
            batch = WriteBatch(raw_mode=True)
            batch.put(_META, file_id)
            if not used:
                batch.put(_COUNT, _encode_count(0))
            self._write("put", batch)
        elif stored != file_id:
            self._drop_foreign(file_id)

    def _drop_foreign(self, file_id: bytes) -> None:
        batch = WriteBatch(raw_mode=True)
        found, unreadable = self._walk(codec.KEY_PREFIX)
        batch.delete_range(codec.KEY_PREFIX, _SLOTS_END)
        batch.put(_META, file_id)
        batch.put(_COUNT, _encode_count(0))
        self._write("put", batch)
        self.sync()
        self.foreign = len(found) + unreadable
        self.notes.append(f"the journal was of another slot file: {self.foreign} records dropped")

    def _change(
        self, operation: str, batch: WriteBatch, offsets: set[int], *, present: bool
    ) -> None:
        """Write a change of the records at `offsets`, and their number with it."""
        if not offsets:
            return
        with self._changes:
            if self._offsets is None:
                found, _ = self._walk(codec.KEY_PREFIX)
                self._offsets = {
                    codec.decode_key(key) for key, _ in found if len(key) == codec.KEY_BYTES
                }
            known, self._offsets = self._offsets, None  # not known any more, should this fail
            changed = offsets - known if present else offsets & known
            number = len(known) + (len(changed) if present else -len(changed))
            batch.put(_COUNT, _encode_count(number))
            self._write(operation, batch)
            if present:
                known |= changed
            else:
                known -= changed
            self._offsets = known

    def _count(self) -> int | None:
        """How many records there should be; None when that is lost."""
        try:
            value = self._get(_COUNT)
        except JournalError:
            return None
        return _COUNT_FORM.unpack(value)[0] if value and len(value) == _COUNT_FORM.size else None

    def _clean(
        self, records: list[DiskRecord], bad: list[bytes], *, damaged: bool, uncounted: bool
    ) -> None:
        """After a scan: what was lost is lost for good, and not counted again."""
        self._lost = 0
        if damaged:
            self._rebuild(records)
        elif bad or uncounted:
            batch = WriteBatch(raw_mode=True)
            for key in bad:
                batch.delete(key)
            batch.put(_COUNT, _encode_count(len(records)))
            self._write("clean", batch)
        self._offsets = {record.offset for record in records}

    def _get(self, key: bytes) -> bytes | None:
        with _wrapped("read"):
            value: bytes | None = self._db.get(key)
        return value

    def _write(self, operation: str, batch: WriteBatch) -> None:
        if not batch.is_empty():
            with _wrapped(operation):
                self._db.write(batch)

    def _walk(self, prefix: bytes) -> tuple[list[tuple[bytes, bytes]], int]:
        """Pairs with a key prefix, and how many stretches could not be read.

        RocksDB's iterator stops at a damaged block as at the end; only its status tells. Reading
        goes on behind it: the next key that a slot can have, then ever farther ahead.
        """
        pairs: list[tuple[bytes, bytes]] = []
        unreadable, step = 0, 0
        with _wrapped("scan"):
            cursor = self._db.iter()
            cursor.seek(prefix)
        while True:
            before = len(pairs)
            pairs.extend(_run(cursor, prefix))
            try:
                cursor.status()
            except Exception as error:
                if not _is_damage(error):
                    raise JournalError("scan", error) from error
            else:
                return pairs, unreadable
            if len(pairs) > before or not step:
                unreadable, step = unreadable + 1, _SALVAGE_STEP_BYTES
                last = pairs[-1][0] if pairs else b""
                at = int.from_bytes(last[1:], "big") if prefix == codec.KEY_PREFIX else 0
            if prefix != codec.KEY_PREFIX or step > _SALVAGE_STEP_BYTES_MAX:
                return pairs, unreadable
            cursor.seek(codec.encode_key(at + step))
            step *= 2

    def _rebuild(self, records: list[DiskRecord]) -> None:
        """A database of what can be read takes the place of the damaged one."""
        namespaces = self.namespaces()
        self.notes.append("the journal was damaged: rebuilt from what can be read")
        self.close()
        fresh = self.path.with_name(self.path.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        with _wrapped("rebuild"):
            self._db = Rdict(str(fresh), _options())
        self._fill(records, namespaces)
        self.close()
        _set_aside(self.path)
        fresh.rename(self.path)
        self.reopen()

    def _fill(self, records: list[DiskRecord], namespaces: Mapping[bytes, bytes]) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.put(_META, self.file_id)
        batch.put(_COUNT, _encode_count(len(records)))
        for identity, canonical in namespaces.items():
            batch.put(_NAMESPACE + identity, canonical)
        for record in records:
            batch.put(*codec.encode(record))
        self._write("rebuild", batch)
        self.sync()


def _run(cursor: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    while cursor.valid():
        key: bytes = cursor.key()
        if not key.startswith(prefix):
            return
        yield key, cursor.value()
        cursor.next()


def _options() -> Options:
    """Small and bounded: two write buffers of 16 MiB, at most 64 MiB of WAL, three log files."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_max_total_wal_size(WAL_BYTES_MAX)
    options.set_compression_type(DBCompressionType.none())
    options.set_max_background_jobs(2)
    options.set_max_open_files(256)
    options.set_keep_log_file_num(3)
    options.set_max_log_file_size(1 << 20)
    # Each record has its own CRC and is checked against the slot's bytes, so one that reappears or
    # is lost in the middle of a damaged log does no harm: read all that can be read.
    options.set_wal_recovery_mode(DBRecoveryMode.skip_any_corrupted_record())
    return options


def _open_or_restore(path: Path, notes: list[str]) -> Rdict:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return Rdict(str(path), _options())
    except Exception as error:  # rocksdict raises plain Exception
        if not _is_damage(error):
            raise JournalError("open", error) from error
        notes.append(f"the journal could not be opened: {error}")
    with contextlib.suppress(Exception):
        Rdict.repair(str(path), _options())
        db = Rdict(str(path), _options())
        notes.append("the journal was repaired; records may be missing")
        return db
    _set_aside(path)
    notes.append("the journal could not be repaired: it was set aside and a new one begun")
    with _wrapped("open"):
        return Rdict(str(path), _options())


def _has_content(path: Path) -> bool:
    """Whether a database was ever written to: it has tables, or a log that is not empty."""
    files = [*path.glob("*.sst"), *path.glob("*.log")]
    return any(file.stat().st_size for file in files)


def _skipped_by_recovery(path: Path) -> int:
    """Stretches of its log that RocksDB skipped when it opened: it says so in its LOG, only."""
    try:
        return (path / "LOG").read_bytes().count(_RECOVERY_DROPPED)
    except OSError:
        return 0


def _encode_count(number: int) -> bytes:
    return _COUNT_FORM.pack(number)


def _is_damage(error: Exception) -> bool:
    """Damaged files, not a device that is full, failing or in use."""
    text = str(error)
    return not text.startswith("IO error") or "No such file" in text


def _set_aside(path: Path) -> None:
    """Keep a damaged database for its owner to look at; only the last one."""
    damaged = path.with_name(path.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    path.rename(damaged)


@contextlib.contextmanager
def _wrapped(operation: str) -> Iterator[None]:
    try:
        yield
    except JournalError:
        raise
    except Exception as error:  # rocksdict raises plain Exception
        raise JournalError(operation, error) from error
