"""A data worker against peers that say each byte themselves: what lands where, and what not."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvproto import cells, frames
from kvproto.arena import UNIT
from kvproto.frames import Hello, HelloStatus, Op, Place, Request, Status
from kvproto.grid import Region
from tests.support.tcp import sums_of
from tests.unit.transfer.tcp_bench import (
    CELL,
    HASTE_S,
    HEADS,
    LAYERS,
    SESSION,
    SLOT_BYTES,
    TOKEN,
    WHOLE,
    TcpBench,
)

REGIONS = [WHOLE, Region(1, 5, 0, HEADS), Region(0, LAYERS, 1, 3), Region(2, 3, 3, 4)]
FD_DIR = Path("/proc/self/fd")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[TcpBench]:
    bench = TcpBench(tmp_path / "host")
    yield bench
    bench.close()


def eventually(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def payload_of(region: Region) -> bytes:
    return np.random.default_rng(region.cells).bytes(region.cells * CELL)


def untouched(bench: TcpBench, number: int = 0) -> bool:
    return bool((bench.slot(number) == 0xEE).all())


# ---- what is right -----------------------------------------------------------------------------


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_lands_in_its_cells_and_nowhere_else(bench: TcpBench, region: Region) -> None:
    place = bench.reserve()
    payload = payload_of(region)
    with bench.connect() as peer:
        reply = peer.write(place, region, payload, tag=9)
    assert (reply.op, reply.tag, reply.status, reply.body_bytes) == (Op.WRITE, 9, Status.OK, 0)
    expected = np.full((LAYERS, HEADS, CELL), 0xEE, np.uint8)
    cells = np.frombuffer(payload, np.uint8).reshape(region.layers, region.heads, CELL)
    window = (
        slice(region.layer_start, region.layer_stop),
        slice(region.head_start, region.head_stop),
    )
    expected[window] = cells
    assert np.array_equal(bench.cells(), expected)
    assert (bench.slot()[LAYERS * HEADS * CELL :] == 0xEE).all(), "the trailer is the server's"


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_read_as_it_stands(bench: TcpBench, region: Region) -> None:
    bench.reserve()
    bench.slot()[:] = np.frombuffer(np.random.default_rng(1).bytes(SLOT_BYTES), np.uint8)
    place = bench.permit(Op.READ, bench.place())
    with bench.connect() as peer:
        status, trailer, payload = peer.read(place, region, tag=3)
    assert status is Status.OK
    assert trailer == bench.slot()[LAYERS * HEADS * CELL :][: place.trailer_bytes].tobytes()
    window = (
        slice(region.layer_start, region.layer_stop),
        slice(region.head_start, region.head_stop),
    )
    assert payload == bench.cells()[window].tobytes()


def test_requests_may_be_pipelined(bench: TcpBench) -> None:
    places = [bench.reserve(number) for number in range(3)]
    payload = payload_of(WHOLE)
    sums = sums_of(payload, CELL)
    raw = b"".join(
        frames.encode_request(Request(Op.WRITE, tag, place, WHOLE)) + payload + sums
        for tag, place in enumerate(places)
    )
    reader = bench.permit(Op.READ, bench.place(0))
    raw += frames.encode_request(Request(Op.READ, 3, reader, WHOLE))
    with bench.connect() as peer:
        peer.sock.sendall(raw)
        assert [peer.reply().tag for _ in places] == [0, 1, 2]
        assert peer.reply().status is Status.OK
        peer.receive(reader.trailer_bytes)
        assert peer.receive(len(payload)) == payload
        assert frames.decode_after(peer.receive(8)) == (3, Status.OK)
    assert all(bench.cells(number).tobytes() == payload for number in range(3))


def test_cells_larger_than_a_chunk(bench: TcpBench) -> None:
    bench.reserve()
    size = 3 << 20
    units = -(-(2 * size + 16) // UNIT) * UNIT
    bench.arena.write_reserved(0, units, 2, (1,))
    place = bench.permit(Op.WRITE, Place(5, 0, 2, size, 2, 1, Region(0, 2, 0, 1)))
    payload = os.urandom(size)
    with bench.connect() as peer:
        assert peer.write(place, Region(1, 2, 0, 1), payload).status is Status.OK
    assert bench.arena.slot(size, size).tobytes() == payload


# ---- what is wrong -----------------------------------------------------------------------------


def test_bytes_that_do_not_match_their_checksums_are_corrupt(bench: TcpBench) -> None:
    place = bench.reserve()
    payload = payload_of(WHOLE)
    with bench.connect() as peer:
        for at in (0, len(payload) // 2, len(payload) - 1):
            wrong = bytearray(payload)
            wrong[at] ^= 1
            peer.begin_write(place, WHOLE, sums_of(payload, CELL))
            peer.sock.sendall(wrong)
            assert peer.reply().status is Status.CORRUPT
        assert peer.write(place, WHOLE, payload).status is Status.OK, "written again"


@pytest.mark.parametrize("op", list(Op))
def test_a_wrong_permit_is_denied_and_ends_the_connection(bench: TcpBench, op: Op) -> None:
    bench.reserve()
    good = bench.permit(op, bench.place())
    other = bench.permit(op, bench.place(), client=2)
    wrong_op = bench.permit(Op.READ if op is Op.WRITE else Op.WRITE, bench.place())
    bits = replace(good, permit=bytes([good.permit[0] ^ 1, *good.permit[1:]]))
    further = replace(good, offset=good.offset + UNIT)
    for place in (other, wrong_op, bits, further):
        with bench.connect() as peer:
            peer.sock.sendall(frames.encode_request(Request(op, 4, place, WHOLE)))
            reply = peer.reply()
            assert (reply.status, reply.tag, reply.body_bytes) == (Status.DENIED, 4, 0)
            assert peer.ended()
    assert untouched(bench)
    eventually(lambda: bench.counters()["tcp_refused"] == 4, "counted")


def test_a_slot_beyond_the_arena_is_bad_even_with_a_permit(bench: TcpBench) -> None:
    end = bench.arena.data_bytes // UNIT * UNIT
    for offset in (end, end - UNIT, 17, (1 << 64) - 1):
        place = Place(5, offset, 1, CELL, LAYERS, HEADS, WHOLE)
        for op in Op:
            with bench.connect() as peer:
                permitted = bench.permit(op, place)
                peer.sock.sendall(frames.encode_request(Request(op, 4, permitted, WHOLE)))
                assert peer.reply().status is Status.BAD
                assert peer.ended()


def test_a_permit_for_more_than_the_slot_holds_writes_nothing(bench: TcpBench) -> None:
    bench.reserve()
    place = bench.place()
    wide = bench.permit(Op.WRITE, replace(place, cell_bytes=CELL * 2))
    with bench.connect() as peer:
        assert peer.write(wide, WHOLE, bytes(WHOLE.cells * CELL * 2)).status is Status.STALE
    assert untouched(bench)
    assert not bench.slot(1).any()


def test_a_stale_generation_is_told_and_the_connection_goes_on(bench: TcpBench) -> None:
    old = bench.reserve()
    old_read = bench.permit(Op.READ, bench.place())
    new = bench.reserve()
    payload = payload_of(WHOLE)
    with bench.connect() as peer:
        assert peer.write(old, WHOLE, payload).status is Status.STALE
        assert untouched(bench)
        assert peer.read(old_read, WHOLE) == (Status.STALE, b"", b"")
        assert peer.write(new, WHOLE, payload).status is Status.OK


def test_only_a_reserved_slot_of_this_client_is_written(bench: TcpBench) -> None:
    payload = payload_of(WHOLE)
    bench.reserve(0, client=2)
    stranger = bench.permit(Op.WRITE, bench.place(0))
    bench.reserve(1)
    bench.arena.write_valid(
        SLOT_BYTES, SLOT_BYTES, bench.place(1).generation, bytes(16), bytes(32), bytes(32), 1, 0
    )
    whole = bench.permit(Op.WRITE, bench.place(1))
    bench.reserve(2)
    bench.arena.write_invalid(2 * SLOT_BYTES, bench.place(2).generation)
    gone = bench.permit(Op.WRITE, bench.place(2))
    with bench.connect() as peer:
        for place in (stranger, whole, gone):
            assert peer.write(place, WHOLE, payload).status is Status.STALE
    assert all(untouched(bench, number) for number in range(3))


@pytest.mark.parametrize("native", [True, False])
def test_a_slot_given_away_in_mid_frame_gets_no_late_byte(
    bench: TcpBench, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence itself: the peer waits with the rest of its frame until the slot is another's."""
    if not native:
        monkeypatch.setattr(cells, "_library", None)
    elif not cells.NATIVE:
        pytest.skip("no native code: no C compiler, or KVSERVER_NATIVE=0")
    place = bench.reserve()
    payload = payload_of(WHOLE)
    cut = len(payload) // 2 + 100  # in the middle of a cell
    with bench.connect() as peer:
        peer.begin_write(place, WHOLE, sums_of(payload, CELL))
        peer.sock.sendall(payload[:cut])
        flat = bench.slot()[: len(payload)]
        eventually(lambda: flat[:cut].tobytes() == payload[:cut], "the first half is there")
        bench.reserve(client=2)
        peer.sock.sendall(payload[cut:])
        assert peer.reply().status is Status.STALE
        assert untouched(bench), "not one byte came late"
        again = bench.reserve()
        assert peer.write(again, WHOLE, payload).status is Status.OK, "in step after all"


