"""What works on a stopped server's files: `kvserver check` and `kvserver purge`.

Rule 1: the directory's lock is taken first, so a running server's files are never touched.
Rule 2: a check changes nothing; a purge removes only files that this project made.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvproto.errors import FieldError
from kvserver.journal.errors import JOURNAL_NAME, JournalError
from kvserver.options import format_bytes
from kvserver.tables import table
from kvserver.tiers.check import AreaReport, Progress, check_disk, check_host
from kvserver.tiers.disk import SLOTS_NAME
from kvserver.tiers.errors import TierError
from kvserver.tiers.host import ARENA_NAME
from kvserver.tiers.lock import LOCK_NAME, DirectoryLock
from kvserver.tiers.purge import purge_host


class OfflineError(Exception):
    """The files cannot be looked at: none there, or a server holds them."""


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if not directory.is_dir():
        raise OfflineError(f"{directory} is no directory")
    try:
        lock = DirectoryLock.acquire(directory)
    except (TierError, OSError) as error:
        raise OfflineError(str(error)) from error
    with lock:
        yield


def check_host_files(directory: Path, *, verify: bool, progress: Progress) -> AreaReport:
    """What the arena of a host directory holds, and what of it is bad."""
    with _locked(directory):
        try:
            return check_host(directory, verify=verify, progress=progress)
        except (TierError, FieldError) as error:
            raise OfflineError(str(error)) from error


def check_disk_files(directory: Path, *, verify: bool, progress: Progress) -> AreaReport:
    """What the slot file and journal of a disk directory hold, and what of it is bad."""
    from kvserver.journal.directory import Directory  # and RocksDB, which nobody else here needs

    with _locked(directory):
        if not (directory / JOURNAL_NAME).is_dir():
            raise OfflineError(f"no journal in {directory}")
        try:
            journal = Directory.open_readonly(directory / JOURNAL_NAME)
        except JournalError as error:
            return AreaReport("disk", damaged=1, lines=[f"disk: {error}"])
        try:
            found = journal.scan(1 << 62)
            return check_disk(
                directory,
                found.records,
                journal.namespaces().values(),
                dropped=found.dropped,
                file_id=journal.file_id,
                verify=verify,
                progress=progress,
            )
        finally:
            journal.close()


def report_table(reports: list[AreaReport]) -> str:
    """One line a tier, then one line for each bad block."""
    header = ("tier", "blocks", "size", "verified", "unfinished", "damaged", "corrupt")
    rows = [
        (
            r.name,
            r.blocks,
            format_bytes(r.bytes_used),
            r.verified,
            r.reserved,
            r.damaged,
            r.corrupt,
            r.unknown_namespace,
            r.misplaced,
        )
        for r in reports
    ]
    lines = [table((*header, "no namespace", "misplaced"), rows)]
    lines += [f"note: {r.name}: {note}" for r in reports for note in r.notes]
    lines += [line for r in reports for line in r.lines]
    return "\n".join(lines)


def refuse_host_purge(directory: Path) -> None:
    """OfflineError where a purge of this host directory would be refused; changes nothing."""
    _refuse_purge(directory, ARENA_NAME, LOCK_NAME)


def refuse_disk_purge(directory: Path) -> None:
    """OfflineError where a purge of this disk directory would be refused; changes nothing."""
    _refuse_purge(directory, SLOTS_NAME, JOURNAL_NAME)


def _refuse_purge(directory: Path, *names: str) -> None:
    if not any((directory / name).exists() for name in names):
        raise OfflineError(f"{directory} is no directory that a server has used")
    if (directory / LOCK_NAME).exists():
        with _locked(directory):
            pass


def purge_host_files(directory: Path) -> int:
    """Remove a host directory's files; the memory that its arena took, in bytes."""
    try:
        return purge_host(directory)
    except (TierError, FieldError, OSError) as error:
        raise OfflineError(str(error)) from error


def purge_disk_files(directory: Path) -> int:
    """Remove slot file and journal of a disk directory; the disk space they took, in bytes."""
    refuse_disk_purge(directory)
    slots = directory / SLOTS_NAME
    with _locked(directory):
        freed = slots.stat().st_blocks * 512 if slots.exists() else 0
        slots.unlink(missing_ok=True)
        for suffix in ("", ".new", ".damaged"):
            shutil.rmtree(directory / (JOURNAL_NAME + suffix), ignore_errors=True)
        (directory / LOCK_NAME).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()  # unless it holds something of others
    return freed
