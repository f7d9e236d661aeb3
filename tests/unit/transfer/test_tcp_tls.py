"""The data port under TLS: the same frames, and strangers stay outside."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvproto import frames
from kvproto.frames import Hello, HelloStatus, Op, Request, Status
from kvproto.grid import Region
from kvserver.transfer.base import TransferError
from kvserver.transfer.tcp.endpoint import Tls
from tests.support.tcp import RawTcp, sums_of
from tests.support.tls import Certificates, make_certificates
from tests.unit.transfer.tcp_bench import CELL, HEADS, LAYERS, SESSION, TOKEN, WHOLE, TcpBench


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def bench(tmp_path: Path, certificates: Certificates) -> Iterator[TcpBench]:
    tls = Tls(
        cert=certificates.cert("server"),
        key=certificates.key("server"),
        client_ca=certificates.cert("ca"),
    )
    bench = TcpBench(tmp_path / "host", workers=1, tls=tls, hello_s=2.0)
    yield bench
    bench.close()


def eventually(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def greet(bench: TcpBench, context: ssl.SSLContext) -> RawTcp:
    raw = RawTcp(bench.endpoint.address, tls=context)
    try:
        assert raw.hello(Hello(SESSION, 1, TOKEN)).status is HelloStatus.OK
    except BaseException:
        raw.close()
        raise
    return raw


@pytest.mark.parametrize("region", [WHOLE, Region(1, 4, 1, 3)])
def test_a_region_goes_in_and_comes_out(
    bench: TcpBench, certificates: Certificates, region: Region
) -> None:
    assert bench.endpoint.offer == (bench.endpoint.address, {"tls": "1"})
    place = bench.reserve()
    payload = bytes(i * 7 % 251 for i in range(region.cells * CELL))
    with greet(bench, certificates.context("client")) as peer:
        assert peer.write(place, region, payload).status is Status.OK
        wrong = bytearray(payload)
        wrong[-1] ^= 1
        peer.begin_write(place, region, sums_of(payload, CELL))
        peer.sock.sendall(wrong)
        assert peer.reply().status is Status.CORRUPT
        assert peer.write(place, region, payload).status is Status.OK
        reader = bench.permit(Op.READ, bench.place())
        status, _, read = peer.read(reader, region)
    assert (status, read) == (Status.OK, payload)
    window = (
        slice(region.layer_start, region.layer_stop),
        slice(region.head_start, region.head_stop),
    )
    assert bench.cells()[window].tobytes() == payload


def test_a_slot_given_away_in_mid_frame_gets_no_late_byte(
    bench: TcpBench, certificates: Certificates
) -> None:
    place = bench.reserve()
    payload = bytes(i * 3 % 253 for i in range(WHOLE.cells * CELL))
    cut = len(payload) // 2 + 100
    with greet(bench, certificates.context("client")) as peer:
        peer.begin_write(place, WHOLE, sums_of(payload, CELL))
        peer.sock.sendall(payload[:cut])
        flat = bench.slot()[: len(payload)]
        eventually(lambda: flat[:cut].tobytes() == payload[:cut], "the first half is there")
        bench.reserve(client=2)
        peer.sock.sendall(payload[cut:])
        assert peer.reply().status is Status.STALE
    assert (bench.slot() == 0xEE).all()


def test_pipelined_requests_that_openssl_holds_decrypted_are_served(
    bench: TcpBench, certificates: Certificates
) -> None:
    """No poll sees bytes that OpenSSL has taken off the socket already."""
    stale = bench.reserve()
    bench.reserve()
    small = Region(LAYERS - 1, LAYERS, HEADS - 1, HEADS)
    reader = bench.permit(Op.READ, stale)
    request = frames.encode_request(Request(Op.READ, 8, reader, small))
    with greet(bench, certificates.context("client")) as peer:
        peer.sock.sendall(request * 50)  # one TLS record
        for _ in range(50):
            assert peer.reply().status is Status.STALE


def test_dropped_clients_let_go(bench: TcpBench, certificates: Certificates) -> None:
    with greet(bench, certificates.context("client")) as peer:
        bench.ask(lambda: bench.endpoint.drop(1))
        eventually(lambda: bench.liveness.is_dead(1), "the lock is free")
        assert peer.ended()


def test_strangers_and_plain_peers_are_turned_away(
    bench: TcpBench, certificates: Certificates
) -> None:
    for name in ("", "stranger"):
        with pytest.raises((OSError, AssertionError)):
            greet(bench, certificates.context(name))
    with bench.raw() as plain:
        plain.sock.sendall(frames.encode_hello(Hello(SESSION, 1, TOKEN)))
        plain.sock.settimeout(5)
        said = b"x"
        while said:  # an alert, and the end
            try:
                said = plain.sock.recv(100)
            except ConnectionError:
                break
            assert not said.startswith(b"kvtw")
    with bench.raw() as silent:
        assert silent.ended(), "a handshake that does not come is not waited for"
    assert bench.counters()["tcp_granted"] == 0
    eventually(lambda: bench.counters()["tcp_broken"] == 4, "counted")
    greet(bench, certificates.context("client")).close()


def test_files_that_cannot_be_used_stop_the_start(
    tmp_path: Path, certificates: Certificates
) -> None:
    for cert, key in (("server", "client"), ("nothing", "server")):
        tls = Tls(cert=certificates.cert(cert), key=certificates.key(key))
        with pytest.raises(TransferError, match="tls_cert"):
            TcpBench(tmp_path / cert, workers=1, tls=tls)
