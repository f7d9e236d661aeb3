"""How a client connects to its hub, checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvclient.errors import InvalidArgument
from kvclient.tls import Tls
from kvclient.transfer import choose
from kvclient.transfer.direct import Memories
from kvclient.transfer.ring import STAGING_BYTES, STAGING_BYTES_MAX, STAGING_BYTES_MIN


@dataclass(frozen=True, slots=True)
class Options:
    """How to connect. `AsyncClient.connect` documents each."""

    address: str
    name: str = ""
    tenant: str = ""
    deadline_s: float = 10.0
    transport: str = "auto"
    read_only: bool = False
    join_token: bytes = b""
    rank: int = 0
    connections: int = 2  # of the tcp transport
    tls: Tls | None = None
    staging_bytes: int = STAGING_BYTES  # of the nixl transport
    staging_s: float = 0.0  # that it may take to make it
    nixl_params: dict[str, str] = field(default_factory=dict)
    direct: bool = False  # nixl moves registered memory without staging
    memories: Memories = field(default_factory=Memories)  # what is registered

    def check(self) -> Options:
        """InvalidArgument for what cannot be right."""
        if not isinstance(self.address, str) or not self.address:
            raise InvalidArgument.of("address", self.address, '"host:port"')
        if self.transport not in ("auto", *choose.TRANSPORTS):
            limit = f"auto or one of {choose.TRANSPORTS}"
            raise InvalidArgument.of("transport", self.transport, limit)
        if not 1 <= self.connections <= 16:
            raise InvalidArgument.of("connections", self.connections, "from 1 to 16")
        if not STAGING_BYTES_MIN <= self.staging_bytes <= STAGING_BYTES_MAX:
            limit = f"from {STAGING_BYTES_MIN} to {STAGING_BYTES_MAX}"
            raise InvalidArgument.of("staging_bytes", self.staging_bytes, limit)
        if self.direct and self.transport not in ("auto", "nixl"):
            raise InvalidArgument.of("direct", True, f"False with transport {self.transport!r}")
        if not 0 < self.deadline_s <= 86_400:
            raise InvalidArgument.of("deadline_s", self.deadline_s, "above 0, at most 86400")
        if not 0 <= self.staging_s <= 86_400:
            raise InvalidArgument.of("staging_s", self.staging_s, "from 0 to 86400")
        if self.join_token and len(self.join_token) != 16:
            raise InvalidArgument.of("join_token", len(self.join_token), "16 bytes")
        return self
