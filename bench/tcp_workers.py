"""Data workers of `tcp` as threads of the server and as processes: lookups beside a full stream.

    python -m bench.tcp_workers [--rounds N] [--out FILE]

Method. Two servers run at once, one with `tcp_workers` 0 (threads), one with 1 (a process). A round
takes, of each in turn, lookups of 1,024 keys while nothing else runs, the same beside one
connection that writes as fast as it can, and beside one that reads; then the bare loopback: the
same process sends to a receiver that takes 1 MiB a call into memory as large as the slots. So drift
of the machine meets all of them alike. Streams send whole 4 MiB blocks, pipelined; the server
hashes every cell that it takes in. Sender, server and the process that looks up share the machine's
cores, which is part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import machine
from bench.transfer import wait_resident
from kvproto import frames
from kvproto.frames import Hello, Op, Place, Request
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from tests.support.server import ServerProcess, start_server
from tests.support.tcp import RawTcp, sums_of

KEYS = 1024
LOOKUPS = 60  # per phase
LAYERS, HEADS, CELL = 32, 8, 16 << 10
WHOLE = Region(0, LAYERS, 0, HEADS)
BLOCK = LAYERS * HEADS * CELL
BLOCKS = 64
DEPTH = 4  # frames on their way
MODES = {"threads": 0, "process": 1}
_SLICE = 1 << 20


class Engine:
    """One session of a server, over bare stubs."""

    def __init__(self, address: str, *, layers: int, heads: int, page_bytes: int) -> None:
        self.stub = kvserver_pb2_grpc.CacheStub(grpc.insecure_channel(address))
        self.hello = self.stub.Hello(pb.HelloRequest(protocol_version=1, client_name="bench"))
        self.region = pb.Region(layer_stop=layers, head_stop=heads)
        spec = pb.NamespaceSpec(
            format_version=1, model="bench", weights=bytes(32), kv_dtype="bfloat16",
            encoding="bench/1", block_tokens=128, page_tokens=16, layers=layers, kv_heads=heads,
            page_bytes=page_bytes,
        )  # fmt: skip
        opened = pb.OpenNamespaceRequest(session=self.hello.session, spec=spec)
        self.namespace = self.stub.OpenNamespace(opened).handle
        self.ids = {"session": self.hello.session, "namespace": self.namespace}

    def reserve(self, keys: list[bytes]) -> pb.ReserveReply:
        return self.stub.Reserve(
            pb.ReserveRequest(
                **self.ids, client=self.hello.client, hashes=b"".join(keys),
                parents=bytes(32) + b"".join(keys[:-1]), region=self.region, wait_ms=20_000,
            )
        )  # fmt: skip

    def commit(self, reservation: int, count: int, sums: bytes) -> int:
        message = pb.CommitRequest(
            session=self.hello.session, client=self.hello.client, reservation=reservation,
            indices=np.arange(count, dtype="<u4").tobytes(), region=self.region,
            checksums=sums * count,
        )  # fmt: skip
        return int(self.stub.Commit(message).completed)


def places(hold: int, granted: Any) -> list[Place]:
    offsets = np.frombuffer(granted.offsets, "<u8").tolist()
    generations = np.frombuffer(granted.generations, "<u8").tolist()
    return [
        Place(hold, o, g, CELL, LAYERS, HEADS, WHOLE, granted.permits[16 * i : 16 * i + 16])
        for i, (o, g) in enumerate(zip(offsets, generations, strict=True))
    ]


# ---- the far end: a process that streams when told ---------------------------------------------


class Far:
    """Writes and reads whole blocks through one connection."""

    def __init__(self, address: str, data_address: str) -> None:
        engine = Engine(address, layers=LAYERS, heads=HEADS, page_bytes=CELL // 8)
        self._data = RawTcp(data_address)
        hello = engine.hello
        self._data.hello(Hello(hello.session, hello.client, hello.token))
        self._payload = os.urandom(BLOCK)
        self._sums = sums_of(self._payload, CELL)
        keys = [os.urandom(32) for _ in range(2 * BLOCKS)]
        stored = engine.reserve(keys[:BLOCKS])
        self._writable = places(stored.reservation, stored)
        for place in self._writable:
            self._data.write(place, WHOLE, self._payload)
        assert engine.commit(stored.reservation, BLOCKS, self._sums) == BLOCKS
        request = pb.AcquireRequest(
            **engine.ids, client=hello.client, hashes=b"".join(keys[:BLOCKS]),
            region=engine.region, lease_ms=600_000,
        )  # fmt: skip
        self._readable = [
            place
            for reply in engine.stub.Acquire(request)
            if reply.HasField("grant")
            for place in places(reply.grant.lease, reply.grant)
        ]
        open_ = engine.reserve(keys[BLOCKS:])
        self._writable = places(open_.reservation, open_)
        self._into = memoryview(mmap.mmap(-1, BLOCKS * BLOCK))
        self._into[:: mmap.PAGESIZE] = bytes(BLOCKS * BLOCK // mmap.PAGESIZE)

    def write(self, seconds: float) -> float:
        """Bytes a second."""
        sock, sent, open_ = self._data.sock, 0, 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            place = self._writable[sent % BLOCKS]
            self._data.begin_write(place, WHOLE, b"")
            sock.sendall(self._payload)
            sock.sendall(self._sums)
            sent, open_ = sent + 1, open_ + 1
            if open_ == DEPTH:
                assert self._data.reply().status is frames.Status.OK
                open_ -= 1
        for _ in range(open_):
            assert self._data.reply().status is frames.Status.OK
        return sent * BLOCK / (time.perf_counter() - began)

    def read(self, seconds: float) -> float:
        asked = done = 0
        began = time.perf_counter()
        while done < asked or time.perf_counter() - began < seconds:
            while asked < done + DEPTH and time.perf_counter() - began < seconds:
                place = self._readable[asked % len(self._readable)]
                request = Request(Op.READ, asked, place, WHOLE)
                self._data.sock.sendall(frames.encode_request(request))
                asked += 1
            assert self._data.reply().status is frames.Status.OK
            self._data.receive(place.trailer_bytes)
            fill(self._data.sock, self._into[done % BLOCKS * BLOCK :][:BLOCK])
            assert frames.decode_after(self._data.receive(8))[1] is frames.Status.OK
            done += 1
        return done * BLOCK / (time.perf_counter() - began)

    def bare(self, seconds: float) -> float:
        """To a child that takes 1 MiB a call into as much memory; hashes nothing."""
        listener = socket.create_server(("127.0.0.1", 0))
        child = os.fork()
        if child == 0:
            sock, _ = listener.accept()
            at = 0
            while count := sock.recv_into(self._into[at : at + _SLICE]):
                at = (at + count) % (len(self._into) - _SLICE)
            os._exit(0)
        sent, began = 0, time.perf_counter()
        with socket.create_connection(listener.getsockname()) as sock:
            while time.perf_counter() - began < seconds:
                sock.sendall(self._payload)
                sent += 1
        os.waitpid(child, 0)
        listener.close()
        return sent * BLOCK / (time.perf_counter() - began)


def fill(sock: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += sock.recv_into(view[done : done + _SLICE])


def far_main(address: str, data_address: str) -> None:
    far = Far(address, data_address)
    print("ready", flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(getattr(far, name)(float(seconds)), flush=True)


# ---- the near end ------------------------------------------------------------------------------


class Subject:
    """A server, a session that looks up, and a far end."""

    def __init__(self, stack: ExitStack, workers: int) -> None:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvserver-bench-"))
        self.server: ServerProcess = stack.enter_context(
            start_server(
                Path(scratch), host_bytes="768MiB", tcp_listen="127.0.0.1:0", tcp_workers=workers,
                lease_ms_max=600_000, reservation_ms_max=600_000, session_ttl_ms=600_000,
            )
        )  # fmt: skip
        wait_resident(self.server)  # or a Reserve may find no space yet
        engine = Engine(self.server.address, layers=1, heads=1, page_bytes=512)
        keys = [os.urandom(32) for _ in range(KEYS)]
        reply = engine.reserve(keys)
        assert engine.commit(reply.reservation, KEYS, bytes(8)) == KEYS
        self._engine = engine
        self._request = pb.LookupRequest(**engine.ids, hashes=b"".join(keys))
        command = [sys.executable, "-m", "bench.tcp_workers", "--far", self.server.address]
        self._far = subprocess.Popen(
            [*command, self.server.ready["tcp_listen"]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(self._end)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._far.stdout is not None
        return self._far.stdout.readline().strip()

    def _end(self) -> None:
        self._far.communicate(timeout=10)

    @contextmanager
    def streaming(self, what: str, seconds: float, rates: list[float]) -> Iterator[None]:
        assert self._far.stdin is not None
        self._far.stdin.write(f"{what} {seconds}\n")
        self._far.stdin.flush()
        time.sleep(0.1)
        yield
        rates.append(float(self._line()))

    def lookups(self, seconds: float) -> list[float]:
        """Seconds of each, LOOKUPS of them at most."""
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < LOOKUPS and time.perf_counter() < end:
            began = time.perf_counter()
            found = self._engine.stub.Lookup(self._request).usable_blocks
            taken.append(time.perf_counter() - began)
            assert found == KEYS
            time.sleep(0.002)
        return taken


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    lookups: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        subjects = {mode: Subject(stack, workers) for mode, workers in MODES.items()}
        for _ in range(rounds):
            for mode, subject in subjects.items():
                lookups.setdefault(f"{mode} idle", []).extend(subject.lookups(seconds))
            for what in ("write", "read"):
                for mode, subject in subjects.items():
                    name = f"{mode} {what}"
                    with subject.streaming(what, seconds, rates.setdefault(name, [])):
                        taken = subject.lookups(seconds - 0.3)
                    lookups.setdefault(name, []).extend(taken)
                    alone = rates.setdefault(f"{name} alone", [])
                    with subject.streaming(what, seconds / 2, alone):
                        pass
            with subjects["process"].streaming("bare", seconds / 2, rates.setdefault("bare", [])):
                pass
    bare = statistics.median(rates["bare"])
    return {
        "lookup_ms": {name: _quantiles(taken) for name, taken in lookups.items()},
        "stream": {
            name: {
                "gb_s": round(statistics.median(values) / 1e9, 2),
                "of_bare": round(statistics.median(values) / bare, 2),
            }
            for name, values in rates.items()
        },
    }


def _quantiles(taken: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=100)
    return {"count": len(taken)} | {f"p{p}": round(1e3 * cuts[p - 1], 2) for p in (50, 90, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tcp_workers")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.2, help="of each phase")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--far", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.far:
        far_main(*options.far)
        return
    result = {"machine": machine.facts(), "load_before": machine.load_average()}
    result |= measure(options.rounds, options.seconds)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
