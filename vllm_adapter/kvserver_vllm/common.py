"""What the rooms of the scheduler half share: the hub's face, the engine's facts, one request.

`Common` is written by the scheduler half only (see scheduler.py); lookups.py, loads.py and saves.py
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvserver_vllm.chain import Chain
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import BlockPages


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hub said about a chain: blocks that can be loaded, and that may come yet."""

    usable: int
    live: int
    tiers: tuple[int, ...] = ()


class Hub(Protocol):
    """What this half needs of the hub. `spec` is a namespace's canonical encoding."""

    @property
    def responsive(self) -> bool:
        """False while the hub is known not to answer."""

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the hub's thread."""

    async def lookup(self, spec: bytes, hashes: Sequence[bytes], pin_s: float) -> Answer | None:
        """None when there is no answer: unreachable, refused or too late."""

    async def announce(self, spec: bytes, hashes: Sequence[bytes], ttl_s: float) -> None: ...


class Tracked:
    """What this half knows of one request. The hub's thread writes `reply` only."""

    def __init__(self, request: Any, chain: Chain | None) -> None:
        self.request = request
        self.chain = chain
        self.reply: tuple[int, Answer | None] | None = None
        self.asks = 0
        self.asked_at = 0.0
        self.answer: Answer | None = None
        self.answered_at = 0.0
        self.missed = False
        self.blocked_since: float | None = None
        self.live_since: float | None = None
        self.matched_from = 0
        self.announced: list[bytes] | None = None
        self.saved = 0

    @property
    def pending(self) -> bool:
        return self.asks > 0 and self.answer is None and not self.missed


@dataclass
class Common:
    """The engine and the hub, as all rooms see them."""

    settings: Settings
    hub: Hub
    log: EventLog
    clock: Callable[[], float]
    engine_block: int
    loads: bool
    saves: bool
    prefix_caching: bool
    adapter_digest: Callable[[Any], bytes]
    spec: bytes = b""
    page_tokens: int = 1
    pool: Any = None
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def block(self) -> int:
        """Tokens of a hub block."""
        return self.settings.block_tokens

    def count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def block_pages(
        self, tracked: Tracked, index: int, block_ids: Sequence[int], begin: int = 0
    ) -> BlockPages:
        """Page ids of hub block `index`; pages before token `begin` and null blocks are skipped."""
        chain = tracked.chain
        assert chain is not None
        page, per_block = self.page_tokens, self.engine_block // self.page_tokens
        null = int(self.pool.null_block.block_id) if self.pool is not None else -1
        pages = []
        for token in range(index * self.block, (index + 1) * self.block, page):
            engine, within = divmod(token, self.engine_block)
            skip = token < begin or block_ids[engine] == null
            pages.append(SKIP if skip else block_ids[engine] * per_block + within // page)
        return BlockPages(
            hash=chain.hashes[index],
            parent=chain.parent(index),
            pages=tuple(pages),
            request=tracked.request.request_id,
        )

    def engine_blocks(self, block: BlockPages) -> list[int]:
        """The engine blocks that its pages lie in."""
        per_block = self.engine_block // self.page_tokens
        return sorted({page // per_block for page in block.pages if page != SKIP})
