"""Handlers of the calls by which the hub moves bytes for a client: Attach, Move, Settle.

The rules of `kvserver.service.cache` hold here too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvproto.errors import FieldError
from kvproto.frames import PERMIT_BYTES, Op, Place
from kvproto.grid import CELLS_MAX, HEADS_MAX, LAYERS_MAX, Region
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.extents import COLUMNS, Extents
from kvserver.runtime.moves import KEY_BYTES, MOVE_BYTES_MAX, Moves
from kvserver.runtime.node import Node
from kvserver.runtime.orders import Order
from kvserver.service import convert
from kvserver.service.calls import Servicer, unary

CELL_BYTES_MAX = 1 << 40


class RemoteCalls(Servicer):
    """Mixed into the Cache service, which sets `_node` and `_limits`."""

    _node: Node
    _limits: pb.Limits

    @unary
    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachReply:
        moves = self._moves()
        session = self._node.sessions.get(request.session)
        client = session.check_client(request.client)
        rows = convert.numbers_from("extents", request.extents, "<u8")
        if rows.size % COLUMNS:
            raise FieldError("extents", rows.size, f"{COLUMNS} numbers for each extent")
        key = await moves.attach(
            session,
            client,
            metadata=request.metadata,
            extents=Extents(rows.reshape(-1, COLUMNS).astype(np.uint64)),
        )
        return pb.AttachReply(
            key=key,
            move_ms_max=convert.milliseconds(moves.move_s_max),
            move_bytes_max=MOVE_BYTES_MAX,
        )

    @unary
    async def Move(self, request: pb.MoveRequest, context: Any) -> pb.MoveReply:
        moves = self._moves()
        session = self._node.sessions.get(request.session)
        client = session.check_client(request.client)
        moved = await moves.move(session, client, order_from(request, self._limits))
        return pb.MoveReply(
            statuses=moved.statuses.tobytes(), trailers=moved.trailers, terminal=moved.terminal
        )

    @unary
    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleReply:
        moves = self._moves()
        self._node.sessions.get(request.session)
        key = convert.id_from("key", request.key, length=KEY_BYTES)
        numbers = convert.numbers_from(
            "moves", request.moves, "<u8", count_max=self._limits.keys_per_call_max
        ).tolist()
        running = await moves.settle(request.client, key, numbers)
        return pb.SettleReply(running=bytes(running))

    def _moves(self) -> Moves:
        if self._node.moves is None:
            raise CoreError(ErrorKind.INVALID, "this hub does not offer nixl", field="transport")
        return self._node.moves


def _whole_pieces(total: int, count: int, region: Region, cell_bytes: list[int]) -> bool:
    """Whether so many addresses cut each of `count` slots' regions into equal pieces."""
    pieces, rest = divmod(total, count)
    if rest or pieces in (1, region.layers):
        return not rest
    a_cell, rest = divmod(pieces, region.cells)
    return a_cell > 0 and not rest and all(size % a_cell == 0 for size in cell_bytes)


def order_from(request: pb.MoveRequest, limits: pb.Limits) -> Order:
    """The Move that a message asks for. FieldError names what cannot be right."""
    if request.op not in (Op.WRITE, Op.READ):
        raise FieldError("op", request.op, "1 (write) or 2 (read)")
    if request.move == 0:
        raise FieldError("move", 0, "above 0")
    layers, heads = request.layers, request.heads
    if not (1 <= layers <= LAYERS_MAX and 1 <= heads <= HEADS_MAX and layers * heads <= CELLS_MAX):
        raise FieldError("layers * heads", (layers, heads), f"a grid of at most {CELLS_MAX} cells")
    granted, region = convert.region_from(request.granted), convert.region_from(request.region)
    if granted.layer_stop > layers or granted.head_stop > heads:
        raise FieldError("granted", granted, f"within {layers} x {heads} cells")
    if not granted.contains(region):
        raise FieldError("region", region, f"within what was granted, {granted}")
    holds = convert.numbers_from(
        "holds", request.holds, "<u8", count_max=limits.keys_per_call_max
    ).tolist()
    count = len(holds)
    if not count:
        raise FieldError("holds", 0, "at least one slot")

    def numbers(name: str) -> list[int]:
        raw = getattr(request, name)
        found: list[int] = convert.numbers_from(name, raw, "<u8", count=count).tolist()
        return found

    offsets, generations = numbers("offsets"), numbers("generations")
    cell_bytes = numbers("cell_bytes")
    if not all(1 <= size < CELL_BYTES_MAX for size in cell_bytes):
        raise FieldError("cell_bytes", cell_bytes, "above 0")
    if not all(offset < 1 << 62 for offset in offsets):
        raise FieldError("offsets", offsets, "within the arena")
    if len(request.permits) != count * PERMIT_BYTES:
        raise FieldError("permits", len(request.permits), f"{PERMIT_BYTES} bytes for each slot")
    addresses = convert.numbers_from("addresses", request.addresses, "<u8")
    if not _whole_pieces(addresses.size, count, region, cell_bytes):
        limit = f"for each of {count} slots one, one a layer, or one or more equal ones a cell"
        raise FieldError("addresses", addresses.size, limit)
    checksums = None
    if request.op == Op.WRITE:
        checksums = (
            convert.numbers_from("checksums", request.checksums, "<u8", count=count * region.cells)
            .astype(np.uint64)
            .reshape(count, region.cells)
        )
    permits = request.permits
    places = [
        Place(
            holds[at], offsets[at], generations[at], cell_bytes[at], layers, heads, granted,
            permits[at * PERMIT_BYTES : (at + 1) * PERMIT_BYTES],
        )
        for at in range(count)
    ]  # fmt: skip
    return Order(
        request.move,
        Op(request.op),
        region,
        places,
        addresses.astype(np.uint64).reshape(count, -1),
        checksums,
        request.deadline_ms / 1000,
    )
