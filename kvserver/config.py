"""What an operator may set. Each option is described once, here, and nowhere else.

An option is taken from the command line, else from the environment (`KVSERVER_` and its name in
capitals), else from the TOML file (flat, `name = value`), else it has its default.

Rule 1: every value is checked where it is read; an error names the option, where the value came
from, the value and what would have been accepted.
Rule 2: sizes are in bytes (`512MiB`, `1.5GB`, a plain number), durations in milliseconds; the unit
is the last word of the option's name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvproto.errors import FieldError

ENVIRONMENT_PREFIX = "KVSERVER_"
HOST_DIR_BYTES_MAX = 88  # a Unix socket's path holds 107, and the socket lies in this directory
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}{b}": 1 << (10 * i) for i, p in enumerate("KMGT", 1) for b in ("i", "iB")},
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class ConfigError(FieldError):
    """An option's value cannot be right. `source` says where it came from."""

    def __init__(self, name: str, value: object, limit: str, source: str = "") -> None:
        super().__init__(name, value, limit)
        self.source = source
        if source:
            self.args = (f"{self.args[0]} (from {source})",)


def parse_bytes(value: object, name: str = "size") -> int:
    """A size in bytes: 4096, "4096", "512MiB", "1.5 GB", "2Gi". ConfigError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ConfigError(name, value, "a size such as 1048576, 512MiB or 1.5GB")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """A size for people: 1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


Parser = Callable[[str, object], object]


def _size(low: int, high: int = 1 << 50) -> Parser:
    def parse(name: str, value: object) -> int:
        size = parse_bytes(value, name)
        if not low <= size <= high:
            raise ConfigError(name, value, f"from {format_bytes(low)} to {format_bytes(high)}")
        return size

    return parse


def _count(low: int, high: int) -> Parser:
    def parse(name: str, value: object) -> int:
        number = value
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value.strip()):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise ConfigError(name, value, f"a whole number from {low} to {high}")
        return number

    return parse


