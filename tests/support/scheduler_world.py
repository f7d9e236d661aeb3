"""The adapter's scheduler half with a hub that answers when, and what, a test says.

`World` stands for the engine around it: a real block pool, block tables, and a clock that only the
test moves. Needs vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from vllm.v1.core.block_pool import BlockPool

from kvproto.prefix import prefix_hashes
from kvserver_vllm.common import Answer
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.messages import FetchProgress, RankReport, Section, StepMeta
from kvserver_vllm.scheduler import SchedulerHalf

BLOCK = 128
ENGINE_BLOCK = 32
PAGE = 32
SECTION = Section(spec=b"a namespace", layer_start={0: 0})
SECTIONS = (SECTION,)


class FakeHub:
    """Runs submitted work on a loop that only the test turns."""

    opened: ClassVar[list[FakeHub]] = []

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.opened.append(self)
        self.responsive = True
        self.woken = 0
        self.lookups: list[tuple[list[bytes], float, asyncio.Future[Answer | None]]] = []
        self.announced: list[list[bytes]] = []
        self.withdrawn: list[list[bytes]] = []

    def close(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.close()

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        self.woken += 1
        self.loop.create_task(work)

    async def lookup(
        self, sections: Sequence[Section], hashes: Sequence[bytes], pin_s: float, *, tail: bool
    ) -> Answer | None:
        assert sections
        future: asyncio.Future[Answer | None] = self.loop.create_future()
        self.lookups.append((list(hashes), pin_s, future))
        return await future

    async def announce(
        self, sections: Sequence[Section], hashes: Sequence[bytes], ttl_s: float
    ) -> None:
        self.announced.append(list(hashes))

    async def withdraw(self, sections: Sequence[Section], hashes: Sequence[bytes]) -> None:
        self.withdrawn.append(list(hashes))

    def turn(self) -> None:
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def answer(
        self, usable: int, live: int | None = None, at: int = -1, committed: int | None = None
    ) -> None:
        """Answer the latest lookup (or number `at`). `committed` cells; None: a usable block is
        one."""
        self.turn()
        live = usable if live is None else live
        committed = usable if committed is None else committed
        self.lookups[at][2].set_result(Answer(usable, live, (2,) * usable, committed))
        self.turn()

    def fail(self) -> None:
        self.turn()
        self.lookups[-1][2].set_result(None)
        self.turn()


class FakeRequest:
    def __init__(self, name: str, tokens: int, *, seed: int = 0, **attributes: Any) -> None:
        self.request_id = name
        self.all_token_ids = [(seed * 7919 + i) % 50_000 for i in range(tokens)]
        self.num_prompt_tokens = tokens
        self.num_computed_tokens = 0
        self.lora_request = None
        self.cache_salt = None
        self.mm_features: list[Any] = []
        self.prompt_embeds = None
        self.kv_transfer_params: dict[str, Any] | None = None
        self.sampling_params = SimpleNamespace(prompt_logprobs=None)
        self.skip_reading_prefix_cache = False
        self.abort_immediately = False
        self.resumable = False
        self.finished = False
        for attribute, value in attributes.items():
            setattr(self, attribute, value)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def is_finished(self) -> bool:
        return self.finished

    def hashes(self, *, tail: bool = False) -> list[bytes]:
        return prefix_hashes(self.all_token_ids, BLOCK, tail=tail)


@dataclass
class World:
    hub: FakeHub = field(default_factory=FakeHub)
    now: float = 100.0
    tables: dict[str, list[int]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    blocks: int = 200

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks, enable_caching=True, hash_block_size=ENGINE_BLOCK)
        options = {
            "group_tokens": [ENGINE_BLOCK],
            "ranks": 1,
            "loads": True,
            "saves": True,
            "prefix_caching": True,
            "adapter_digest": lambda lora: lora.digest,
            **self.options,
        }
        settings = Settings.parse({"address": "hub:1", **self.settings})
        log = EventLog("")
        self.half = SchedulerHalf(settings, self.hub, log, clock=lambda: self.now, **options)
        self.half.bind_pool(self.pool)
        self.half.open(SECTIONS, PAGE, tails=True)

    def new(self, request: FakeRequest, *, usable: int | None = None) -> FakeRequest:
        """A request arrives; with `usable`, its lookup is answered at once."""
        self.half.on_new_request(request)
        self.ask()
        if usable is not None:
            self.hub.answer(usable)
        return request

    def match(self, request: FakeRequest, computed: int = 0) -> tuple[int | None, bool]:
        matched = self.half.matched_tokens(request, computed)
        self.ask()
        return matched

    def ask(self) -> None:
        """What the next step would ask the hub, at once."""
        self.half._common.send()
        self.hub.turn()

    def alloc(self, request: FakeRequest, tokens: int = 0) -> list[int]:
        """Allocate a table for the whole request and tell the half, like the scheduler."""
        count = -(-request.num_tokens // ENGINE_BLOCK)
        table = self.tables.get(request.request_id)
        if table is None:
            table = [block.block_id for block in self.pool.get_new_blocks(count)]
            self.tables[request.request_id] = table
        self.half.after_alloc(request, [table], tokens)
        self.hub.turn()
        return table

    def step(self, **scheduled: int) -> StepMeta:
        state = SimpleNamespace(get_block_ids=lambda name: (self.tables[name],))
        output = SimpleNamespace(num_scheduled_tokens=scheduled, kv_connector_block_state=state)
        meta = self.half.build_meta(output)
        self.hub.turn()
        return meta

    def report(
        self,
        *,
        saved: dict[int, int] | None = None,
        failed: dict[str, int] | None = None,
        received: set[str] | None = None,
        fetched: dict[str, FetchProgress] | None = None,
    ) -> None:
        """News of the one rank."""
        news = {name: {0: progress} for name, progress in (fetched or {}).items()}
        report = RankReport(saved or {}, failed or {}, news) if saved or failed or news else None
        self.half.ranks_reported(report, received or set())

    def pinned(self, table: Sequence[int]) -> list[int]:
        return [block for block in table if self.pool.blocks[block].ref_cnt > 1]


def start_load(world: World, request: FakeRequest, computed: int = 0) -> StepMeta:
    tokens, asynchronous = world.match(request, computed)
    assert asynchronous
    assert tokens
    world.alloc(request, tokens)
    return world.step()
