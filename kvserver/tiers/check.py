"""Offline checks of what a stopped server left: is each block that a directory names what it says?

Nothing here changes a byte. The journal's records come from the caller, for tiers know no journal.

Rule 1: a check holds the directory's lock, so no server writes meanwhile.
Rule 2: the result is a report, whatever the files hold; only a directory that cannot be looked at
        at all (no arena, in use) raises.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvproto.arena import ENTRY_BYTES, RECORD_BYTES, UNIT, ArenaHeader
from kvproto.errors import FieldError
from kvproto.namespace import TAG_BYTES, NamespaceSpec
from kvserver.tiers.checksums import verify_slot
from kvserver.tiers.disk import IO_ALIGN, SLOTS_NAME, DiskFile
from kvserver.tiers.entry import EntryTable
from kvserver.tiers.errors import ArenaError, DiskError
from kvserver.tiers.host import ARENA_NAME
from kvserver.tiers.names import read_namespaces

LINES_MAX = 1000

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # slots done, slots in all


class SlotRecord(Protocol):
    """What an entry or a journal record says of a slot."""

    @property
    def offset(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def tag(self) -> bytes: ...
    @property
    def key(self) -> bytes: ...
    @property
    def tokens(self) -> int: ...
    @property
    def root(self) -> int: ...


@dataclass
class AreaReport:
    """What a check of one tier found. Counts are of slots but where the name says otherwise."""

    name: str
    data_bytes: int = 0
    namespaces: int = 0
    blocks: int = 0
    reserved: int = 0
    verified: int = 0  # 0 without `verify`
    damaged: int = 0  # entries or records that do not read back
    corrupt: int = 0  # the payload does not match its checksums, or cannot be read
    unknown_namespace: int = 0
    misplaced: int = 0  # overlaps another slot, is too small for its block or beyond the end
    bytes_used: int = 0
    notes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # one for each bad block, at most LINES_MAX

    @property
    def bad(self) -> int:
        return self.damaged + self.corrupt + self.unknown_namespace + self.misplaced

    def say(self, line: str) -> None:
        if len(self.lines) < LINES_MAX:
            self.lines.append(f"{self.name}: {line}")


def check_host(
    directory: Path, *, verify: bool = False, progress: Progress | None = None
) -> AreaReport:
    """Check a host directory whose lock the caller holds. ArenaError when it has no arena."""
    report = AreaReport("host")
    path = directory / ARENA_NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaError(f"no arena in {directory}: {error.strerror}") from error
    try:
        header = ArenaHeader.decode(os.pread(fd, RECORD_BYTES, 0))
        length = header.data_offset + header.data_bytes
        file: Bytes = np.frombuffer(mmap.mmap(fd, length, prot=mmap.PROT_READ), np.uint8)
    except (FieldError, ValueError) as error:
        report.damaged += 1
        report.say(f"the header does not count, no block can be read: {error}")
        return report
    finally:
        os.close(fd)
    report.data_bytes = header.data_bytes
    table = file[header.table_offset :][: header.data_bytes // UNIT * ENTRY_BYTES]
    found = EntryTable(table).scan()
    report.reserved = len(found.reserved)
    for offset in found.damaged:
        report.damaged += 1
        report.say(f"slot {offset}: the entry does not count")
    canonicals, lost = read_namespaces(directory)
    if lost:
        report.notes.append(f"{lost} bytes of the namespace log belong to no record")
    data = file[header.data_offset :]

    def view(slot: SlotRecord, length: int) -> Bytes:
        return data[slot.offset : slot.offset + length]

    _check_slots(report, found.valid, _specs(report, canonicals), view, verify, progress)
    return report


def check_disk(
    directory: Path,
    records: Iterable[SlotRecord],
    canonicals: Iterable[bytes],
    *,
    dropped: int = 0,
    file_id: bytes = b"",
    verify: bool = False,
    progress: Progress | None = None,
) -> AreaReport:
    """Check a disk directory's slot file against its journal; the caller holds the lock.

    `dropped` counts records that the journal could not read, `file_id` is the file that it names.
    """
    report = AreaReport("disk", damaged=dropped)
    if dropped:
        report.say(f"{dropped} journal records do not count")
    slots = sorted(records, key=lambda record: record.offset)
    try:
        file = DiskFile.open_readonly(directory / SLOTS_NAME)
    except (DiskError, FieldError) as error:
        report.damaged += len(slots)
        report.say(f"{len(slots)} records without a slot file: {error}")
        return report
    report.data_bytes = file.data_bytes
    report.notes += file.notes
    try:
        if file.file_id != file_id:
            report.damaged += len(slots)
            report.say(f"the journal is of another slot file: {len(slots)} records do not count")
            return report
        buffer: Bytes = np.frombuffer(
            mmap.mmap(-1, max((s.slot_bytes for s in slots), default=IO_ALIGN)), np.uint8
        )

        def view(slot: SlotRecord, length: int) -> Bytes:
            whole = buffer[: -(-length // IO_ALIGN) * IO_ALIGN]
            file.read(slot.offset, whole)
            return whole[:length]

        _check_slots(report, slots, _specs(report, canonicals), view, verify, progress)
    finally:
        file.close()
    return report


def _specs(report: AreaReport, canonicals: Iterable[bytes]) -> dict[bytes, NamespaceSpec]:
    specs = {}
    for canonical in canonicals:
        try:
            spec = NamespaceSpec.decode(canonical)
        except FieldError as error:
            report.say(f"a namespace cannot be read: {error}")
            report.damaged += 1
            continue
        specs[spec.id[:TAG_BYTES]] = spec
    report.namespaces = len(specs)
    return specs


def _check_slots(
    report: AreaReport,
    slots: Iterable[SlotRecord],
    specs: Mapping[bytes, NamespaceSpec],
    view: Callable[[SlotRecord, int], Bytes],
    verify: bool,
    progress: Progress | None,
) -> None:
    """`slots` ascend by offset."""
    slots = list(slots)
    end = 0
    for done, slot in enumerate(slots):
        report.blocks += 1
        report.bytes_used += slot.slot_bytes
        problem = _problem(report, slot, specs.get(slot.tag), end, view, verify)
        if problem:
            report.say(f"slot {slot.offset}: block {slot.key.hex()}: {problem}")
        end = max(end, slot.offset + slot.slot_bytes)
        if progress is not None:
            progress(done + 1, len(slots))


def _problem(
    report: AreaReport,
    slot: SlotRecord,
    spec: NamespaceSpec | None,
    end: int,
    view: Callable[[SlotRecord, int], Bytes],
    verify: bool,
) -> str:
    """Counts the slot; what is wrong with it, or nothing."""
    if slot.offset < end or slot.offset + slot.slot_bytes > report.data_bytes:
        report.misplaced += 1
        return "overlaps the slot before it or the end of the data"
    if spec is None:
        report.unknown_namespace += 1
        return f"namespace {slot.tag.hex()} is unknown"
    grid = spec.grid
    if not 1 <= slot.tokens <= grid.block_tokens or slot.slot_bytes < grid.slot_bytes(slot.tokens):
        report.misplaced += 1
        return f"{slot.tokens} tokens do not fit {slot.slot_bytes} bytes of {spec.model}"
    if not verify:
        return ""
    report.verified += 1
    cell_bytes = grid.cell_bytes(slot.tokens)
    try:
        whole = verify_slot(
            view(slot, grid.slot_bytes(slot.tokens)), grid.cells, cell_bytes, slot.root
        )
    except DiskError as error:
        report.corrupt += 1
        return f"cannot be read: {error}"
    if not whole:
        report.corrupt += 1
        return "the payload does not match its checksums"
    return ""
