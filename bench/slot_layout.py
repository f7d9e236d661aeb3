"""Slot layouts [layer][head][page] and [layer][page][head]: what a push and a pull cost in each.

    python -m bench.slot_layout [--quick] [--row-bytes N] [--out FILE]

Method. An arena of slots and an engine's KV tensors, both much larger than the caches, in one
process and one thread. A sample copies every slot once, in random order, by the same strided NumPy
copies that the adapter makes: one per layer where a block's engine blocks are neighbours, one per
layer and engine block where they are scattered. Each sample is set against a memcpy sample of the
same bytes taken just before it, and the median of those ratios is the figure: the speed of a
machine drifts, ratios less.

The engine's tensors are `LBHNC` (heads outside tokens) or `LBNHC` (tokens outside heads); a rank
with half of the heads (tensor parallelism) has tensors of its own with half of the heads. Checksums
are xxh3-64 per cell: one call where a cell is contiguous, a running one over its pages where not.
An extent is a contiguous run of the slot: what one descriptor or one iovec names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from bench import machine, report

Bytes = npt.NDArray[np.uint8]
SLOT_LAYOUTS = ("head,page", "page,head")
ENGINE_LAYOUTS = ("LBHNC", "LBNHC")
ACTIONS = ("push", "pull")
_SEED = 20_260_101


@dataclass(frozen=True)
class Shape:
    """A block as engine and hub see it. `row_bytes` is K and V of one token and head."""

    layers: int
    heads: int
    pages: int
    page_tokens: int
    row_bytes: int
    slots: int

    @property
    def cell_bytes(self) -> int:
        return self.pages * self.page_tokens * self.row_bytes

    @property
    def slot_bytes(self) -> int:
        return self.layers * self.heads * self.cell_bytes


# Llama-3-8B's KV in bf16 (8 heads of 128, K and V), pages of 16 tokens, blocks of 128.
FULL = Shape(layers=32, heads=8, pages=8, page_tokens=16, row_bytes=512, slots=24)
QUICK = Shape(layers=4, heads=4, pages=4, page_tokens=16, row_bytes=128, slots=4)


@dataclass(frozen=True)
class Figure:
    """One line of the table. `ratio` is the rate over memcpy's in the same seconds."""

    what: str
    engine: str
    heads: str
    slot: str
    ratio: float
    gib_per_s: float
    extents: int


class Copies:
    """One engine, one arena, and the copies between them. `half` is a rank with half the heads."""

    def __init__(
        self, shape: Shape, *, engine: str, slot: str, half: bool, scattered: bool
    ) -> None:
        random = np.random.default_rng(_SEED)
        self.shape = shape
        self.by_head = slot == SLOT_LAYOUTS[0]
        heads = shape.heads // 2 if half else shape.heads
        self.first, self.stop = (shape.heads - heads, shape.heads)
        blocks = shape.slots * shape.pages
        tokens = shape.page_tokens
        outer = (heads, tokens) if engine == "LBHNC" else (tokens, heads)
        tensors = np.ones((shape.layers, blocks, *outer, shape.row_bytes), np.uint8)
        # As vLLM shows them: [layer][block, head, token, content], whatever lies in memory.
        self.tensors = tensors if engine == "LBHNC" else tensors.transpose(0, 1, 3, 2, 4)
        inner = (shape.heads, shape.pages) if self.by_head else (shape.pages, shape.heads)
        self.arena = np.ones((shape.slots, shape.layers, *inner, tokens, shape.row_bytes), np.uint8)
        self.order = random.permutation(shape.slots).tolist()
        ids = random.permutation(blocks) if scattered else np.arange(blocks)
        self.ids = ids.reshape(shape.slots, shape.pages).tolist()
        self.scattered = scattered
        self.bytes = shape.slots * shape.layers * heads * shape.cell_bytes
        self.extents = self._extents(heads)

    def _extents(self, heads: int) -> int:
        """Contiguous runs of this rank's region in one slot."""
        if heads == self.shape.heads:
            return 1
        return self.shape.layers * (1 if self.by_head else self.shape.pages)

    def pairs(self) -> Iterator[tuple[Bytes, Bytes]]:
        """(slot side, engine side) of each strided copy, both as [.., head, token, content]."""
        heads = slice(self.first, self.stop)
        for slot, layer in product(self.order, range(self.shape.layers)):
            target, source = self.arena[slot, layer], self.tensors[layer]
            if self.scattered:
                for page, block in enumerate(self.ids[slot]):
                    yield (
                        (target[heads, page] if self.by_head else target[page, heads]),
                        source[block],
                    )
                continue
            start = self.ids[slot][0]
            pages = source[start : start + self.shape.pages]
            if self.by_head:
                yield target[heads], pages.transpose(1, 0, 2, 3)
            else:
                yield target[:, heads], pages

    def push(self) -> None:
        for slot_side, engine_side in self.pairs():
            np.copyto(slot_side, engine_side)

    def pull(self) -> None:
        for slot_side, engine_side in self.pairs():
            np.copyto(engine_side, slot_side)

    def checksum(self) -> None:
        """xxh3-64 of each cell of every slot, as a commit or a reader computes it."""
        digest = xxhash.xxh3_64_intdigest
        for slot, layer in product(self.order, range(self.shape.layers)):
            cells = self.arena[slot, layer]
            if self.by_head:
                for head in range(self.first, self.stop):
                    digest(cells[head])
                continue
            for head in range(self.first, self.stop):
                running = xxhash.xxh3_64()
                for page in range(self.shape.pages):
                    running.update(cells[page, head])
                running.intdigest()


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(copies: Copies, work: Callable[[], None], repeats: int) -> tuple[float, float]:
    """(ratio to memcpy, GiB/s): medians of alternating samples over the same bytes."""
    source = np.ones(copies.bytes, np.uint8)
    target = np.ones(copies.bytes, np.uint8)
    step = 4 << 20

    def memcpy() -> None:
        for start in range(0, copies.bytes, step):
            np.copyto(target[start : start + step], source[start : start + step])

    for warm in (memcpy, work):
        warm()
    samples = [(timed(memcpy), timed(work)) for _ in range(repeats)]
    ratio = statistics.median(base / taken for base, taken in samples)
    seconds = statistics.median(taken for _, taken in samples)
    return round(ratio, 3), round(copies.bytes / seconds / (1 << 30), 2)


