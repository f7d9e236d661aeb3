"""Wiring of the nixl transport: library, agent and the calls of Move, as the settings say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from kvproto import nixlib
from kvserver.config import Settings
from kvserver.observe import logs
from kvserver.runtime.moves import Moves
from kvserver.runtime.node import Node
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.base import TransferError
from kvserver.transfer.hashing import Hashing
from kvserver.transfer.nixl import NixlAgent


async def open_moves(
    *,
    settings: Settings,
    node: Node,
    host: HostArena,
    liveness: Liveness,
    parts: contextlib.AsyncExitStack,
    report: Callable[[str, BaseException], object],
) -> Moves:
    """Running, and closed with `parts`. TransferError with the reason when that cannot be."""
    try:
        nixlib.load()
    except nixlib.NixlError as error:
        raise TransferError(f"nixl_enabled: {error}") from error
    moves = Moves(
        node.driver,
        node.sessions,
        host=host,
        liveness=liveness,
        permits=node.permits,
        hashing=Hashing(
            host, host.slot, nice=settings.tcp_worker_nice, log=logs.get_logger("nixl")
        ),
        move_s_max=settings.nixl_move_ms / 1000,
    )
    parts.push_async_callback(moves.close)
    await moves.start(
        NixlAgent(
            host.buffer,
            backend=settings.nixl_backend,
            params=dict(pair.split("=", 1) for pair in settings.nixl_params),
            rebuild_s=settings.nixl_rebuild_ms / 1000,
            rebuilt=moves.rebuilt,
            report=report,
            log=logs.get_logger("nixl"),
            nice=settings.tcp_worker_nice,
        )
    )
    return moves
