"""KV on a CUDA device: how fast pages leave and enter it, and what that costs the engine's thread.

    python -m bench.card [--rounds 15] [--shm-only] [--out FILE]

The KV is that of a Llama 3.1 8B in bf16: 32 layers, 8 heads, engine blocks of 16 tokens; a block of
the hub is 128 tokens, 16 MiB. Ways take turns in each round; figures are medians.

  bare        one copy of as many bytes between the card and pinned memory
  pages       `DevicePages`: gathered on the card, its copy engine, and into unpinned memory as the
              hub's arena is; `heads first` and `tokens first` are the orders that engines have
  pushes      16 blocks from the card to a hub and back into it: straight by NIXL, or through
              host memory by shm and by NIXL; `by pages`, over shm as the adapter does it: gathered
              into the arena and committed, leased, scattered and verified
  marks       microseconds of the engine's thread for a hook

Needs torch and, for the pushes by NIXL, NIXL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench import machine
from bench.transfer import wait_resident
from kvclient import AsyncClient, CommitVerdict, Scattered
from kvclient.staging import aligned
from kvproto import nixlib
from kvserver_vllm.cores import sharing
from kvserver_vllm.device import DevicePages
from kvserver_vllm.layout import TOKEN_ENCODING
from kvserver_vllm.marks import Marks
from tests.support.payload import Blocks
from tests.support.server import start_server

LAYERS, HEADS, TOKENS, CONTENT, BLOCKS = 32, 8, 16, 256, 1024
PAGES = 8  # of a block of the hub
BLOCK_BYTES = LAYERS * HEADS * PAGES * TOKENS * CONTENT * 2
COUNT = 16
Row = dict[str, float | str]


def tensors(order: str) -> list[torch.Tensor]:
    """Logical [blocks, heads, tokens, content] of each layer, over one storage."""
    shape = (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT)
    if order == "tokens first":
        raw = torch.empty((LAYERS, BLOCKS, TOKENS, HEADS, CONTENT), dtype=torch.bfloat16)
        raw = raw.cuda().normal_()
        return list(raw.transpose(2, 3))
    return list(torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_())


def pages(rounds: int) -> list[Row]:
    """Whole blocks, and one layer of eight of them, as a layer's hook pushes it."""
    out = aligned(BLOCK_BYTES).reshape(LAYERS, HEADS, PAGES, -1)
    out[:] = 0
    part = aligned(BLOCK_BYTES // LAYERS * 8).reshape(1, HEADS, 8 * PAGES, -1)
    part[:] = 0
    pinned = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("bare", "out, 16 MiB"): lambda: pinned.copy_(device),
        ("bare", "in, 16 MiB"): lambda: device.copy_(pinned),
    }
    rng = np.random.default_rng(1)
    for order in ("heads first", "tokens first"):
        held = DevicePages(TOKEN_ENCODING, tensors(order))
        ids = rng.permutation(BLOCKS)[: 8 * PAGES].tolist()
        one, many = ids[:PAGES], ids
        ways |= {
            (order, "out, a block"): lambda p=held, i=one: p.gather(0, LAYERS, i, out),
            (order, "in, a block"): lambda p=held, i=one: p.scatter(0, LAYERS, i, out),
            (order, "out, a layer of 8 blocks"): lambda p=held, i=many: p.gather(3, 4, i, part),
        }
    sizes = {what: part.nbytes if "layer" in what else BLOCK_BYTES for _, what in ways}
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if number:
                found[way].append(time.perf_counter() - began)
    return [
        {
            "way": who, "what": what, "ms": round(statistics.median(times) * 1e3, 2),
            "gb_s": round(sizes[what] / statistics.median(times) / 1e9, 2),
        }
        for (who, what), times in found.items()
    ]  # fmt: skip


