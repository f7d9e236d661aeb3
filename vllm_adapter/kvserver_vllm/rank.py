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
from kvserver_vllm.layout import Pages, of_group
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import BlockPages, FetchProgress, Section, StepMeta


@dataclass
class Outbox:
    """What the link's thread has finished and the engine's thread will report."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    saved: dict[int, int] = field(default_factory=dict)
    given_up: list[bytes] = field(default_factory=list)
    received: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    invalid: set[int] = field(default_factory=set)
    fetched: dict[str, FetchProgress] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class RankSection:
    """This rank's layers of one section (sections.py)."""

    window: int
    """As in `Section`: tells which one it is."""
    pages: Pages
    layers: tuple[str, ...]
    """Names, in the order of `pages`."""
    head_start: int

    def order(self, meta: StepMeta) -> Section:
        """What the scheduler half says of this section."""
        return next(s for s in meta.sections if s.window == self.window)

    def region(self, meta: StepMeta, stage: int) -> Region:
        """Its place in the section's grid, on this pipeline stage."""
        start = self.order(meta).layer_start[stage]
        heads = (self.head_start, self.head_start + self.pages.heads)
        return Region(start, start + self.pages.layers, *heads)

    def whole(self, page_ids: Sequence[int]) -> bool:
        """Whether its layers have all pages of a block."""
        return len(self.pages.present(page_ids)) == self.pages.count(page_ids)

    def select(self, page_ids: Sequence[int], groups: int) -> tuple[int, ...]:
        """Without the pages that this section's layers do not have."""
        kept = self.pages.present(page_ids)
        lists = [of_group(page_ids, group, groups) for group in range(groups)]
        return tuple(ids[at] for ids in lists for at in kept)


@dataclass
class Rank:
    """This rank's sections and its way to the hub. The engine has KV cache groups of blocks of
    `group_tokens` tokens each."""

    settings: Settings
    link: HubLink
    log: EventLog
    sections: Sequence[RankSection]
    stage: int
    group_tokens: tuple[int, ...]
    index: int = 0
    """Its number among all ranks of the engine."""
    outbox: Outbox = field(default_factory=Outbox)
    counters: dict[str, int] = field(default_factory=dict)
    queued: int = 0  # pushes under way
    fetched_bytes: int = 0  # what fetches count for (staging.py)

    def __post_init__(self) -> None:
        gauges = {
            "staging_bytes": lambda: self.link.staging_bytes,
            "pushes_queued": lambda: self.queued,
            "fetched_bytes": lambda: self.fetched_bytes,
        }
        who = f"{self.stage}.{self.sections[0].head_start}"
        self.figures = Recorder(who, self.counters, gauges)

    @property
    def page_tokens(self) -> int:
        """Equal in all sections."""
        return self.sections[0].pages.format.page_tokens

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def log_cells(
        self,
        event: str,
        section: RankSection,
        region: Region,
        block: BlockPages,
        moved: int = 0,
        tier: int = 0,
    ) -> None:
        """Log a hash of what stands in the engine's pages, by layer and head of the section, and by
        page of those that are there: `at` are their positions in the block."""
        pages = section.pages
        groups = len(self.group_tokens)
        chosen = section.select(block.pages, groups)
        present = len(chosen) // groups
        cells = np.empty((pages.layers, pages.heads, present, pages.format.page_bytes), np.uint8)
        pages.gather(0, pages.layers, chosen, cells)
        pages.format.zero_behind(cells, block.tokens)
        hashes = [
            [[f"{checksum(page):016x}" for page in cell] for cell in layer] for layer in cells
        ]
        self.log.write(
            event,
            request=block.request,
            hash=block.hash.hex(),
            window=section.window,
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            pages=present,
            at=pages.present(block.pages),
            cells=hashes,
            bytes=moved or int(cells.nbytes),
            tier=tier,
        )
