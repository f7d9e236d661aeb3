"""What an operator of a P/D proxy may set, with the defaults; `kvserver.options` reads it.

Every wait and every buffer of the proxy has its bound here; a refusal names the option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvserver import options
from kvserver.options import MS_MAX, ConfigError, address, check, choice, count, option, size

ENVIRONMENT_PREFIX = "KVSERVER_PROXY_"
ENGINES_MAX = 1024
_SERVING, _POLICY, _DEADLINES, _LIMITS, _LOGS = "serving", "policy", "deadlines", "limits", "logs"


def engine_url(name: str, value: object) -> str:
    """`http://host:port` without a path; ConfigError otherwise."""
    text = value.strip().rstrip("/") if isinstance(value, str) else ""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not plain or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(name, value, "a URL such as http://host:8000, without a path")
    if not re.fullmatch(r"[\w.:\[\]-]+", parts.netloc, re.ASCII):
        raise ConfigError(name, value, "a URL whose host is a name or an address")
    return text


def engine_urls(name: str, value: object) -> tuple[str, ...]:
    """Distinct engines, from a list or from a text with commas."""
    given = options.names(name, value)
    urls = tuple(engine_url(name, part) for item in given for part in item.split(",") if part)
    if len(set(urls)) != len(urls):
        raise ConfigError(name, ",".join(urls), "URLs that differ from one another")
    if len(urls) > ENGINES_MAX:
        raise ConfigError(name, f"{len(urls)} URLs", f"at most {ENGINES_MAX} URLs")
    return urls


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """All options of `kvserver pd-proxy`."""

    listen: str = option("127.0.0.1:8000", "address to serve on, host:port", address, _SERVING)
    prefill: tuple[str, ...] = option(
        (), "URLs of the engines that prefill, such as http://10.0.0.5:8000", engine_urls, _SERVING
    )
    decode: tuple[str, ...] = option(
        (), "URLs of the engines that decode and answer", engine_urls, _SERVING
    )
    drain_ms: int = option(
        30_000, "how long SIGTERM waits for running requests", count(0, MS_MAX), _SERVING
    )
    prompt_tokens_min: int = option(
        128,
        "prompts below this go to a decode engine alone; token ids are counted, text is taken for"
        " a token per 4 bytes; 0: every prompt is prefilled first",
        count(0, 1 << 24),
        _POLICY,
    )
    backoff_ms: int = option(
        500,
        "how long an engine that failed is left alone; doubled with each further failure",
        count(1, MS_MAX),
        _POLICY,
    )
    backoff_ms_max: int = option(10_000, "the longest of these pauses", count(1, MS_MAX), _POLICY)
    probe_ms: int = option(
        2_000, "how often each engine's /health is asked", count(10, MS_MAX), _POLICY
    )
    connect_ms: int = option(
        2_000, "for a connection to an engine, and for its /health", count(1, MS_MAX), _DEADLINES
    )
    prefill_ms: int = option(
        30_000,
        "for a whole prefill; then the decode engine computes the prompt itself",
        count(1, MS_MAX),
        _DEADLINES,
    )
    decode_silence_ms: int = option(
        600_000,
        "for the next byte of a decode engine, the first one included: without streaming that is"
        " the whole generation",
        count(1, MS_MAX),
        _DEADLINES,
    )
    request_ms: int = option(
        3_600_000, "for a request with all its legs", count(1, 24 * MS_MAX), _DEADLINES
    )
    body_ms: int = option(60_000, "for a client to send its request", count(1, MS_MAX), _DEADLINES)
    client_stall_ms: int = option(
        60_000, "for a client to take what has been sent to it", count(1, MS_MAX), _DEADLINES
    )
    body_bytes_max: int = option(
        64 << 20, "size of a request's body", size(1 << 10, 1 << 32), _LIMITS
    )
    bodies_bytes_max: int = option(
        1 << 30, "size of all running requests' bodies together", size(1 << 10, 1 << 40), _LIMITS
    )
    requests_max: int = option(
        1024, "requests that may run at once; more are refused", count(1, 1 << 20), _LIMITS
    )
    connections_max: int = option(
        4096, "connections of clients; more are refused", count(1, 1 << 20), _LIMITS
    )
    log_level: str = option(
        "info", "debug, info, warning or error", choice("debug", "info", "warning", "error"), _LOGS
    )
    log_format: str = option("json", "json or text", choice("json", "text"), _LOGS)

    def __post_init__(self) -> None:
        check(self)
        for name in ("prefill", "decode"):
            if not getattr(self, name):
                raise ConfigError(name, "", "at least one URL")
        if self.backoff_ms_max < self.backoff_ms:
            limit = f"at least backoff_ms ({self.backoff_ms})"
            raise ConfigError("backoff_ms_max", self.backoff_ms_max, limit)
        if self.bodies_bytes_max < self.body_bytes_max:
            limit = f"at least body_bytes_max ({self.body_bytes_max})"
            raise ConfigError("bodies_bytes_max", self.bodies_bytes_max, limit)


def option_table() -> dict[str, Mapping[str, Any]]:
    """Name -> metadata (help, parse, group, default) of every option, in order of definition."""
    return options.table_of(ProxySettings)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> ProxySettings:
    """Settings from flags > environment > file > defaults. ConfigError names what is wrong."""
    return options.load(
        ProxySettings, flags, environment=environment, prefix=ENVIRONMENT_PREFIX, file=file
    )


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like options and are none, each with the nearest that is, or ""."""
    return options.unknown_variables(
        ProxySettings, environment, prefix=ENVIRONMENT_PREFIX, others=["CONFIG"]
    )
