"""Wiring of the tiers beside the host's: slot file and journal, GPU, as the settings say.

Rule: what a tier alone needs (RocksDB, CuPy) is imported when that tier is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvserver import offline
from kvserver.config import Settings
from kvserver.journal.errors import JOURNAL_NAME
from kvserver.observe import logs
from kvserver.tiers.device import DeviceArena, MemoryDevice
from kvserver.tiers.disk import SLOTS_NAME, DiskFile
from kvserver.tiers.lock import DirectoryLock

if TYPE_CHECKING:
    from kvserver.journal.directory import Directory

log = logs.get_logger("server")


def open_disk(
    settings: Settings, parts: contextlib.AsyncExitStack, unmake: list[Callable[[], object]]
) -> tuple[DiskFile, Directory] | None:
    """The disk tier's files, locked until `parts` are closed; None without one. What this start is
    the first to make goes to `unmake`."""
    if not settings.disk_path:
        return None
    from kvserver.journal.directory import Directory

    directory = Path(settings.disk_path)
    directory.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock.acquire(directory)
    parts.callback(lock.release)
    if not any((directory / name).exists() for name in (SLOTS_NAME, JOURNAL_NAME)):
        unmake.append(partial(offline.purge_disk_files, directory))
    file = DiskFile.open(directory / SLOTS_NAME, settings.disk_bytes)
    journal = Directory.open(directory / JOURNAL_NAME, file_id=file.file_id)
    for note in (*file.notes, *journal.notes):
        logs.event(log, "disk_note", logging.WARNING, note=note)
    if file.cold_reason:
        logs.event(log, "disk_cold", reason=file.cold_reason)
    return file, journal


def open_device(settings: Settings, parts: contextlib.AsyncExitStack) -> DeviceArena | None:
    """The device tier's memory, given back with `parts`; None without one."""
    if not settings.device_bytes:
        return None
    arena: DeviceArena
    if settings.device == "memory":
        arena = MemoryDevice(settings.device_bytes)
    else:
        from kvserver.tiers.cuda import CudaDevice

        index = int(settings.device.partition(":")[2] or 0)
        arena = CudaDevice.open(index, settings.device_bytes)
    parts.callback(arena.close)
    logs.event(log, "device_tier_ready", device=arena.name, bytes=arena.data_bytes)
    return arena
