"""What an operator of a server may set. Each option is described once, here, and nowhere else.

An option is taken from the command line, else from the environment (`KVSERVER_` and its name in
capitals), else from the TOML file (flat, `name = value`), else it has its default. How values are
read and checked is in `options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvserver import options
from kvserver.options import (
    MS_MAX,
    ConfigError,
    address,
    check,
    choice,
    count,
    flag,
    medium,
    names,
    option,
    optional_address,
    pairs,
    path,
    size,
    word,
)

ENVIRONMENT_PREFIX = "KVSERVER_"
OTHER_VARIABLES = ("CONFIG", "ADDRESS", "NATIVE", "FAILPOINTS", "PROXY_", "TEST_", "BENCH_")
"""That begin like this server's, and are read elsewhere: by name, or all that begin like it."""
HOST_DIR_BYTES_MAX = 88  # a Unix socket's path holds 107, and the socket lies in this directory

_SERVING, _NIXL, _HOST, _DISK, _DEVICE, _LIMITS, _LOGS = (
    "serving",
    "nixl",
    "host tier (shared memory)",
    "disk tier",
    "device tier",
    "limits",
    "logs",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options. Build it with `load`, or directly (tests); either way `check` holds."""

    listen: str = option(
        "127.0.0.1:50051", "address of the gRPC service, host:port", address, _SERVING
    )
    metrics_listen: str = option(
        "127.0.0.1:50052",
        "address of the metrics over HTTP (/metrics), empty for none",
        optional_address,
        _SERVING,
    )
    drain_ms: int = option(
        10_000,
        "how long SIGTERM waits for running calls and the write-behind",
        count(0, MS_MAX),
        _SERVING,
    )
    shm_tenants: tuple[str, ...] = option(
        ("*",),
        "tenants that may map the host arena, which shows them every tenant's blocks;"
        " * is everybody, an empty name the default tenant",
        names,
        _SERVING,
    )
    nixl_enabled: bool = option(
        False, "offer nixl (RDMA) to clients; needs the extra kvserver[nixl]", flag, _NIXL
    )
    nixl_backend: str = option(
        "UCX", "the NIXL backend: UCX, LIBFABRIC or another that its wheel has", word, _NIXL
    )
    nixl_params: tuple[str, ...] = option(
        (),
        "parameters of the backend, name=value; UCX reads its environment (UCX_TLS,"
        " UCX_NET_DEVICES) as well",
        pairs,
        _NIXL,
    )
    nixl_agents: int = option(
        0,
        "agents that move, each a thread of its own; 0: one where there is an RDMA device, else one"
        " a core and at most 4",
        count(0, 16),
        _NIXL,
    )
    nixl_move_ms: int = option(
        10_000, "how long one move may take before it fails", count(1, MS_MAX), _NIXL
    )
    nixl_rebuild_ms: int = option(
        120_000,
        "a transfer that has not ended after this long costs every client the agent, which is made"
        " anew: the last resort against slots that stay in quarantine",
        count(1, MS_MAX),
        _NIXL,
    )
    tcp_listen: str = option(
        "127.0.0.1:50053",
        "address of the tcp transport's data port, empty for none",
        optional_address,
        _SERVING,
    )
    tcp_workers: int = option(
        1,
        "processes that move the bytes of the tcp transport; 0: threads of the server",
        count(0, 64),
        _SERVING,
    )
    tcp_worker_nice: int = option(
        10,
        "how far these processes, and the one that moves for nixl, step back behind the server"
        " itself where cores are short",
        count(0, 19),
        _SERVING,
    )
    tls_cert: str = option(
        "",
        "PEM file of the server's certificate, for the gRPC and the tcp port; empty: no TLS",
        path,
        _SERVING,
    )
    tls_key: str = option(
        "", "PEM file of that certificate's key; needed with tls_cert", path, _SERVING
    )
    tls_client_ca: str = option(
        "",
        "PEM file of the authority whose certificates clients must show on both ports; empty:"
        " clients need none",
        path,
        _SERVING,
    )
    data_threads: int = option(
        2, "threads that copy between tiers and verify blocks", count(1, 64), _SERVING
    )
    host_dir: str = option(
        "",
        "directory of the arena, the lock and the socket, on tmpfs (empty: /dev/shm/kvserver-PORT)",
        path,
        _HOST,
    )
    host_bytes: int = option(4 << 30, "memory for blocks, directory included", size(4 << 20), _HOST)
    hugepages: bool = option(False, "ask for transparent huge pages", flag, _HOST)
    mlock: bool = option(False, "lock the arena in memory", flag, _HOST)
    disk_path: str = option(
        "", "directory of the slot file and its journal; empty: no disk tier", path, _DISK
    )
    disk_bytes: int = option(
        0, "size of the slot file; needed with disk_path", size(0, 1 << 60), _DISK
    )
    spill_queue_bytes_max: int = option(
        1 << 30,
        "committed bytes that may wait for their write to disk; beyond it ordinary blocks"
        " lose their disk copy; at most a quarter of the host tier",
        size(1),
        _DISK,
    )
    device_bytes: int = option(
        0,
        "size of the device tier, for the hottest blocks; 0: none",
        size(0),
        _DEVICE,
    )
    device: str = option(
        "cuda",
        "what the device tier is made of: cuda or cuda:N, the memory of that GPU (needs the extra"
        " kvserver[cuda13] or kvserver[cuda12]); memory, this process's own, which exercises three"
        " tiers and gains nothing",
        medium,
        _DEVICE,
    )
    keys_per_call_max: int = option(
        4096, "block hashes one call may name", count(1, 65_536), _LIMITS
    )
    reservation_ms_max: int = option(60_000, "life of a reservation", count(1, MS_MAX), _LIMITS)
    lease_ms_max: int = option(30_000, "life of a reader's lease", count(1, MS_MAX), _LIMITS)
    wait_ms_max: int = option(
        60_000, "how long a call may wait for space or for blocks", count(0, MS_MAX), _LIMITS
    )
    window_bytes_max: int = option(
        256 << 20, "bytes that one read stream may hold leased", size(1), _LIMITS
    )
    announce_ttl_ms_max: int = option(120_000, "life of an announcement", count(1, MS_MAX), _LIMITS)
    tail_ttl_ms: int = option(
        30_000,
        "a tail, the unfinished last block of a prompt that is handed from engine to engine, leaves"
        " so long after it was pushed; one that is written durably stays",
        count(1, MS_MAX),
        _LIMITS,
    )
    tail_bytes_max: int = option(
        256 << 20,
        "host memory that tails may take, at most an eighth of the host tier; older ones make way",
        size(1),
        _LIMITS,
    )
    session_ttl_ms: int = option(
        15_000, "a session without a heartbeat for this long ends", count(10, MS_MAX), _LIMITS
    )
    heartbeat_ms: int = option(
        3_000, "how often clients are told to beat", count(5, MS_MAX), _LIMITS
    )
    sessions_max: int = option(4096, "open sessions", count(1, 1 << 20), _LIMITS)
    namespaces_max: int = option(4096, "known namespaces", count(1, 1 << 20), _LIMITS)
    clients_per_session_max: int = option(
        256, "writers (ranks, connections) of one session", count(1, 1 << 16), _LIMITS
    )
    reservations_max: int = option(16_384, "open reservations", count(1, 1 << 20), _LIMITS)
    leases_max: int = option(65_536, "leases given out", count(1, 1 << 24), _LIMITS)
    streams_max: int = option(4096, "open read streams", count(1, 1 << 20), _LIMITS)
    rpcs_max: int = option(
        1024, "calls that may run at once; more are refused", count(1, 1 << 20), _LIMITS
    )
    watchers_max: int = option(
        64, "streams that tell where blocks are; more are refused", count(0, 1 << 16), _LIMITS
    )
    watch_changes_max: int = option(
        131_072,
        "changes that the hub keeps for each tenant's watchers, about 70 bytes each; one that is"
        " further behind is told to start again",
        count(1, 1 << 24),
        _LIMITS,
    )
    tcp_connections_max: int = option(
        256, "connections of the tcp transport; more are refused", count(1, 1 << 16), _LIMITS
    )
    tcp_stall_ms: int = option(
        30_000,
        "a tcp connection that makes no progress on a started frame for this long is closed",
        count(10, MS_MAX),
        _LIMITS,
    )
    message_bytes_max: int = option(
        64 << 20, "size of one gRPC message", size(1 << 16, 1 << 30), _LIMITS
    )
    log_level: str = option(
        "info", "debug, info, warning or error", choice("debug", "info", "warning", "error"), _LOGS
    )
    log_format: str = option("json", "json or text", choice("json", "text"), _LOGS)

    def __post_init__(self) -> None:
        check(self)
        if not self.host_dir:
            port = self.listen.rpartition(":")[2]
            if port == "0":
                raise ConfigError("host_dir", "", "set when listen has port 0")
            object.__setattr__(self, "host_dir", f"/dev/shm/kvserver-{port}")
        if len(self.host_dir.encode()) > HOST_DIR_BYTES_MAX:
            raise ConfigError(
                "host_dir", self.host_dir, f"a path of at most {HOST_DIR_BYTES_MAX} bytes"
            )
        if self.disk_path and self.disk_bytes < 1 << 20:
            raise ConfigError("disk_bytes", self.disk_bytes, "at least 1 MiB with disk_path")
        if self.disk_bytes and not self.disk_path:
            raise ConfigError("disk_path", "", "a directory when disk_bytes is set")
        if self.nixl_rebuild_ms < self.nixl_move_ms:
            raise ConfigError(
                "nixl_rebuild_ms",
                self.nixl_rebuild_ms,
                f"at least nixl_move_ms ({self.nixl_move_ms})",
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ConfigError(missing, "", "a file: certificate and key are set together")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_cert", "", "a file when tls_client_ca is set")
        if self.tls_cert and self.tcp_listen and not self.tcp_workers:
            raise ConfigError("tcp_workers", 0, "at least 1 with TLS, which needs a process")
        if self.heartbeat_ms * 2 > self.session_ttl_ms:
            raise ConfigError(
                "heartbeat_ms",
                self.heartbeat_ms,
                f"at most half of session_ttl_ms ({self.session_ttl_ms})",
            )

    def shm_allowed(self, tenant: str) -> bool:
        return "*" in self.shm_tenants or tenant in self.shm_tenants


def option_table() -> dict[str, Mapping[str, Any]]:
    """Name -> metadata (help, parse, group, default) of every option, in order of definition."""
    return options.table_of(Settings)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Settings:
    """Settings from flags > environment > file > defaults. ConfigError names what is wrong."""
    return options.load(
        Settings, flags, environment=environment, prefix=ENVIRONMENT_PREFIX, file=file
    )


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like options and are none, each with the nearest that is, or ""."""
    return options.unknown_variables(
        Settings, environment, prefix=ENVIRONMENT_PREFIX, others=OTHER_VARIABLES
    )
