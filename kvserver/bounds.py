"""An operator's settings as the limits that the core keeps and that Hello tells."""

from __future__ import annotations

from kvproto.v1 import kvserver_pb2 as pb
from kvserver.config import Settings
from kvserver.core.limits import HubConfig

SPILL_COPIES_MAX = 32  # in flight: what may share one sync


def hub_config(settings: Settings, *, host_bytes: int) -> HubConfig:
    """The core's limits; `host_bytes` is the data area that the arena has."""
    return HubConfig(
        host_bytes=host_bytes,
        disk_bytes=settings.disk_bytes,
        device_bytes=settings.device_bytes,
        session_ttl=settings.session_ttl_ms / 1000,
        reservation_ttl_max=settings.reservation_ms_max / 1000,
        lease_max=settings.lease_ms_max / 1000,
        tail_ttl=settings.tail_ttl_ms / 1000,
        tail_bytes_max=settings.tail_bytes_max,
        announce_ttl_max=settings.announce_ttl_ms_max / 1000,
        wait_max=max(settings.wait_ms_max, 1) / 1000,
        sessions_max=settings.sessions_max,
        clients_per_session_max=settings.clients_per_session_max,
        namespaces_max=settings.namespaces_max,
        keys_per_call_max=settings.keys_per_call_max,
        reservations_max=settings.reservations_max,
        leases_max=settings.leases_max,
        streams_max=settings.streams_max,
        window_bytes_max=settings.window_bytes_max,
        spill_lag_bytes_max=settings.spill_queue_bytes_max,
        spill_copies_max=SPILL_COPIES_MAX,
    )


def limits_of(settings: Settings, config: HubConfig, *, slot_bytes_max: int) -> pb.Limits:
    """What Hello tells a client."""
    return pb.Limits(
        keys_per_call_max=settings.keys_per_call_max,
        reservation_ms_max=settings.reservation_ms_max,
        lease_ms_max=settings.lease_ms_max,
        wait_ms_max=settings.wait_ms_max,
        window_bytes_max=settings.window_bytes_max,
        heartbeat_ms=settings.heartbeat_ms,
        session_ttl_ms=settings.session_ttl_ms,
        announce_ttl_ms_max=settings.announce_ttl_ms_max,
        writers_per_block_max=config.writers_per_block_max,
        slot_bytes_max=slot_bytes_max,
        commit_names=True,
    )
