"""What a call of the client can raise.

Every error is a KVError: `kind` says what happened, `field` which value or limit it is about,
`limit` what would have been accepted. The server's refusals arrive as gRPC statuses with the
trailing metadata `kv-kind`, `kv-field`, `kv-limit`, or in a refusal with the same three over the
shm socket; `from_rpc` and `from_refusal` map them here, once.

    Unavailable       the hub cannot be reached or is draining; the client reconnects by itself
    DeadlineExceeded  no answer within the call's deadline
    InvalidArgument   a value is wrong; `field` names it
    LimitExceeded     a limit was reached, or no space is left (`kind` is "no_space" then)
    NotFound          an unknown namespace, reservation or session
    Gone              what the call stands on ended with its session (lost server, expiry)
    Conflict          against the state of things
    Unsupported       no transport that both sides can use, or a use that cannot work
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from kvproto.calls import Refusal
from kvproto.errors import FieldError

if TYPE_CHECKING:
    from kvclient.transfer.direct import Pin


class KVError(Exception):
    """Base of all errors of this client. `kind`, `field` and `limit` are plain text.

    `pin` is None, or what of the caller's registered memory a hub may still read or write.
    """

    kind_default = "internal"

    def __init__(self, message: str, *, kind: str = "", field: str = "", limit: str = "") -> None:
        super().__init__(message)
        self.pin: Pin | None = None
        self.kind = kind or self.kind_default
        self.field = field
        self.limit = limit

    def pinned(self, pin: Pin) -> None:
        """The call is over, but a hub may still move this."""
        self.pin = pin
        self.args = (f"{self.args[0]}; {pin.nbytes} bytes of registered memory stay pinned",)


class Unavailable(KVError):
    kind_default = "unavailable"


class DeadlineExceeded(KVError):
    kind_default = "deadline"


class InvalidArgument(KVError):
    kind_default = "invalid"

    @classmethod
    def of(cls, field: str, value: object, limit: str) -> InvalidArgument:
        """The error for `value` of `field`, where `limit` would have been accepted."""
        return cls.from_field(FieldError(field, value, limit))

    @classmethod
    def from_field(cls, error: FieldError) -> InvalidArgument:
        return cls(str(error), field=error.field, limit=error.limit)


class LimitExceeded(KVError):
    kind_default = "limit"


class NotFound(KVError):
    kind_default = "not_found"


class Gone(NotFound):
    kind_default = "gone"


class Conflict(KVError):
    kind_default = "conflict"


class Unsupported(KVError):
    kind_default = "unsupported"


_BY_CODE: dict[grpc.StatusCode, type[KVError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    # The channel closed or the stream was reset under the call: the hub went away.
    grpc.StatusCode.CANCELLED: Unavailable,
}
_BY_NUMBER: dict[int, type[KVError]] = {code.value[0]: kind for code, kind in _BY_CODE.items()}


def from_rpc(error: grpc.RpcError, *, what: str, address: str) -> KVError:
    """The typed error for a failed call `what` to the hub at `address`."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() or "") if hasattr(error, "details") else str(error)
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    metadata = dict(trailing or ())
    refusal = Refusal(
        details or code.name,
        _text(metadata.get("kv-kind")),
        _text(metadata.get("kv-field")),
        _text(metadata.get("kv-limit")),
    )
    return from_refusal(code, refusal, what=what, address=address)


def from_refusal(
    code: grpc.StatusCode | int, refusal: Refusal, *, what: str, address: str
) -> KVError:
    """The same for a refusal that came with a status, or with a status's number."""
    kind = _BY_NUMBER.get(code, KVError) if isinstance(code, int) else _BY_CODE.get(code, KVError)
    return kind(
        f"{what} at {address}: {refusal.message}",
        kind=refusal.kind,
        field=refusal.field,
        limit=refusal.limit,
    )


def _text(value: str | bytes | None) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value or ""


def late(what: str, address: str, deadline_s: float) -> DeadlineExceeded:
    """The error for a call that did not end within `deadline_s` seconds."""
    return DeadlineExceeded(
        f"{what} at {address}: no answer within {deadline_s:.3g} s", field="deadline_s"
    )


# What `asyncio.wait_for` and `asyncio.timeout` raise.
TIMEOUTS = (TimeoutError, asyncio.TimeoutError)
