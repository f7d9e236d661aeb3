"""What the world can do to a tier. Values of the configuration raise kvproto's FieldError."""

from __future__ import annotations

import os
from pathlib import Path


class TierError(Exception):
    """A tier's medium failed or is not available."""


class DirectoryBusy(TierError):
    """Another process holds the directory's lock."""

    def __init__(self, directory: Path, holder: str) -> None:
        self.directory = directory
        self.holder = holder
        super().__init__(f"{directory} is in use by {holder or 'another process'}")


class ArenaError(TierError):
    """The host arena cannot be used as asked."""


class DiskError(TierError):
    """An operation on the slot file failed; `errno` is the system's."""

    def __init__(self, operation: str, path: Path, errno_: int) -> None:
        self.operation = operation
        self.path = path
        self.errno = errno_
        super().__init__(f"{operation} of {path}: {os.strerror(errno_)}")