def figures(shape: Shape, repeats: int) -> Iterator[Figure]:
    """Every case, the two slot layouts of each beside each other."""
    for scattered, engine, half, slot in product(
        (False, True), ENGINE_LAYOUTS, (False, True), SLOT_LAYOUTS
    ):
        copies = Copies(shape, engine=engine, slot=slot, half=half, scattered=scattered)
        blocks = "scattered" if scattered else "neighbours"
        heads = "half" if half else "all"
        for action in ACTIONS:
            ratio, rate = measure(copies, getattr(copies, action), repeats)
            what = f"{action}, engine blocks {blocks}"
            yield Figure(what, engine, heads, slot, ratio, rate, copies.extents)
    for half, slot in product((False, True), SLOT_LAYOUTS):
        copies = Copies(shape, engine="LBHNC", slot=slot, half=half, scattered=False)
        ratio, rate = measure(copies, copies.checksum, repeats)
        heads = "half" if half else "all"
        yield Figure("checksum of each cell", "-", heads, slot, ratio, rate, copies.extents)


def table(rows: list[Figure]) -> str:
    """One line a case, the two slot layouts in columns."""
    cases: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for row in rows:
        cases.setdefault((row.what, row.engine, row.heads), {})[row.slot] = row
    head = ["what", "engine", "heads"]
    head += [f"{c} [{s}]" for s in SLOT_LAYOUTS for c in ("x memcpy", "GiB/s", "extents")]
    lines = []
    for case, found in cases.items():
        both = [found[slot] for slot in SLOT_LAYOUTS]
        cells = [(f"{f.ratio:.2f}", f"{f.gib_per_s:.1f}", str(f.extents)) for f in both]
        lines.append([*case, *cells[0], *cells[1]])
    return report.aligned(head, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.slot_layout")
    parser.add_argument("--quick", action="store_true", help="a small shape: shows that it works")
    parser.add_argument(
        "--row-bytes", type=int, default=FULL.row_bytes, help="K and V of one token and head"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    slots = FULL.slots * FULL.row_bytes // options.row_bytes
    shape, repeats = replace(FULL, row_bytes=options.row_bytes, slots=slots), 9
    if options.quick:
        shape, repeats = QUICK, 3
    rows = list(figures(shape, repeats))
    print(table(rows))
    if options.out is not None:
        result = {
            "machine": machine.facts(),
            "load": machine.load_average(),
            "shape": asdict(shape),
            "figures": [asdict(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
