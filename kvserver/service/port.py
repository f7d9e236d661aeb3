"""The port that the gRPC services stand on.

Rule 1: a port that cannot be had is one error that names it. So it is tried before gRPC is asked,
which says its own on stderr; whoever takes it in between is refused by both.
Rule 2: one server a port: it is not shared, as gRPC would by default.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import grpc


def open_port(
    listen: str, *, message_bytes_max: int, calls_max: int, credentials: Any = None
) -> tuple[Any, str]:
    """A gRPC server, not started, that has `listen` (host:port), and its address with the port that
    was given for 0. `credentials` of TLS, None: without. OSError when it cannot be had."""
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", message_bytes_max),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ],
        maximum_concurrent_rpcs=calls_max,
    )
    port = 0
    if _can_be_had(listen):
        with contextlib.suppress(RuntimeError):
            if credentials is None:
                port = int(server.add_insecure_port(listen))
            else:
                port = int(server.add_secure_port(listen, credentials))
    if port == 0:
        raise OSError(f"listen: {listen} is in use or not an address of ours")
    return server, f"{listen.rpartition(':')[0]}:{port}"


def _can_be_had(listen: str) -> bool:
    """Whether one of the addresses that the name stands for can be listened on: as gRPC does it,
    which makes `[::]` the same of IPv4 where there is no IPv6."""
    host, _, port = listen.rpartition(":")
    hosts = ["::", "0.0.0.0"] if host == "[::]" else [host.strip("[]")]
    return any(_listens(family, address) for one in hosts for family, address in _all(one, port))


def _all(host: str, port: str) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(family, address) for family, _, _, _, address in found]


def _listens(family: int, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen()
        return True
    return False
