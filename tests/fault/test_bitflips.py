"""One flipped bit anywhere in what a server keeps: never served, and counted (issue point 9).

The server is stopped, a bit is flipped in a file, the server is started again and everything is
pulled. `KVSERVER_FLIPS` sets how many bits per file (default 200, in rounds of many bits each: the
blocks are independent, so one start tests many of them).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kvclient import Client
from tests.support.payload import Blocks
from tests.support.server import ServerProcess

FLIPS = int(os.environ.get("KVSERVER_FLIPS", "200"))
PER_ROUND = 40
BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)
COUNT = 128

Serve = Callable[..., ServerProcess]


def flip_bits(path: Path, rng: random.Random, count: int, extents: Iterable[range]) -> None:
    """Flip `count` random bits of a file within `extents` (byte ranges)."""
    spans = list(extents)
    with path.open("r+b") as file:
        for _ in range(count):
            span = rng.choices(spans, weights=[len(s) for s in spans])[0]
            offset = rng.randrange(span.start, span.stop)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def written(path: Path) -> list[range]:
    """The extents of a sparse file that hold data."""
    extents, at = [], 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            extents.append(range(start, at))
    return extents


def push_all(server: ServerProcess) -> list[bytes]:
    keys = BLOCKS.chain(7, COUNT)
    with Client.connect(server.address) as client:
        result = client.open_namespace(BLOCKS.spec).push(
            keys, BLOCKS.payloads(keys), durable=True, wait_s=30
        )
        assert result.written + result.present == COUNT
    return keys


def pull_all(server: ServerProcess, keys: list[bytes]) -> int:
    """Pulls every block; asserts that no wrong byte was served. Returns how many were found."""
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        out = BLOCKS.out(COUNT)
        result = namespace.pull(keys, out)
        assert BLOCKS.wrong(keys, out, result.found) == []
        return int(sum(result.found))


def dropped(server: ServerProcess) -> int:
    """Blocks, entries or records that the server says it found bad since its start."""
    counters = server.stats().counters
    return sum(n for name, n in counters.items() if "corrupt" in name or "dropped" in name)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["arena", "slots", "journal"])
def test_a_flipped_bit_is_never_served(victim: str, serve: Serve) -> None:
    rng = random.Random(f"flips-{victim}")
    server = serve(host_bytes="64MiB", disk_bytes="128MiB")
    lost = counted = 0
    for start in range(0, FLIPS, PER_ROUND):
        keys = push_all(server)
        server.terminate()
        count = min(PER_ROUND, FLIPS - start)
        disk = Path(str(server.options["disk_path"]))
        if victim == "arena":
            arena = server.host_dir / "arena"
            flip_bits(arena, rng, count, written(arena))
            remove_tree(disk)
        else:
            (server.host_dir / "arena").unlink()
            slots = disk / "slots"
            if victim == "slots":
                flip_bits(slots, rng, count, used_extents(server, slots))
            else:
                files = [
                    p for p in (disk / "journal").iterdir() if p.is_file() and p.stat().st_size
                ]
                for _ in range(count):
                    path = rng.choices(files, weights=[p.stat().st_size for p in files])[0]
                    flip_bits(path, rng, 1, [range(path.stat().st_size)])
        server.start()
        found = pull_all(server, keys)
        lost += COUNT - found
        counted += dropped(server)
        if found < COUNT:
            assert dropped(server) or "journal" in server.log() or "arena" in server.log(), (
                f"{COUNT - found} blocks are gone and nothing says why"
            )
    assert lost, "no flip hit anything: the test is too weak"
    assert counted, "blocks were lost and none was counted"


def used_extents(server: ServerProcess, slots: Path) -> list[range]:
    """Where the slot file holds blocks: what is not all zero, in 16 KiB units."""
    unit = 16 * 1024
    raw = slots.read_bytes()
    zero = bytes(unit)
    return [
        range(at, min(at + unit, len(raw)))
        for at in range(0, len(raw), unit)
        if raw[at : at + unit] != zero[: len(raw) - at]
    ]


def remove_tree(path: Path) -> None:
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()
