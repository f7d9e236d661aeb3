"""Settings of the adapter: the keys of `kv_connector_extra_config`.

Every key, its default and its unit stand in `Settings`. An unknown key is an error, so that a
misspelt one is not silently a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvclient import InvalidArgument, Tls
from kvclient.options import Options
from kvserver_vllm.cores import check_cores
from kvserver_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """`address` is required; everything else has a default."""

    address: str
    """host:port of the hub's gRPC listener."""
    tenant: str = ""
    """Tenant whose quota and blocks this engine uses. Default: the default tenant."""
    transport: str = "auto"
    """How bytes move: auto, shm (on the hub's host), tcp or nixl."""
    connections: int = 2
    """Connections of the tcp transport, each rank's own."""
    direct: bool = False
    """nixl: straight between the engine's pages and the hub, without staging. What a hub that
    stopped in the middle may still touch then stays out of use until it answers or is replaced: a
    load that meets such a hub ends only then."""
    tls_ca: str = ""
    """PEM file of the authority that vouches for the hub. With any tls_* key, TLS is used."""
    tls_cert: str = ""
    """PEM file of this engine's certificate, for a hub that asks for one; with tls_key."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_name: str = ""
    """Name in the hub's certificate, where it is not the host in `address`."""
    block_tokens: int = 128
    """Tokens per hub block. All engines that share must agree; independent of vLLM's block size."""
    lookup_ms: int = 100
    """Longest a request waits for the answer of a lookup before it counts as a miss."""
    load_deadline_ms: int = 10_000
    """Longest a request waits for its blocks; what has not come by then is recomputed."""
    hits: str = "auto"
    """auto: a hit is taken when loading it is expected to be faster than computing it, by what this
    engine has measured of both. always: every hit is taken."""
    min_hit_tokens: int = 0
    """Hits of fewer tokens are computed. Default 0: one hub block. Hand-offs are always taken."""
    intent_wait_ms: int = 500
    """Longest a request that was handed off (do_remote_prefill) waits for blocks which no engine
    has announced yet."""
    handoff_wait_ms: int = 10_000
    """Longest a request waits for blocks that another engine is writing; also at most 1.5 times
    what computing them is estimated to take, and at most a tenth of this, or a second if that is
    more, while nothing comes. 0: never."""
    window_bytes: int = 0
    """Bytes one load may hold leased at once. Default 0: the hub's maximum."""
    staging_bytes: int = 1 << 30
    """Bytes of blocks that a rank may hold for requests which wait for an engine that is still
    writing, or for blocks of this one. 0: none; such requests wait and are loaded from the hub."""
    push: bool = True
    """Whether computed blocks are pushed (kv_producer and kv_both)."""
    layerwise_push: bool = True
    """Whether layers are pushed while the next ones are computed, as far as vLLM calls its layer
    hooks: replayed full CUDA graphs do not. Written out as true, vLLM is asked for piecewise graphs
    instead; false pushes everything after the step."""
    pin_ms: int = 250
    """Longest that pages stay pinned for a push after the step that computed them."""
    jobs_max: int = 256
    """Pushes a rank keeps queued; beyond it a push is dropped and counted."""
    cores: str = "auto"
    """Cores that the adapter's own threads run on: a list (`2,4-7`); inherit, those of the thread
    that makes them; auto, the same, but where vLLM has bound that to the cores of the forward pass,
    on CPUs, all of their NUMA nodes which the engine may use."""
    cache_dir: str = ""
    """Directory of the file that remembers digests of weights. Default: the user's cache."""
    event_log: str = ""
    """Path of a JSONL file that gets an event per lookup, save, commit and pull. Default: none."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Settings:
        """ConfigError names the key that is unknown, missing or wrong."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(extra) - set(known))
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config: unknown key {unknown[0]!r}; known: {sorted(known)}"
            )
        if not extra.get("address"):
            raise ConfigError(
                "kv_connector_extra_config: address (host:port of the hub) is missing"
            )
        for name, value in extra.items():
            _check(name, value)
        settings = cls(**extra)
        check_cores(settings.cores)
        try:
            Options(settings.address, **settings.reach()).check()
        except InvalidArgument as error:
            raise ConfigError(f"kv_connector_extra_config: {error}") from error
        return settings

    def reach(self) -> dict[str, Any]:
        """What `AsyncClient.connect` is told of transport and TLS."""
        reach: dict[str, Any] = {"transport": self.transport, "connections": self.connections}
        if self.direct:
            reach["direct"] = True
        if self.tls_ca or self.tls_cert or self.tls_key or self.tls_name:
            reach["tls"] = Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)
        return reach


_TLS = ("tls_ca", "tls_cert", "tls_key", "tls_name")
_TEXTS = ("address", "tenant", "cores", "cache_dir", "event_log", "transport", *_TLS)
_FLAGS = ("push", "direct", "layerwise_push")
_CHOICES = {"hits": ("auto", "always")}
_LEAST = {"block_tokens": 1, "connections": 1, "load_deadline_ms": 1, "jobs_max": 1}


def _check(name: str, value: object) -> None:
    key = f"kv_connector_extra_config: {name}"
    if name in _TEXTS:
        if not isinstance(value, str):
            raise ConfigError(f"{key} is {value!r}, must be text")
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ConfigError(f"{key} is {value!r}, must be one of {', '.join(_CHOICES[name])}")
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}, must be true or false")
    else:
        least = _LEAST.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key} is {value!r}, must be an integer of at least {least}")
