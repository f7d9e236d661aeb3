"""Messages to core's words and back; errors to gRPC statuses. Nothing else does either.

Rule 1: whatever a client may get wrong is refused here or in the core with the field's name as the
.proto spells it and the limit; nothing is clamped, rounded or guessed.
Rule 2: STATUSES is the one map from a kind of error to a status.
Rule 3: functions are pure; packed fields are read through NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import grpc
import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError
from kvproto.grid import HEADS_MAX, LAYERS_MAX, Grid, Region
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import HASH_BYTES
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import (
    Need,
    Place,
)
from kvserver.runtime.roles import Role
from kvserver.runtime.watches import Kind, Step

NO_OFFSET = (1 << 64) - 1
NAME_BYTES_MAX = 128
NEEDS_MAX = 64
_NEED_KINDS = {
    pb.LayerGroupNeed.EVERY_BLOCK: "every",
    pb.LayerGroupNeed.LAST_BLOCKS: "last",
    pb.LayerGroupNeed.LAST_ONLY: "state",
}

STATUSES = {
    ErrorKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}

Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]


def status_of(error: CoreError | FieldError) -> Status:
    """Status, message and trailing metadata (kv-kind, kv-field, kv-limit) of a refusal."""
    kind = error.kind if isinstance(error, CoreError) else ErrorKind.INVALID
    trailers = (
        ("kv-kind", kind.value),
        ("kv-field", _header(error.field)),
        ("kv-limit", _header(error.limit)),
    )
    return STATUSES[kind], str(error), trailers


def _header(value: object) -> str:
    """Metadata values are printable ASCII."""
    return str(value).encode("ascii", "replace").decode().replace("\n", " ")[:512]


def limit_error(name: str, value: object, limit: int | str) -> CoreError:
    return CoreError(
        ErrorKind.LIMIT, f"{value} is over the limit {name} = {limit}", field=name, limit=limit
    )


# ---- packed fields -------------------------------------------------------------------------


def hashes_from(field: str, raw: bytes, *, count_max: int) -> list[bytes]:
    """N x 32 bytes. INVALID when ragged, LIMIT beyond keys_per_call_max."""
    if len(raw) % HASH_BYTES:
        raise FieldError(field, len(raw), f"a multiple of {HASH_BYTES} bytes long")
    count = len(raw) // HASH_BYTES
    if count > count_max:
        raise limit_error("keys_per_call_max", f"{field} with {count} keys", count_max)
    return [raw[i : i + HASH_BYTES] for i in range(0, len(raw), HASH_BYTES)]


def some_hashes_from(field: str, raw: bytes, *, count_max: int) -> list[bytes]:
    """The same, and at least one."""
    if not raw:
        raise FieldError(field, 0, "at least one key")
    return hashes_from(field, raw, count_max=count_max)


def numbers_from(
    field: str, raw: bytes, dtype: str, *, count: int | None = None, count_max: int | None = None
) -> npt.NDArray[np.unsignedinteger]:
    """A packed list of little-endian numbers, of exactly `count` or at most `count_max`."""
    width = np.dtype(dtype).itemsize
    if len(raw) % width:
        raise FieldError(field, len(raw), f"a multiple of {width} bytes long")
    length = len(raw) // width
    if count is not None and length != count:
        raise FieldError(field, length, f"{count} numbers")
    if count_max is not None and length > count_max:
        raise limit_error("keys_per_call_max", f"{field} with {length} numbers", count_max)
    array: npt.NDArray[np.unsignedinteger] = np.frombuffer(raw, dtype=dtype)
    return array


def pack(values: Iterable[int], dtype: str) -> bytes:
    return np.fromiter(values, dtype=dtype).tobytes()


# ---- single fields ---------------------------------------------------------------------------


def text_from(field: str, value: str, *, bytes_max: int = NAME_BYTES_MAX) -> str:
    if len(value.encode()) > bytes_max:
        raise FieldError(field, value, f"at most {bytes_max} bytes")
    return value


def id_from(field: str, raw: bytes, *, length: int) -> bytes:
    if len(raw) != length:
        raise FieldError(field, raw, f"{length} bytes")
    return raw


def seconds_from(name: str, milliseconds: int, *, maximum_ms: int, zero: int = 0) -> float:
    """A duration in seconds; 0 stands for `zero` milliseconds. LIMIT beyond `maximum_ms`."""
    if milliseconds > maximum_ms:
        raise limit_error(name, f"{milliseconds} ms", maximum_ms)
    return (milliseconds or zero) / 1000


def milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def region_from(message: pb.Region) -> Region:
    """A region of some grid: non-empty, within what any grid may have. The core knows which."""
    for axis, start, stop, limit in (
        ("layer", message.layer_start, message.layer_stop, LAYERS_MAX),
        ("head", message.head_start, message.head_stop, HEADS_MAX),
    ):
        if not start < stop <= limit:
            raise FieldError(f"region.{axis}s", (start, stop), f"non-empty and within [0, {limit})")
    return Region(message.layer_start, message.layer_stop, message.head_start, message.head_stop)


def region_within(message: pb.Region, grid: Grid) -> Region:
    return grid.check(region_from(message))


def needs_from(messages: Sequence[pb.LayerGroupNeed], grid: Grid) -> tuple[Need, ...]:
    if len(messages) > NEEDS_MAX:
        raise FieldError("need", len(messages), f"at most {NEEDS_MAX} layer groups")
    needs = []
    for message in messages:
        kind = _NEED_KINDS.get(message.kind)
        if kind is None:
            raise FieldError("need.kind", message.kind, "EVERY_BLOCK, LAST_BLOCKS or LAST_ONLY")
        if kind == "last" and message.blocks == 0:
            raise FieldError("need.blocks", 0, "at least 1 with LAST_BLOCKS")
        region = None
        if message.HasField("region"):
            region = region_within(message.region, grid)
        needs.append(Need(kind=kind, blocks=message.blocks, region=region))
    return tuple(needs)


# ---- namespaces ------------------------------------------------------------------------------


def spec_from(message: pb.NamespaceSpec) -> NamespaceSpec:
    """FieldError with the field as `spec.NAME`."""
    try:
        return NamespaceSpec(
            format_version=message.format_version,
            model=message.model,
            weights=message.weights,
            adapter=message.adapter,
            kv_dtype=message.kv_dtype,
            encoding=message.encoding,
            block_tokens=message.block_tokens,
            page_tokens=message.page_tokens,
            layers=message.layers,
            kv_heads=message.kv_heads,
            page_bytes=message.page_bytes,
            tenant=message.tenant,
            attributes=dict(message.attributes),
        )
    except FieldError as error:
        raise FieldError(f"spec.{error.field}", error.value, error.limit) from None


def spec_to(spec: NamespaceSpec) -> pb.NamespaceSpec:
    return pb.NamespaceSpec(
        format_version=spec.format_version,
        model=spec.model,
        weights=spec.weights,
        adapter=spec.adapter,
        kv_dtype=spec.kv_dtype,
        encoding=spec.encoding,
        block_tokens=spec.block_tokens,
        page_tokens=spec.page_tokens,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        page_bytes=spec.page_bytes,
        tenant=spec.tenant,
        attributes=dict(spec.attributes),
    )


def geometry_to(grid: Grid, slot_bytes: int) -> pb.Geometry:
    return pb.Geometry(
        cell_bytes=grid.cell_bytes(),
        payload_bytes=grid.payload_bytes(),
        trailer_bytes=grid.trailer_bytes,
        slot_bytes=slot_bytes,
    )


# ---- watching --------------------------------------------------------------------------------


def watch_to(step: Step, introduced: set[bytes]) -> pb.WatchReply:
    """A watcher's step; `introduced` are the namespaces whose spec it knows, and is kept so."""
    reply = pb.WatchReply(kind=pb.WatchKind.ValueType(step.kind), reason=step.reason)
    if step.kind is Kind.RESET:
        introduced.clear()
    segment = step.segment
    if segment is None:
        return reply
    reply.namespace_id = segment.spec.id
    if segment.forgotten:
        introduced.discard(segment.spec.id)
        return reply
    if segment.spec.id not in introduced:
        introduced.add(segment.spec.id)
        reply.spec.CopyFrom(spec_to(segment.spec))
    reply.hashes, reply.parents = segment.hashes, segment.parents
    reply.tokens, reply.tiers = segment.tokens, segment.tiers
    return reply


# ---- roles -----------------------------------------------------------------------------------


def role_from(message: pb.Role) -> Role:
    return Role(produces=message.produces, consumes=message.consumes)


def role_to(role: Role) -> pb.Role:
    return pb.Role(produces=role.produces, consumes=role.consumes)


# ---- answers ---------------------------------------------------------------------------------


def places_to(places: Sequence[Place | None]) -> tuple[bytes, bytes]:
    """Offsets and generations, packed; a missing place is all ones and generation 0."""
    offsets = pack((NO_OFFSET if p is None else p.offset for p in places), "<u8")
    generations = pack((0 if p is None else p.generation for p in places), "<u8")
    return offsets, generations
