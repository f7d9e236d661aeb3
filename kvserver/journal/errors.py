"""What the world can do to the journal."""

from __future__ import annotations


class JournalError(Exception):
    """An operation on the journal failed; it refuses writes until `Directory.reopen`."""

    def __init__(self, operation: str, reason: object) -> None:
        self.operation = operation
        self.reason = str(reason)
        super().__init__(f"journal {operation}: {self.reason}")
