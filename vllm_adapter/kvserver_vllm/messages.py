"""What the scheduler half and the ranks tell each other.

scheduler -> ranks   `StepMeta`, with every step; it names blocks by hash and pages by page id.
ranks -> scheduler   `RankHolds` once (what this rank holds), `RankReport` when there is news.

All of it is pickled by vLLM and holds plain data only; blocks go in columns (runs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

STALL_S = 1.0
"""Without progress for this long, a writer or the hub counts as gone."""
STATE = -1
"""In place of a window: these layers keep one recurrent state, and nothing of single tokens."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The part of one section's grid that a rank holds, and how its pages are encoded."""

    layers: tuple[int, ...]
    """Global indices of its attention layers, ascending."""
    head_start: int
    heads: int
    encoding: str
    kv_dtype: str
    page_tokens: int
    page_bytes: int
    window: int = 0
    """Tokens that these layers attend to, 0: all, or STATE."""
    trimmed: bool = False
    """The engine gives up the KV of tokens that the window has left behind."""
    groups: tuple[int, ...] = (0,)
    """Its KV cache groups that hold these layers, ascending."""


@dataclass(frozen=True)
class RankHolds(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What one rank holds of each section."""

    sections: tuple[RankInfo, ...]
    attributes: dict[str, str] = field(default_factory=dict)
    """What else decides the numbers (attributes.py), as it stands where the model was built: some
    models (Falcon-H1, DeepSeek) write into their configuration then, which the scheduler half sees
    only where it lives in the same process."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the engine: a namespace, and what a prefix must have of it (sections.py)."""

    spec: bytes
    """The namespace's canonical encoding."""
    layer_start: dict[int, int]
    """First layer of each pipeline rank in the namespace's grid."""
    window: int = 0
    """Tokens that its layers attend to, 0: all, or STATE. No two sections of an engine have the
    same."""
    trimmed: bool = False
    """Only the window at a prefix's end is needed of it."""
    groups: tuple[int, ...] = (0,)
    """KV cache groups of the engine that hold its layers."""

    @property
    def recurrent(self) -> bool:
        return self.window == STATE

    def blocks_needed(self, block_tokens: int, *, tail: bool = False) -> int:
        """How many of a prefix's last blocks are needed, 0: all. They hold the `window` - 1 tokens
        before the next one. `tail`: the last of them may be short."""
        if not self.trimmed:
            return 0
        return max(1, -(-(self.window - 1) // block_tokens)) + tail


class BlockPages(NamedTuple):
    """One hub block and the engine pages that it is copied from or to.

    `pages` are page ids in the order of the block's tokens, group after group (layout.py); -1
    leaves a page alone. A tail holds fewer `tokens` than others, and so fewer pages; the last one
    may be filled in part.
    """

    hash: bytes
    parent: bytes
    pages: tuple[int, ...]
    request: str
    tokens: int


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Blocks whose last token is computed in this step. The pages stay pinned until all ranks
    have reported `job`."""

    job: int
    blocks: Sequence[BlockPages]


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Blocks that a rank is to get hold of before the request has blocks of the engine. A LoadJob
    with `fetched` follows, or the request stands in `StepMeta.drops`."""

    request: str
    hashes: Sequence[bytes]
    tokens: Sequence[int]
    wait_s: float
    """How long to wait for blocks that are being written."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far one rank has come with a FetchJob."""

    whole: int = 0
    """Blocks from the first one on of which it has everything."""
    cells: int = 0
    """Grows with each part that arrives."""
    near: bool = False
    """The rest is there, or will be at once."""
    ended: bool = False
    """Nothing more will come."""
    refused: bool = False
    """Its staging has no room; nothing was begun."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Blocks to load for one request, in chain order. Every rank reports `request` once."""

    request: str
    blocks: Sequence[BlockPages]
    deadline_s: float
    """Seconds from the start of the load."""
    fetched: bool = False
    """Take them from the request's FetchJob."""
    stall_s: float = STALL_S
    """Seconds without progress after which it ends too."""


@dataclass
class StepMeta(KVConnectorMetadata):  # type: ignore[misc]
    """The orders of one step. `sections` stand in every step with orders."""

    sections: tuple[Section, ...] = ()
    saves: Sequence[SaveJob] = ()
    loads: Sequence[LoadJob] = ()
    fetches: Sequence[FetchJob] = ()
    drops: Sequence[str] = ()
    """Requests whose fetch is no longer wanted."""
    aborts: Sequence[str] = ()
    """Requests whose load is no longer wanted; they are reported all the same."""
    voids: Sequence[str] = ()
    """Requests whose load is of a namespace that was left: none of its blocks may be used."""


@dataclass
class RankReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What one rank, or after `aggregate` several, finished since the last step."""

    saved: dict[int, int] = field(default_factory=dict)
    """Job -> ranks that no longer touch its pages."""
    failed: dict[str, int] = field(default_factory=dict)
    """Request -> position in its LoadJob of the first block that did not arrive."""
    fetched: dict[str, dict[int, FetchProgress]] = field(default_factory=dict)
    """Request -> rank -> the latest word on its fetch."""
    lost: list[bytes] = field(default_factory=list)
    """Blocks of saves that a rank has given up."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankReport:
        assert isinstance(other, RankReport)
        saved = dict(self.saved)
        for job, ranks in other.saved.items():
            saved[job] = saved.get(job, 0) + ranks
        failed = dict(self.failed)
        for request, position in other.failed.items():
            failed[request] = min(failed.get(request, position), position)
        fetched = {request: dict(ranks) for request, ranks in self.fetched.items()}
        for request, progress in other.fetched.items():
            fetched.setdefault(request, {}).update(progress)
        return RankReport(saved, failed, fetched, [*self.lost, *other.lost])
