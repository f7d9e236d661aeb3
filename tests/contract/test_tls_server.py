"""One pair of certificate files, two ports: gRPC and data under mutual TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from kvproto.frames import Hello, HelloStatus
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.cli import EXIT_OK, EXIT_UNREACHABLE, EXIT_USAGE, main
from tests.support.server import ServerProcess
from tests.support.tcp import RawTcp
from tests.support.tls import make_certificates


def test_both_ports_ask_for_a_certificate(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    made = make_certificates(tmp_path)
    server = serve(
        host_bytes="32MiB",
        tcp_listen="127.0.0.1:0",
        tls_cert=made.cert("server"),
        tls_key=made.key("server"),
        tls_client_ca=made.cert("ca"),
    )
    request = pb.HelloRequest(protocol_version=1, client_name="tls")
    ca = Path(made.cert("ca")).read_bytes()
    key, cert = Path(made.key("client")).read_bytes(), Path(made.cert("client")).read_bytes()
    strangers = [
        grpc.insecure_channel(server.address),
        grpc.secure_channel(server.address, grpc.ssl_channel_credentials(ca)),
    ]
    for channel in strangers:
        with channel, pytest.raises(grpc.RpcError) as caught:
            kvserver_pb2_grpc.CacheStub(channel).Hello(request, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    address = ["--address", server.address, "--timeout-s", "5"]
    files = ["--tls-ca", made.cert("ca"), "--tls-cert", made.cert("client")]
    assert main(["stats", *address]) == EXIT_UNREACHABLE
    assert main(["stats", *address, *files]) == EXIT_USAGE, "the key is missing"
    assert main(["stats", *address, *files, "--tls-key", made.key("client")]) == EXIT_OK
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    with grpc.secure_channel(server.address, credentials) as channel:
        hello = kvserver_pb2_grpc.CacheStub(channel).Hello(request, timeout=5)
        (offer,) = [offer for offer in hello.transports if offer.name == "tcp"]
        assert dict(offer.options) == {"tls": "1"}
        with RawTcp(offer.address, tls=made.context("client")) as data:
            welcome = data.hello(Hello(hello.session, hello.client, hello.token))
            assert welcome.status is HelloStatus.OK


def test_a_certificate_that_cannot_be_read_stops_the_start(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.pem")
    server = serve(host_bytes="32MiB", tls_cert=missing, tls_key=missing, wait=False)
    assert server.wait_exit() != 0
    assert "missing.pem" in server.log()