def _flag(name: str, value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "on": True}
    words |= {"false": False, "no": False, "0": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ConfigError(name, value, "true or false")


def _choice(*choices: str) -> Parser:
    def parse(name: str, value: object) -> str:
        if value not in choices:
            raise ConfigError(name, value, f"one of {', '.join(choices)}")
        return str(value)

    return parse


def _address(name: str, value: object, *, empty: bool = False) -> str:
    if empty and value == "":
        return ""
    limit = "host:port with a port from 0 to 65535" + (", or empty" if empty else "")
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not host or not colon or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65_535:
        raise ConfigError(name, value, limit)
    return str(value)


def _optional_address(name: str, value: object) -> str:
    return _address(name, value, empty=True)


def _path(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(name, value, "a path")
    return str(Path(value).absolute()) if value else ""


def _names(name: str, value: object) -> tuple[str, ...]:
    items = (value.split(",") if value else []) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
        raise ConfigError(name, value, "a list of names, separated by commas")
    return tuple(item.strip() for item in items)


def _word(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w{1,64}", value):
        raise ConfigError(name, value, "a name of letters, digits and underscores")
    return value


def _pairs(name: str, value: object) -> tuple[str, ...]:
    items = tuple(item for item in _names(name, value) if item)
    for item in items:
        if not re.fullmatch(r"\w+=.*", item):
            raise ConfigError(name, item, "name=value")
    return items


def _option(default: Any, help_text: str, parse: Parser, group: str) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse, "group": group})


_SERVING, _NIXL, _HOST, _DISK, _DEVICE, _LIMITS, _LOGS = (
    "serving",
    "nixl",
    "host tier (shared memory)",
    "disk tier",
    "device tier",
    "limits",
    "logs",
)
_MS_MAX = 3_600_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options. Build it with `load`, or directly (tests); either way `check` holds."""

    listen: str = _option(
        "127.0.0.1:50051", "address of the gRPC service, host:port", _address, _SERVING
    )
    metrics_listen: str = _option(
        "127.0.0.1:50052",
        "address of the metrics over HTTP (/metrics), empty for none",
        _optional_address,
        _SERVING,
    )
    drain_ms: int = _option(
        10_000,
        "how long SIGTERM waits for running calls and the write-behind",
        _count(0, _MS_MAX),
        _SERVING,
    )
    shm_tenants: tuple[str, ...] = _option(
        ("*",),
        "tenants that may map the host arena, which shows them every tenant's blocks;"
        " * is everybody, an empty name the default tenant",
        _names,
        _SERVING,
    )
    nixl_enabled: bool = _option(
        False, "offer nixl (RDMA) to clients; needs the extra kvserver[nixl]", _flag, _NIXL
    )
    nixl_backend: str = _option(
        "UCX", "the NIXL backend: UCX, LIBFABRIC or another that its wheel has", _word, _NIXL
    )
    nixl_params: tuple[str, ...] = _option(
        (),
        "parameters of the backend, name=value; UCX reads its environment (UCX_TLS,"
        " UCX_NET_DEVICES) as well",
        _pairs,
        _NIXL,
    )
    nixl_move_ms: int = _option(
        10_000, "how long one move may take before it fails", _count(1, _MS_MAX), _NIXL
    )
    nixl_rebuild_ms: int = _option(
        120_000,
        "a transfer that has not ended after this long costs every client the agent, which is made"
        " anew: the last resort against slots that stay in quarantine",
        _count(1, _MS_MAX),
        _NIXL,
    )
    tcp_listen: str = _option(
        "127.0.0.1:50053",
        "address of the tcp transport's data port, empty for none",
        _optional_address,
        _SERVING,
    )
    tcp_workers: int = _option(
        1,
        "processes that move the bytes of the tcp transport; 0: threads of the server",
        _count(0, 64),
        _SERVING,
    )
    tls_cert: str = _option(
        "",
        "PEM file of the server's certificate, for the gRPC and the tcp port; empty: no TLS",
        _path,
        _SERVING,
    )
    tls_key: str = _option(
        "", "PEM file of that certificate's key; needed with tls_cert", _path, _SERVING
    )
    tls_client_ca: str = _option(
        "",
        "PEM file of the authority whose certificates clients must show on both ports; empty:"
        " clients need none",
        _path,
        _SERVING,
    )
    data_threads: int = _option(
        2, "threads that copy between tiers and verify blocks", _count(1, 64), _SERVING
    )
    host_dir: str = _option(
        "",
        "directory of the arena, the lock and the socket, on tmpfs (empty: /dev/shm/kvserver-PORT)",
        _path,
        _HOST,
    )
    host_bytes: int = _option(
        4 << 30, "memory for blocks, directory included", _size(4 << 20), _HOST
    )
    hugepages: bool = _option(False, "ask for transparent huge pages", _flag, _HOST)
    mlock: bool = _option(False, "lock the arena in memory", _flag, _HOST)
    disk_path: str = _option(
        "", "directory of the slot file and its journal; empty: no disk tier", _path, _DISK
    )
    disk_bytes: int = _option(
        0, "size of the slot file; needed with disk_path", _size(0, 1 << 60), _DISK
    )
    spill_queue_bytes_max: int = _option(
        1 << 30,
        "committed bytes that may wait for their write to disk; beyond it ordinary blocks"
        " lose their disk copy; at most a quarter of the host tier",
        _size(1),
        _DISK,
    )
    device_bytes: int = _option(
        0,
        "size of the device tier, which this version keeps in process memory: it exercises three"
        " tiers and gains nothing else; 0: none",
        _size(0),
        _DEVICE,
    )
    keys_per_call_max: int = _option(
        4096, "block hashes one call may name", _count(1, 65_536), _LIMITS
    )
    reservation_ms_max: int = _option(60_000, "life of a reservation", _count(1, _MS_MAX), _LIMITS)
    lease_ms_max: int = _option(30_000, "life of a reader's lease", _count(1, _MS_MAX), _LIMITS)
    wait_ms_max: int = _option(
        60_000, "how long a call may wait for space or for blocks", _count(0, _MS_MAX), _LIMITS
    )
    window_bytes_max: int = _option(
        256 << 20, "bytes that one read stream may hold leased", _size(1), _LIMITS
    )
    announce_ttl_ms_max: int = _option(
        120_000, "life of an announcement", _count(1, _MS_MAX), _LIMITS
    )
    session_ttl_ms: int = _option(
        15_000, "a session without a heartbeat for this long ends", _count(10, _MS_MAX), _LIMITS
    )
    heartbeat_ms: int = _option(
        3_000, "how often clients are told to beat", _count(5, _MS_MAX), _LIMITS
    )
    sessions_max: int = _option(4096, "open sessions", _count(1, 1 << 20), _LIMITS)
    namespaces_max: int = _option(4096, "known namespaces", _count(1, 1 << 20), _LIMITS)
    clients_per_session_max: int = _option(
        256, "writers (ranks, connections) of one session", _count(1, 1 << 16), _LIMITS
    )
    reservations_max: int = _option(16_384, "open reservations", _count(1, 1 << 20), _LIMITS)
    leases_max: int = _option(65_536, "leases given out", _count(1, 1 << 24), _LIMITS)
    streams_max: int = _option(4096, "open read streams", _count(1, 1 << 20), _LIMITS)
    rpcs_max: int = _option(
        1024, "calls that may run at once; more are refused", _count(1, 1 << 20), _LIMITS
    )
    tcp_connections_max: int = _option(
        256, "connections of the tcp transport; more are refused", _count(1, 1 << 16), _LIMITS
    )
    tcp_stall_ms: int = _option(
        30_000,
        "a tcp connection that makes no progress on a started frame for this long is closed",
        _count(10, _MS_MAX),
        _LIMITS,
    )
    message_bytes_max: int = _option(
        64 << 20, "size of one gRPC message", _size(1 << 16, 1 << 30), _LIMITS
    )
    log_level: str = _option(
        "info", "debug, info, warning or error", _choice("debug", "info", "warning", "error"), _LOGS
    )
    log_format: str = _option("json", "json or text", _choice("json", "text"), _LOGS)

    def __post_init__(self) -> None:
        for name, meta in option_table().items():
            object.__setattr__(self, name, meta["parse"](name, getattr(self, name)))
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
    return {f.name: {**f.metadata, "default": f.default} for f in fields(Settings)}


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Settings:
    """Settings from flags > environment > file > defaults. ConfigError names what is wrong."""
    options = option_table()
    values: dict[str, object] = {}
    sources: dict[str, str] = {}

    def take(name: str, value: object, source: str) -> None:
        try:
            values[name] = options[name]["parse"](name, value)
        except ConfigError as error:
            raise ConfigError(name, error.value, error.limit, source) from None
        sources[name] = source

    if file is not None:
        for name, value in _read_file(Path(file)).items():
            take(name, value, str(file))
    for name in options:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if environment is not None and variable in environment:
            take(name, environment[variable], f"the environment, {variable}")
    for name, value in (flags or {}).items():
        take(name, value, f"the command line, {flag_of(name)}")
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ConfigError as error:
        source = sources.get(error.field, "")
        raise ConfigError(error.field, error.value, error.limit, source) from None


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_file(path: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", str(path), f"a readable TOML file: {error}") from error
    known = option_table()
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"an option; did you mean {close[0]}?" if close else "an option"
            raise ConfigError(name, content[name], hint, str(path))
    return content
