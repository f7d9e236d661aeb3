"""`kvserver check`: the files of a stopped server, both tiers, without changing any of them."""

from __future__ import annotations

from pathlib import Path

from kvserver.journal.directory import JOURNAL_NAME, Directory
from kvserver.tiers.check import AreaReport, Progress, check_disk, check_host
from kvserver.tiers.errors import ArenaError
from kvserver.tiers.lock import DirectoryLock

EVERYTHING_BYTES = 1 << 62  # records are not judged by a size here: the slot file's is


def check(
    host_dir: Path | None,
    disk_path: Path | None,
    *,
    verify: bool = False,
    progress: Progress | None = None,
) -> list[AreaReport]:
    """One report for each directory that is given.

    DirectoryBusy while a server holds one; ArenaError or JournalError when there is nothing that
    could be looked at.
    """
    reports = []
    if host_dir is not None:
        _require(host_dir)
        with DirectoryLock.acquire(host_dir):
            reports.append(check_host(host_dir, verify=verify, progress=progress))
    if disk_path is not None:
        _require(disk_path)
        with DirectoryLock.acquire(disk_path):
            reports.append(_check_disk(disk_path, verify=verify, progress=progress))
    return reports


def _check_disk(disk_path: Path, *, verify: bool, progress: Progress | None) -> AreaReport:
    journal = Directory.open_readonly(disk_path / JOURNAL_NAME)
    try:
        found = journal.scan(EVERYTHING_BYTES)
        canonicals = list(journal.namespaces().values())
    finally:
        journal.close()
    return check_disk(
        disk_path,
        found.records,
        canonicals,
        dropped=found.dropped,
        file_id=journal.file_id,
        verify=verify,
        progress=progress,
    )


def _require(directory: Path) -> None:
    """A check makes no directory, and no lock in one that is not there."""
    if not directory.is_dir():
        raise ArenaError(f"{directory} is no directory")
