"""What a journal can do to its user, and its name: for those who need not open one.

Rule: this module stands without RocksDB, so that a server without a disk tier does too.
"""

from __future__ import annotations

JOURNAL_NAME = "journal"


class JournalError(Exception):
    """An operation on the journal failed."""

    def __init__(self, operation: str, reason: object) -> None:
        self.operation = operation
        self.reason = str(reason)
        super().__init__(f"journal {operation}: {self.reason}")
