"""One flipped bit anywhere in what a server keeps: never served, and counted (issue point 9).

The server is stopped, bits are flipped in a file, the server is started again and everything is
pulled. `KVSERVER_FLIPS` sets how many bits per file (default 200, in rounds of many bits each: the
blocks are independent, so one start tests many of them). Single bits: `test_bitflips_offline.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kvclient import Client
from kvproto.arena import HEADER_BYTES
from tests.support.payload import Blocks
from tests.support.server import ServerProcess

FLIPS = int(os.environ.get("KVSERVER_FLIPS", "200"))
PER_ROUND = {"arena": 100, "slots": 100, "journal": 50}
BLOCKS = Blocks(layers=4, heads=2, page_bytes=512)
COUNT = 512
UNIT = 16 * 1024

Serve = Callable[..., ServerProcess]
Files = list[tuple[Path, list[range]]]


def used_extents(path: Path) -> list[range]:
    """Where a sparse file holds something: what is not all zero, in units of 16 KiB."""
    extents, zero = [], bytes(UNIT)
    with path.open("rb") as file:
        at = 0
        while part := file.read(UNIT):
            if part != zero[: len(part)]:
                extents.append(range(at, at + len(part)))
            at += len(part)
    return extents


def victims(victim: str, server: ServerProcess, disk: Path) -> Files:
    """The files of a kind and their extents; every file counts alike, every bit of it too."""
    if victim == "arena":
        arena = server.host_dir / "arena"
        header, *rest = used_extents(arena)
        return [(arena, [range(HEADER_BYTES, header.stop), *rest])]  # the header has its own test
    if victim == "slots":
        return [(disk / "slots", used_extents(disk / "slots"))]
    found = sorted((disk / "journal").iterdir())
    files = [path for path in found if path.is_file() and path.stat().st_size]
    return [(path, [range(path.stat().st_size)]) for path in files]


def flip_bits(files: Files, rng: random.Random, count: int) -> None:
    for _ in range(count):
        path, extents = rng.choice(files)
        extent = rng.choices(extents, weights=[len(e) for e in extents])[0]
        flip(path, rng.randrange(extent.start * 8, extent.stop * 8))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def push_all(server: ServerProcess) -> list[bytes]:
    keys = BLOCKS.chain(7, COUNT)
    with Client.connect(server.address, deadline_s=30) as client:
        result = client.open_namespace(BLOCKS.spec).push(
            keys, BLOCKS.payloads(keys), durable=True, wait_s=30
        )
        assert result.written + result.present == COUNT
    return keys


def pull_all(server: ServerProcess, keys: list[bytes]) -> int:
    """Pulls every block; asserts that no wrong byte was served. Returns how many were found."""
    with Client.connect(server.address, deadline_s=30) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        out = BLOCKS.out(COUNT)
        result = namespace.pull(keys, out)
        assert BLOCKS.wrong(keys, out, result.found) == []
        return int(sum(result.found))


def counted(server: ServerProcess) -> int:
    """Blocks, entries and records that the server says it found bad since its start."""
    counters = server.stats().counters
    return sum(n for name, n in counters.items() if name.startswith(("corrupt_", "dropped_")))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["arena", "slots", "journal"])
def test_a_flipped_bit_is_never_served(victim: str, serve: Serve) -> None:
    rng = random.Random(f"flips-{victim}")
    server = serve(host_bytes="64MiB", disk_bytes="128MiB")
    disk = Path(str(server.options["disk_path"]))
    lost = 0
    for start in range(0, FLIPS, PER_ROUND[victim]):
        keys = push_all(server)
        assert server.terminate() == 0
        flip_bits(victims(victim, server, disk), rng, min(PER_ROUND[victim], FLIPS - start))
        if victim == "arena":
            remove_tree(disk)
        else:
            (server.host_dir / "arena").unlink()
        server.start()
        gone = COUNT - pull_all(server, keys)
        lost += gone
        # A journal that is damaged beyond reading does not say how much was in it.
        least = min(gone, 1) if victim == "journal" else gone
        assert counted(server) >= least, f"{gone} blocks are gone, {counted(server)} counted"
    assert lost, "no flip hit anything: the test is too weak"


def test_a_flipped_bit_in_the_header_costs_the_arena_and_is_counted(serve: Serve) -> None:
    server = serve(host_bytes="64MiB")
    with Client.connect(server.address) as client:
        keys = BLOCKS.chain(1, 4)
        client.open_namespace(BLOCKS.spec).push(keys, BLOCKS.payloads(keys))
    server.terminate()
    flip(server.host_dir / "arena", 8 * 40 + 3)
    server.start()
    assert server.ready["warm"] is False
    assert server.stats().counters["dropped_unreadable_arena"] == 1
    with Client.connect(server.address) as client:
        assert not client.open_namespace(BLOCKS.spec).pull(keys, BLOCKS.out(4)).found.any()


def remove_tree(path: Path) -> None:
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()
