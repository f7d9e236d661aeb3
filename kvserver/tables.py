"""Text tables of what the Admin service answers, for people at a terminal."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from google.protobuf.json_format import MessageToDict

from kvproto.v1 import kvserver_pb2 as pb
from kvserver.options import format_bytes

_TIERS = {pb.TIER_DEVICE: "device", pb.TIER_HOST: "host", pb.TIER_DISK: "disk"}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their longest cell; all but the first column are right-aligned."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def stats(reply: pb.StatsReply) -> str:
    """Everything of a StatsReply, one table a topic."""
    parts = [
        f"kvserver {reply.server_version}, epoch {reply.epoch},"
        f" up {_duration(reply.uptime_ms)}{', draining' if reply.draining else ''};"
        f" {reply.blocks} blocks, {reply.blocks_filling} filling,"
        f" {reply.blocks_announced} announced,"
        f" {format_bytes(reply.spill_queue_bytes)} to be written to disk"
        f"{'' if reply.native else '; without native code'}",
        _tiers(reply.tiers),
    ]
    if reply.sessions:
        parts.append(_sessions(reply.sessions))
    if reply.namespaces:
        parts.append(namespaces(reply.namespaces))
    moved = sorted((name, value) for name, value in reply.counters.items() if value)
    if moved:
        parts.append(table(("counter", "value"), moved))
    if len(moved) < len(reply.counters):
        parts.append(f"{len(reply.counters) - len(moved)} counters are 0 (--json shows all)")
    return "\n\n".join(parts)


def _tiers(tiers: Iterable[pb.TierStats]) -> str:
    header = ("tier", "used", "ready", "total", "slots", "free", "filling", "committed")
    rows = [
        (
            _TIERS.get(t.tier, str(t.tier)),
            format_bytes(t.bytes_used),
            format_bytes(t.bytes_ready),
            format_bytes(t.bytes_total),
            t.slots,
            t.slots_free,
            t.slots_filling,
            t.slots_committed,
            t.slots_copying,
            t.slots_quarantined,
            (f"up, {t.medium}" if t.medium else "up") if t.up else f"DOWN: {t.note}",
        )
        for t in tiers
    ]
    return table((*header, "copying", "quarantined", "state"), rows)


def _sessions(sessions: Iterable[pb.SessionStats]) -> str:
    header = ("session", "tenant", "clients", "reservations", "leases", "idle")
    rows = [
        (
            s.client_name or f"{s.session:x}",
            s.tenant or "-",
            s.clients,
            s.reservations,
            s.leases,
            _duration(s.idle_ms),
            ",".join(s.transports) or "-",
            role(s.role) if s.HasField("role") else "-",
        )
        for s in sessions
    ]
    return table((*header, "transports", "role"), rows)


def role(message: pb.Role) -> str:
    """What an engine does, as kv_role spells it."""
    words = {
        (True, True): "kv_both",
        (True, False): "kv_producer",
        (False, True): "kv_consumer",
        (False, False): "neither",
    }
    return words[message.produces, message.consumes]


def namespaces(items: Sequence[pb.NamespaceStats]) -> str:
    """One line a namespace; a near miss has a line of its own below."""
    header = ("namespace", "model", "dtype", "encoding", "tenant", "blocks", "size", "hits")
    rows = [
        (
            n.namespace_id.hex()[:16],
            n.spec.model,
            n.spec.kv_dtype,
            n.spec.encoding,
            n.spec.tenant or "-",
            n.blocks,
            format_bytes(n.bytes),
            n.hits,
            n.misses,
        )
        for n in items
    ]
    text = table((*header, "misses"), rows)
    near = [f"near miss: {n.namespace_id.hex()[:16]}: {m}" for n in items for m in n.near_misses]
    return "\n".join([text, *near])


def watch(reply: pb.WatchReply) -> list[dict[str, object]]:
    """What one message of a watch tells, as objects for JSON; nothing for an idle one."""
    name = reply.namespace_id.hex()
    if reply.kind == pb.WATCH_KIND_RESET:
        return [{"event": "reset", "reason": reply.reason, "epoch": reply.epoch}]
    if reply.kind == pb.WATCH_KIND_SYNCED:
        return [{"event": "synced"}]
    if reply.kind == pb.WATCH_KIND_FORGOTTEN:
        return [{"event": "forgotten", "namespace": name}]
    told: list[dict[str, object]] = []
    if reply.HasField("spec"):
        spec = MessageToDict(reply.spec, preserving_proto_field_name=True)
        spec["weights"] = reply.spec.weights.hex()
        spec["adapter"] = reply.spec.adapter.hex()
        told.append({"event": "namespace", "namespace": name, "spec": spec})
    tokens = struct.unpack(f"<{len(reply.tiers)}I", reply.tokens)
    for at, bits in enumerate(reply.tiers):
        block: dict[str, object] = {
            "event": "block" if bits else "gone",
            "namespace": name,
            "hash": reply.hashes[32 * at : 32 * at + 32].hex(),
        }
        if bits:
            block["parent"] = reply.parents[32 * at : 32 * at + 32].hex()
            block["tokens"] = tokens[at]
            block["tiers"] = [word for tier, word in _TIERS.items() if bits >> (tier - 1) & 1]
        told.append(block)
    return told


def _duration(milliseconds: int) -> str:
    seconds = milliseconds // 1000
    if seconds < 60:
        return f"{milliseconds / 1000:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