def marks(rounds: int) -> list[Row]:
    mark = Marks(torch.device("cuda:0"), lambda function, *args: function(*args))
    times = []
    for _ in range(rounds * 32):
        torch.cuda._sleep(20_000)
        began = time.perf_counter()
        mark.after(lambda _: None)
        times.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    mark.close()
    ordered = sorted(times)
    p99 = round(ordered[len(ordered) * 99 // 100], 1)
    return [{"way": "a hook", "what": "us", "p50": round(statistics.median(times), 1), "p99": p99}]


class Pushes:
    """One way between the card and a hub: `push` and `pull` of COUNT blocks."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self.name = name
        self._client = client
        self._direct = name == "nixl, straight"
        self._blocks = Blocks(layers=LAYERS, heads=HEADS, page_bytes=TOKENS * CONTENT * 2)
        shape = (COUNT, *self._blocks.shape)
        self._card = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        self._back = torch.zeros_like(self._card)
        self._places = [Scattered.of(one) for one in self._card]
        self._targets = [Scattered.of(one) for one in self._back]
        self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    async def open(self) -> None:
        self.began = 0.0
        self._namespace = await self._client.open_namespace(self._blocks.spec)
        if self._direct:
            await self._client.register(self._card)
            await self._client.register(self._back)

    async def push(self, seed: int) -> None:
        keys = self._blocks.chain(seed, COUNT)
        if self._direct:
            result = await self._namespace.push(keys, self._places)
        else:
            self._host.copy_(self._card)
            result = await self._namespace.push(keys, self._host.numpy())
        assert result.written == COUNT

    async def pull(self, seed: int) -> None:
        keys = self._blocks.chain(seed, COUNT)
        if self._direct:
            result = await self._namespace.pull(keys, self._targets)
        else:
            result = await self._namespace.pull(keys, self._host.numpy())
            self._back.copy_(self._host)
        assert result.found.all()

    def check(self) -> None:
        assert torch.equal(self._card, self._back)
        self._back.zero_()
        torch.cuda.synchronize()


class ByPages(Pushes):
    """The adapter's way."""

    async def open(self) -> None:
        await super().open()
        self._kv = tensors("heads first")
        self._pages = DevicePages(TOKEN_ENCODING, self._kv)
        self._ids = np.arange(COUNT * PAGES).reshape(COUNT, PAGES).tolist()
        self._sent = [layer[: COUNT * PAGES].clone() for layer in self._kv]

    async def push(self, seed: int) -> None:
        reservation = await self._namespace.reserve(self._blocks.chain(seed, COUNT))
        async with reservation:
            for index, ids in enumerate(self._ids):
                self._pages.gather(0, LAYERS, ids, reservation.cells(index))
            verdicts = await reservation.commit()
        assert (verdicts == CommitVerdict.OK).all()

    async def pull(self, seed: int) -> None:
        for layer in self._kv:
            layer[: COUNT * PAGES].zero_()
        torch.cuda.synchronize()
        self.began = time.perf_counter()
        async with self._namespace.acquire(self._blocks.chain(seed, COUNT)) as stream:
            async for granted in stream:
                self._pages.scatter(0, LAYERS, self._ids[granted.index], granted.cells)
                threads = sharing() > 1
                assert await granted.verified() if threads else granted.verify()
                await granted.release()

    def check(self) -> None:
        for layer, sent in zip(self._kv, self._sent, strict=True):
            assert torch.equal(layer[: COUNT * PAGES], sent)


async def pushes(rounds: int, *, nixl: bool) -> list[Row]:
    names = {"shm, through the host": {"transport": "shm"}, "shm, by pages": {"transport": "shm"}}
    if nixl:
        names["nixl, through the host"] = {"transport": "nixl"}
        names["nixl, straight"] = {"transport": "nixl", "direct": True}
    host_bytes = 3 * len(names) * COUNT * BLOCK_BYTES
    found: dict[tuple[str, str], list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        start_server(Path(directory), host_bytes=host_bytes, nixl_enabled=nixl) as server,
    ):
        await asyncio.to_thread(wait_resident, server)
        ways = []
        for name, options in names.items():
            client = await AsyncClient.connect(
                server.address, deadline_s=60, copy_threads=max(2, sharing()), **options
            )
            ways.append((ByPages if name.endswith("pages") else Pushes)(client, name))
            await ways[-1].open()
        for number in range(rounds + 3):  # the first ones are each slot's first write
            for way in ways:
                seed = 1000 * number + ways.index(way)
                for word, call in (("push", way.push), ("pull", way.pull)):
                    way.began = time.perf_counter()
                    await call(seed)
                    torch.cuda.synchronize()
                    if number >= 3:
                        spent = time.perf_counter() - way.began
                        found.setdefault((way.name, word), []).append(spent)
                way.check()
        for way in ways:
            await way._client.close()
    size = COUNT * BLOCK_BYTES
    return [
        {
            "way": who, "what": f"{what} of {size >> 20} MiB",
            "ms": round(statistics.median(times) * 1e3, 1),
            "gb_s": round(size / statistics.median(times) / 1e9, 2),
        }
        for (who, what), times in found.items()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shm-only", action="store_true", help="no pushes by NIXL")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    card = torch.cuda.get_device_name()
    rows = pages(options.rounds) + marks(options.rounds)
    rows += asyncio.run(pushes(options.rounds, nixl=nixlib.available() and not options.shm_only))
    result = {"machine": machine.facts(), "card": card, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(result["machine"])
    print(card)
    for row in rows:
        figures = "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("way", "what"))
        print(f"{row['way']:24} {row['what']:28} {figures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
