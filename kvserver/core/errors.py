"""What the core refuses, and why. One error, one kind, with context.

The service maps a kind to a gRPC status once (`kvserver.service.convert`); nothing else does.
"""

from __future__ import annotations

from enum import Enum


class ErrorKind(Enum):
    INVALID = "invalid"  # the caller got a value wrong
    NOT_FOUND = "not_found"  # unknown session, namespace, reservation
    LIMIT = "limit"  # a configured limit was reached; `field` names it
    NO_SPACE = "no_space"  # the block can never fit, or does not now
    CONFLICT = "conflict"  # against the state of things
    UNAVAILABLE = "unavailable"  # draining or starting


class CoreError(Exception):
    """A refusal. `field` names what is wrong or which limit was hit, `limit` what is allowed."""

    def __init__(
        self, kind: ErrorKind, message: str, *, field: str = "", limit: int | str = ""
    ) -> None:
        self.kind = kind
        self.field = field
        self.limit = limit
        super().__init__(message)


class InvariantError(AssertionError):
    """A bug of ours: an impossible transition or books that do not balance. Carries the story."""
