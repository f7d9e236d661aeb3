"""One rank of the engine: the part of the grid that it holds, and what it will report.

worker.py, pushing.py and pulling.py share it. `Outbox` is what the link's thread has finished and
the engine's thread will take.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvproto.checksum import checksum
from kvproto.grid import Region
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.figures import Recorder
from kvserver_vllm.layout import SKIP, Pages
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import FetchProgress, LoadJob, SaveJob, StepMeta


@dataclass
class Outbox:
    """What the link's thread has finished and the engine's thread will report."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    saved: dict[int, int] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    invalid: set[int] = field(default_factory=set)
    fetched: dict[str, FetchProgress] = field(default_factory=dict)


@dataclass
class Rank:
    """This rank's pages, their place in the grid, and its way to the hub."""

    settings: Settings
    link: HubLink
    log: EventLog
    pages: Pages
    stage: int
    head_start: int
    index: int = 0
    """Its number among all ranks of the engine."""
    outbox: Outbox = field(default_factory=Outbox)
    counters: dict[str, int] = field(default_factory=dict)
    queued: int = 0  # pushes under way

    def __post_init__(self) -> None:
        gauges = {
            "staging_bytes": lambda: self.link.staging_bytes,
            "pushes_queued": lambda: self.queued,
        }
        who = f"{self.stage}.{self.head_start}"
        self.figures = Recorder(who, self.counters, gauges)

    def region(self, meta: StepMeta) -> Region:
        start = meta.layer_start[self.stage]
        heads = (self.head_start, self.head_start + self.pages.heads)
        return Region(start, start + self.pages.layers, *heads)

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def log_cells(
        self,
        event: str,
        pages: Sequence[int],
        region: Region,
        job: SaveJob | LoadJob,
        index: int,
        moved: int = 0,
        tier: int = 0,
    ) -> None:
        """Log a hash of what stands in the engine's pages, by head over all layers of the rank."""
        block = job.blocks[index]
        present = [page for page in pages if page != SKIP]
        shape = (self.pages.layers, self.pages.heads, len(present), self.pages.format.page_bytes)
        cells = np.empty(shape, dtype=np.uint8)
        self.pages.gather(0, self.pages.layers, present, cells)
        self.pages.format.zero_behind(cells, block.tokens)
        hashes = [
            f"{checksum(np.ascontiguousarray(cells[:, head])):016x}"
            for head in range(self.pages.heads)
        ]
        self.log.write(
            event,
            request=block.request,
            hash=block.hash.hex(),
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            pages=len(present),
            cells=hashes,
            bytes=moved or int(cells.nbytes),
            tier=tier,
        )
