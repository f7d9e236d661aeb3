"""TLS towards the hub: for the gRPC channel and for the tcp transport's connections alike.

Files are read when a connection is made, so that renewed certificates are taken up.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvclient.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files.

    ca          who may vouch for the hub; "" takes the system's
    cert, key   what this client shows a hub that asks (mutual TLS); both or none
    name        the name in the hub's certificate, where it is not the host that is dialled
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise InvalidArgument.of("tls_key", self.key, "set together with tls_cert")
        for field, path in (("tls_ca", self.ca), ("tls_cert", self.cert), ("tls_key", self.key)):
            if path and not Path(path).is_file():
                raise InvalidArgument.of(field, path, "a readable PEM file")

    def credentials(self) -> Any:
        """grpc.ChannelCredentials."""
        return grpc.ssl_channel_credentials(
            root_certificates=_content(self.ca),
            private_key=_content(self.key),
            certificate_chain=_content(self.cert),
        )

    def channel_options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert:
            context.load_cert_chain(self.cert, self.key)
        return context


def _content(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None
