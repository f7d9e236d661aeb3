"""The transports that the contract is tested over: how a hub offers each, how a client takes it.

way = WAYS["tcp+tls"]
hub = way.serve(directory, host_bytes="64MiB")
async with way.client(hub) as client: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvclient import AsyncClient, Client, Registered, Tls
from kvproto import nixlib
from tests.support.heap import HEAP
from tests.support.server import ServerProcess, free_port, start_server
from tests.support.tls import Certificates, make_certificates


@dataclass(frozen=True)
class Way:
    """`transport` is what the client is told to use; `tls` both sides' certificates, made anew;
    `direct` moves without staging: arrays that a test makes lie in registered memory.
    """

    name: str
    transport: str
    tls: bool = False
    direct: bool = False

    @property
    def missing(self) -> str:
        """Why this machine cannot go this way; empty when it can."""
        if self.transport == "nixl" and not nixlib.available():
            return "NIXL is not installed (pip install --no-deps nixl-cu12)"
        return ""

    def serve(self, directory: Path, **options: object) -> ServerProcess:
        """A running hub that offers this way (and shm, which every hub does)."""
        options = {"shm_tenants": "*" if self.transport == "shm" else "nobody", **options}
        if self.transport == "tcp":
            options["tcp_listen"] = f"127.0.0.1:{free_port()}"
        if self.transport == "nixl":
            options["nixl_enabled"] = "true"
            # The agent's process steps back, so a busy machine makes 64 clients at once wait long.
            options.setdefault("nixl_move_ms", 30_000)
        certificates = None
        if self.tls:
            (directory / "tls").mkdir(exist_ok=True)
            certificates = make_certificates(directory / "tls")
            options["tls_cert"] = certificates.cert("server")
            options["tls_key"] = certificates.key("server")
            options["tls_client_ca"] = certificates.cert("ca")
        server = start_server(directory, **options)
        if certificates is not None:
            server.credentials = _tls(certificates).credentials()
        server.certificates = certificates
        return server

    def options(self, hub: ServerProcess) -> dict[str, Any]:
        """What a client's `connect` takes to go this way."""
        chosen: dict[str, Any] = {"transport": self.transport}
        if self.direct:
            chosen["direct"] = True
        if hub.certificates is not None:
            chosen["tls"] = _tls(hub.certificates)
        return chosen

    def settings(self, hub: ServerProcess) -> dict[str, Any]:
        """What the adapter takes in `kv_connector_extra_config` to go this way."""
        chosen: dict[str, Any] = {"transport": self.transport}
        if self.direct:
            chosen["direct"] = True
        if hub.certificates is not None:
            tls = _tls(hub.certificates)
            chosen |= {"tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key}
        return chosen

    def client(self, hub: ServerProcess, **options: Any) -> Any:
        connecting = AsyncClient.connect(hub.address, **{**self.options(hub), **options})
        if self.direct:
            connecting.client.memories.add(Registered.of(HEAP.memory))
        return connecting

    def blocking(self, hub: ServerProcess, **options: Any) -> Client:
        client = Client(hub.address, **{**self.options(hub), **options}).open()
        if self.direct:
            client.register(HEAP.memory)
        return client


def _tls(certificates: Certificates) -> Tls:
    return Tls(
        ca=certificates.cert("ca"), cert=certificates.cert("client"), key=certificates.key("client")
    )


WAYS = {
    way.name: way
    for way in (
        Way("shm", "shm"),
        Way("tcp", "tcp"),
        Way("tcp+tls", "tcp", tls=True),
        Way("nixl", "nixl"),
        Way("nixl-direct", "nixl", direct=True),
    )
}
