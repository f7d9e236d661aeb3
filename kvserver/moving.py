"""Wiring of the nixl transport: its worker and the calls of Move, as the settings say."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from kvproto.rdma import rdma_devices
from kvserver.config import Settings
from kvserver.observe import logs
from kvserver.runtime.moves import Moves
from kvserver.runtime.node import Node
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.nixl.process import AgentProcess

AGENTS_MAX = 4  # what `nixl_agents` 0 stands for at most


def agents_for(cores: int, rdma: Sequence[str]) -> int:
    """How many agents move. Without RDMA their threads copy, each on a core; an adapter needs one,
    and each pins the arena for itself."""
    return 1 if rdma else min(AGENTS_MAX, cores)


def start_agent(
    settings: Settings,
    host: HostArena,
    parts: contextlib.AsyncExitStack,
    report: Callable[[str, BaseException], object],
) -> AgentProcess | None:
    """A worker that starts while the hub recovers; closed with `parts`. None where nixl is not on
    offer, TransferError when there can be no process."""
    if not settings.nixl_enabled:
        return None
    agent = AgentProcess(
        host,
        host.lock_fd,
        command=[sys.executable, "-m", "kvserver.nixl_worker"],
        backend=settings.nixl_backend,
        params=dict(pair.split("=", 1) for pair in settings.nixl_params),
        agents=settings.nixl_agents or agents_for(os.cpu_count() or 1, rdma_devices()),
        stuck_s=settings.nixl_rebuild_ms / 1000,
        nice=settings.tcp_worker_nice,
        report=report,
        log=logs.get_logger("nixl"),
    )
    parts.push_async_callback(agent.close)
    agent.spawn()
    return agent


async def open_moves(
    agent: AgentProcess,
    *,
    settings: Settings,
    node: Node,
    host: HostArena,
    liveness: Liveness,
    parts: contextlib.AsyncExitStack,
) -> Moves:
    """Running, and closed with `parts`. TransferError with the reason when that cannot be."""
    moves = Moves(
        node.driver,
        node.sessions,
        host=host,
        liveness=liveness,
        permits=node.permits,
        move_s_max=settings.nixl_move_ms / 1000,
    )
    parts.push_async_callback(moves.close)
    await moves.start(agent)
    return moves