def test_a_reader_of_a_slot_given_away_in_mid_frame_sees_nothing_of_the_next(
    bench: TcpBench,
) -> None:
    bench.reserve()
    size = 3 << 20
    units = -(-(2 * size + 16) // UNIT) * UNIT
    bench.arena.write_reserved(0, units, 5, (1,))
    bench.arena.slot(0, units)[:] = 0x11
    place = bench.permit(Op.READ, Place(5, 0, 5, size, 2, 1, Region(0, 2, 0, 1)))
    with bench.connect() as peer:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reply = peer.begin_read(place, Region(0, 2, 0, 1))
        assert reply.status is Status.OK
        time.sleep(0.1)  # the server's socket is full by now
        bench.arena.write_reserved(0, units, 6, (2,))
        bench.arena.slot(0, units)[:] = 0x22
        payload = peer.receive(reply.body_bytes)
        assert frames.decode_after(peer.receive(8))[1] is Status.STALE
        assert 0 in payload, "the test has stopped it in mid-frame"
        assert 0x22 not in payload


# ---- peers that break off, stall or babble -----------------------------------------------------


def test_a_connection_cut_anywhere_leaves_the_server_as_it_was(bench: TcpBench) -> None:
    place = bench.reserve()
    payload = payload_of(Region(0, 1, 0, 1))
    hello = frames.encode_hello(Hello(SESSION, 1, TOKEN))
    request = Request(Op.WRITE, 0, place, Region(0, 1, 0, 1))
    raw = hello + frames.encode_request(request) + payload
    heads = [*range(len(hello) + 96 + 2), *range(len(raw), len(raw) + 8)]
    raw += sums_of(payload, CELL)
    bench.connect().close()
    eventually(lambda: bench.counters()["tcp_connections"] == 0, "let go")
    gc.collect()  # what earlier tests left must not go in between
    before = len(list(FD_DIR.iterdir()))
    for cut in [*heads, len(raw) - 1, len(raw)]:
        with bench.raw() as peer:
            peer.sock.sendall(raw[:cut])
    eventually(lambda: bench.counters()["tcp_connections"] == 0, "let go", 30)
    eventually(lambda: len(list(FD_DIR.iterdir())) <= before, "no descriptor stays")
    assert bench.liveness.is_dead(1)
    with bench.connect() as peer:
        assert peer.write(place, Region(0, 1, 0, 1), payload).status is Status.OK


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" * 4, bytes(4096), b"\xff" * 100_000])
def test_noise_instead_of_a_hello(bench: TcpBench, noise: bytes) -> None:
    with bench.raw() as peer:
        peer.sock.sendall(noise)
        assert peer.welcome().status is HelloStatus.BAD_REQUEST
        assert peer.ended()
    eventually(lambda: bench.counters()["tcp_broken"] == 1, "counted")


def test_noise_instead_of_a_request(bench: TcpBench) -> None:
    with bench.connect() as peer:
        peer.sock.sendall(os.urandom(96))
        assert peer.ended()
    with bench.connect() as peer:
        peer.sock.sendall((1).to_bytes(4, "little") + (5).to_bytes(4, "little") + bytes(88))
        reply = peer.reply()
        assert (reply.status, reply.tag) == (Status.BAD, 5)
        assert peer.ended()
    eventually(lambda: bench.counters()["tcp_broken"] == 2, "counted")


@pytest.mark.parametrize("said", [0, 20])
def test_a_hello_that_does_not_come(hasty: TcpBench, said: int) -> None:
    with hasty.raw() as peer:
        peer.sock.sendall(frames.encode_hello(Hello(SESSION, 1, TOKEN))[:said])
        assert peer.ended()
    eventually(lambda: hasty.counters()["tcp_stalled"] == 1, "counted")


@pytest.mark.parametrize("said", [1, 95, 96, 100, 96 + 5 * CELL, 96 + LAYERS * HEADS * CELL + 5])
def test_a_writer_that_stalls_in_a_frame_is_closed(hasty: TcpBench, said: int) -> None:
    place = hasty.reserve()
    raw = frames.encode_request(Request(Op.WRITE, 0, place, WHOLE))
    raw += payload_of(WHOLE) + sums_of(payload_of(WHOLE), CELL)[:-8]
    with hasty.connect() as peer:
        peer.sock.sendall(raw[:said])
        assert peer.ended()
    eventually(lambda: hasty.counters()["tcp_stalled"] == 1, "counted")


def test_a_reader_that_stops_reading_is_closed_and_disturbs_nobody(hasty: TcpBench) -> None:
    place = hasty.reserve()
    reader = hasty.permit(Op.READ, hasty.place())
    with hasty.connect() as stuck, hasty.connect(client=1) as other:
        request = frames.encode_request(Request(Op.READ, 0, reader, WHOLE))
        for _ in range(40):
            stuck.sock.sendall(request)
        payload = payload_of(WHOLE)
        for _ in range(3):
            assert other.write(place, WHOLE, payload).status is Status.OK
        eventually(lambda: hasty.counters()["tcp_stalled"] == 1, "closed")


def test_an_idle_connection_stays(hasty: TcpBench) -> None:
    place = hasty.reserve()
    with hasty.connect() as peer:
        time.sleep(2.5 * HASTE_S)  # what a started frame may stand still
        assert peer.write(place, WHOLE, payload_of(WHOLE)).status is Status.OK


# ---- who may connect ---------------------------------------------------------------------------


def test_a_wrong_token_is_refused(bench: TcpBench) -> None:
    for hello in (Hello(SESSION, 1, bytes(16)), Hello(SESSION + 1, 1, TOKEN)):
        with bench.raw() as peer:
            assert peer.hello(hello).status is HelloStatus.REFUSED
            assert peer.ended()
    assert bench.counters()["tcp_granted"] == 0
    assert bench.liveness.known() == []


def test_too_many_connections_of_one_client(bench: TcpBench) -> None:
    peers = [bench.connect() for _ in range(16)]
    with bench.raw() as late:
        assert late.hello(Hello(SESSION, 1, TOKEN)).status is HelloStatus.BUSY
        assert late.ended()
    bench.connect(client=2).close()
    for peer in peers:
        peer.close()
    eventually(lambda: bench.counters()["tcp_connections"] == 0, "let go")
    bench.connect().close()


def test_too_many_connections_in_all(tmp_path: Path) -> None:
    bench = TcpBench(tmp_path / "host", connections_max=3)
    try:
        peers = [bench.connect(client) for client in (1, 2, 3)]
        with bench.raw() as late:
            welcome = late.hello(Hello(SESSION, 4, TOKEN))
            assert (welcome.status, welcome.text) == (
                HelloStatus.BUSY,
                "tcp_connections_max is 3",
            )
        for peer in peers:
            peer.close()
    finally:
        bench.close()


# ---- the fence ---------------------------------------------------------------------------------


def test_the_lock_is_held_as_long_as_a_connection_is_open(bench: TcpBench) -> None:
    one, two = bench.connect(), bench.connect()
    assert not bench.liveness.is_dead(1)
    one.close()
    eventually(lambda: bench.counters()["tcp_connections"] == 1, "one is gone")
    assert not bench.liveness.is_dead(1)
    two.close()
    eventually(lambda: bench.counters()["tcp_connections"] == 0, "both are gone")
    assert bench.liveness.is_dead(1)
    assert bench.liveness.known() == [], "nobody takes the client for a dead one of shm"
    with bench.connect():
        assert not bench.liveness.is_dead(1), "it may come back"


def test_a_client_that_writes_through_shm_has_no_second_way(bench: TcpBench) -> None:
    fd = bench.liveness.grant(1)
    try:
        with bench.raw() as peer:
            assert peer.hello(Hello(SESSION, 1, TOKEN)).status is HelloStatus.REFUSED
    finally:
        os.close(fd)


def test_a_dropped_client_lets_go_in_mid_frame(bench: TcpBench) -> None:
    place = bench.reserve()
    payload = payload_of(WHOLE)
    with bench.connect() as peer, bench.connect(client=2) as other:
        peer.begin_write(place, WHOLE, sums_of(payload, CELL))
        peer.sock.sendall(payload[:1000])
        bench.ask(lambda: bench.endpoint.drop(1))
        eventually(lambda: bench.liveness.is_dead(1), "the lock is free")
        assert peer.ended()
        assert not bench.liveness.is_dead(2)
        assert other.write(bench.reserve(1, client=2), WHOLE, payload).status is Status.OK
    assert not bench.ask(lambda: bench.endpoint.attached(1))


def test_a_client_whose_session_has_ended_is_dropped(bench: TcpBench) -> None:
    with bench.connect() as peer:
        bench.alive = False
        assert peer.ended()
        eventually(lambda: bench.liveness.is_dead(1), "the lock is free")


def test_closing_ends_connections_and_locks(tmp_path: Path) -> None:
    bench = TcpBench(tmp_path / "host")
    peer = bench.connect()
    bench.close()
    assert peer.ended()
    assert bench.liveness.is_dead(1)
    peer.close()


# ---- processes ---------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    bench = TcpBench(tmp_path / "host", workers=1)
    try:
        place = bench.reserve()
        payload = payload_of(WHOLE)
        with bench.connect() as peer:
            assert peer.write(place, WHOLE, payload).status is Status.OK
            assert bench.cells().tobytes() == payload
            (pid,) = bench.ask(lambda: bench.endpoint.pids)
            os.kill(pid, 9)
            assert peer.ended()
        eventually(lambda: bench.liveness.is_dead(1), "the lock is free")
        with bench.connect() as peer:
            assert peer.write(place, WHOLE, payload).status is Status.OK
        assert bench.counters()["tcp_worker_restarts"] == 1
        (fresh,) = bench.ask(lambda: bench.endpoint.pids)
        assert fresh != pid
    finally:
        bench.close()


def test_a_stopped_worker_keeps_its_clients_locks(tmp_path: Path) -> None:
    """Its slots must stay in quarantine: it goes on where it stood."""
    bench = TcpBench(tmp_path / "host", workers=1)
    try:
        with bench.connect():
            (pid,) = bench.ask(lambda: bench.endpoint.pids)
            os.kill(pid, 19)
            bench.ask(lambda: bench.endpoint.drop(1))
            time.sleep(0.3)
            assert not bench.liveness.is_dead(1)
            os.kill(pid, 18)
            eventually(lambda: bench.liveness.is_dead(1), "it has gone on, and let go")
    finally:
        bench.close()


def test_secrets_are_not_in_the_workers_command_line(tmp_path: Path) -> None:
    bench = TcpBench(tmp_path / "host", workers=1)
    try:
        (pid,) = bench.ask(lambda: bench.endpoint.pids)
        bench.connect().close()
        proc = Path(f"/proc/{pid}")
        secret = bench.endpoint._setup.secret
        shown = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        assert secret.encode() not in shown
        assert bytes.fromhex(secret) not in shown
    finally:
        bench.close()
