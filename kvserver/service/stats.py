"""The hub's books as a StatsReply: what `kvserver stats` and /metrics show.

Rule: counters are the core's, plus those that only the shell can count.
"""

from __future__ import annotations

import time

import kvserver
from kvproto import cells
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.core.stats import HubStats, NamespaceStats, TierStats
from kvserver.runtime.node import Node
from kvserver.service import convert


def stats_reply(node: Node, incidents: int) -> pb.StatsReply:
    stats = node.driver.stats()
    return pb.StatsReply(
        server_version=kvserver.__version__,
        epoch=node.epoch,
        uptime_ms=convert.milliseconds(time.monotonic() - node.started),
        draining=stats.draining,
        tiers=[
            _tier(tier, books, node.medium(tier))
            for tier, books in stats.tiers.items()
            if books.bytes_total
        ],
        sessions=_sessions(node, stats),
        counters={**stats.counters, **node.counters(), "incidents": incidents},
        blocks=stats.blocks,
        blocks_filling=stats.filling,
        blocks_announced=stats.announced,
        spill_queue_bytes=stats.spill_queue_bytes,
        namespaces=[_namespace(n) for n in stats.namespaces],
        native=cells.NATIVE,
    )


def namespace_stats(node: Node) -> list[pb.NamespaceStats]:
    return [_namespace(n) for n in node.driver.stats().namespaces]


def _tier(tier: int, books: TierStats, medium: str) -> pb.TierStats:
    return pb.TierStats(
        tier=pb.Tier.Name(tier),
        bytes_total=books.bytes_total,
        bytes_ready=books.bytes_ready,
        bytes_used=books.bytes_used,
        slots=books.slots,
        slots_free=books.free,
        slots_filling=books.filling,
        slots_committed=books.committed,
        slots_copying=books.target,
        slots_quarantined=books.quarantined,
        up=books.up,
        note=books.note,
        medium=medium,
    )


def _sessions(node: Node, stats: HubStats) -> list[pb.SessionStats]:
    replies = []
    for books in stats.sessions:
        known = node.sessions.find(books.session)
        reply = pb.SessionStats(
            session=books.session,
            tenant=books.tenant,
            clients=books.clients,
            reservations=books.reservations,
            leases=books.leases,
            idle_ms=convert.milliseconds(books.idle),
        )
        if known is not None:
            reply.client_name = known.name
            reply.transports.extend(sorted(known.transports))
            if known.follower is not None:
                reply.role.CopyFrom(convert.role_to(known.follower.now))
                reply.ceiling.CopyFrom(convert.role_to(known.follower.ceiling))
        replies.append(reply)
    return replies


def _namespace(books: NamespaceStats) -> pb.NamespaceStats:
    return pb.NamespaceStats(
        namespace_id=books.spec.id,
        spec=convert.spec_to(books.spec),
        blocks=books.blocks,
        bytes=books.bytes,
        hits=books.hits,
        misses=books.misses,
        near_misses=books.near_misses,
    )
