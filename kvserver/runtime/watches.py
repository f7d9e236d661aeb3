"""Watchers: what the core tells of blocks that moved, kept for as long as the slowest may lag.

Theory of operation. Each watched tenant has one log of segments: changes of one namespace, packed
once as they will be sent, at most SEGMENT_BLOCKS_MAX of them, gathered over BATCH_S. A watcher is a
position in its tenant's log and a row that its walk through the table has come to; it takes its
next step when its stream has taken the last one. So a watcher costs the hub nothing while it is
slow, and many cost little more than one.

Rule 1: memory is bounded by the log, `changes_max` a watched tenant, never by a watcher. One whose
position has fallen out of the log starts again: a reset, and a walk from the first row.
Rule 2: the walk goes on only when nothing is left in the log, one piece of WALK_ROWS rows a step.
Rule 3: a watcher sees its session's tenant only, and ends with its session.
Rule 4: while nobody watches, the core is told so and notes nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from kvproto.namespace import NamespaceSpec
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Event
from kvserver.core.events import Watch as Tell
from kvserver.core.hub import Hub
from kvserver.core.instructions import Moved, MovedTooMuch, Residence, TiersUp

BATCH_S = 0.02
IDLE_S = 5.0  # a step comes at least this often
SEGMENT_BLOCKS_MAX = 2048
WALK_ROWS = 2048


class Kind(IntEnum):
    """The numbers are those of the protocol."""

    IDLE = 0
    RESET = 1
    BLOCKS = 2
    SYNCED = 3
    FORGOTTEN = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed residences of one namespace; none, and `forgotten`, when it is gone."""

    spec: NamespaceSpec
    count: int
    hashes: bytes  # count x 32
    parents: bytes  # count x 32
    tokens: bytes  # count x u32
    tiers: bytes  # count x u8
    forgotten: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What a watcher is told at once."""

    kind: Kind
    reason: str = ""
    segment: Segment | None = None


def pack(spec: NamespaceSpec, blocks: Collection[Residence]) -> Segment:
    return Segment(
        spec,
        len(blocks),
        hashes=b"".join(block.key for block in blocks),
        parents=b"".join(block.parent for block in blocks),
        tokens=np.fromiter((block.tokens for block in blocks), "<u4").tobytes(),
        tiers=bytes(block.tiers for block in blocks),
    )


class _Log:
    """A tenant's changes: `segments[0]` has the number `first`; `gathering` is not packed yet."""

    def __init__(self, changes_max: int) -> None:
        self._changes_max = changes_max
        self.first = 0
        self.segments: deque[Segment] = deque()
        self.changes = 0
        self.gathering: dict[bytes, tuple[NamespaceSpec, dict[bytes, Residence]]] = {}
        self.watchers: set[Watcher] = set()

    @property
    def end(self) -> int:
        return self.first + len(self.segments)

    def gather(self, moved: Moved) -> bool:
        """Keep changes for the next segments; True when those should be closed now."""
        if moved.forgotten:
            self.close(moved.spec.id)
            self._append(Segment(moved.spec, 0, b"", b"", b"", b"", forgotten=True))
            return True
        _, blocks = self.gathering.setdefault(moved.spec.id, (moved.spec, {}))
        for block in moved.blocks:
            blocks[block.key] = block
            if len(blocks) >= SEGMENT_BLOCKS_MAX:
                self._append(pack(moved.spec, blocks.values()))
                blocks.clear()
        return False

    def close(self, *namespaces: bytes) -> None:
        """Pack what was gathered; of all namespaces when none is named."""
        for identity in namespaces or list(self.gathering):
            spec, blocks = self.gathering.pop(identity, (None, {}))
            if spec is not None and blocks:
                self._append(pack(spec, blocks.values()))

    def _append(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.changes += max(1, segment.count)
        while self.changes > self._changes_max and len(self.segments) > 1:
            self.changes -= max(1, self.segments.popleft().count)
            self.first += 1

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.wake.set()


@dataclass(eq=False, slots=True)
class Watcher:
    """A stream: of one namespace, or of all of its tenant with an empty `namespace_id`."""

    session: int
    tenant: str
    namespace_id: bytes
    log: _Log
    reset: str = "start"  # why it must begin anew; empty: it must not
    position: int = 0
    row: int = 0
    walking: bool = False
    synced: bool = False  # it was told that the walk is through
    stirred: bool = False  # a step is due, even if it is an idle one
    ended: CoreError | None = None
    found: deque[Segment] = field(default_factory=deque)  # of the walk, at most a piece
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def wants(self, spec: NamespaceSpec) -> bool:
        named = not self.namespace_id or spec.id == self.namespace_id
        return named and spec.tenant == self.tenant


class Watches:
    """See the module. On the loop's thread; `tell` hands the core an event."""

    def __init__(
        self,
        hub: Hub,
        tell: Callable[[Event], None],
        *,
        watchers_max: int,
        changes_max: int,
        idle_s: float = IDLE_S,
    ) -> None:
        self._hub = hub
        self._tell = tell
        self._watchers_max = watchers_max
        self._changes_max = changes_max
        self.idle_s = idle_s
        self._logs: dict[str, _Log] = {}  # by tenant
        self._due: asyncio.TimerHandle | None = None
        self.open = 0
        self.overflows = 0
        self.told = 0  # blocks, once for each watcher

    # ---- from the core

    def carry_out(self, instruction: Moved | MovedTooMuch | TiersUp) -> None:
        """Cheap: what has to be packed waits for a timer, unless it is many."""
        match instruction:
            case Moved(spec=spec):
                log = self._logs.get(spec.tenant)
                if log is not None and log.gather(instruction):
                    log.wake()
                elif log is not None and self._due is None:
                    loop = asyncio.get_running_loop()
                    self._due = loop.call_later(BATCH_S, self.flush)
            case MovedTooMuch():
                for watcher in self._all():
                    watcher.reset = "overflow"
                    watcher.wake.set()
            case TiersUp():
                for watcher in self._all():
                    watcher.stirred = True
                    watcher.wake.set()

    def flush(self) -> None:
        """Pack what was gathered, and wake who waits for it."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        for log in self._logs.values():
            log.close()
            log.wake()

    def _all(self) -> list[Watcher]:
        return [watcher for log in self._logs.values() for watcher in log.watchers]

    # ---- watchers

    async def steps(
        self, session: int, tenant: str, namespace_id: bytes
    ) -> AsyncGenerator[Step, None]:
        """A watcher's steps, until it is closed or its session ends (CoreError)."""
        watcher = self._enter(session, tenant, namespace_id)
        clock = asyncio.get_running_loop().time
        idle_at = clock() + self.idle_s
        try:
            while True:
                step = self._next(watcher)
                if step is not None:
                    yield step
                    idle_at = clock() + self.idle_s
                    continue
                watcher.wake.clear()
                try:
                    async with asyncio.timeout_at(idle_at):
                        await watcher.wake.wait()
                except TimeoutError:
                    watcher.stirred = True
        finally:
            self._leave(watcher)

    def _enter(self, session: int, tenant: str, namespace_id: bytes) -> Watcher:
        if self.open >= self._watchers_max:
            raise CoreError(
                ErrorKind.LIMIT,
                f"watchers_max is {self._watchers_max} and reached",
                field="watchers_max",
                limit=self._watchers_max,
            )
        if namespace_id:
            handle = self._hub.namespace_of(namespace_id)
            if handle is None or self._hub.spec_of(handle).tenant != tenant:
                raise CoreError(ErrorKind.NOT_FOUND, "no such namespace", field="namespace_id")
        if not self._logs:
            self._tell(Tell(on=True))
        log = self._logs.setdefault(tenant, _Log(self._changes_max))
        watcher = Watcher(session, tenant, namespace_id, log)
        log.watchers.add(watcher)
        self.open += 1
        return watcher

    def _leave(self, watcher: Watcher) -> None:
        self.open -= 1
        watcher.log.watchers.discard(watcher)
        if not watcher.log.watchers:
            del self._logs[watcher.tenant]
        if not self._logs:
            self._tell(Tell(on=False))

    def _next(self, watcher: Watcher) -> Step | None:
        """The next step, None when there is nothing to say."""
        if watcher.ended is not None:
            raise watcher.ended
        log = watcher.log
        if not watcher.reset and watcher.position < log.first:
            watcher.reset = "overflow"
        if watcher.reset:
            return self._begin(watcher)
        while watcher.position < log.end:
            segment = log.segments[watcher.position - log.first]
            watcher.position += 1
            if watcher.wants(segment.spec):
                return self._blocks(segment)
        return self._walk_on(watcher)

    def _begin(self, watcher: Watcher) -> Step:
        reason, watcher.reset = watcher.reset, ""
        self.overflows += reason == "overflow"
        watcher.position, watcher.row = watcher.log.end, 0
        watcher.walking, watcher.synced = True, False
        watcher.found.clear()
        return Step(Kind.RESET, reason)

    def _walk_on(self, watcher: Watcher) -> Step | None:
        while not watcher.found and watcher.walking:
            told, watcher.row = self._hub.walk(watcher.row, WALK_ROWS, watcher.wants)
            watcher.found.extend(pack(moved.spec, moved.blocks) for moved in told)
            watcher.walking = watcher.row > 0
        if watcher.found:
            return self._blocks(watcher.found.popleft())
        if not watcher.synced:
            watcher.synced = True
            return Step(Kind.SYNCED)
        if watcher.stirred:
            watcher.stirred = False
            return Step(Kind.IDLE)
        return None

    def _blocks(self, segment: Segment) -> Step:
        self.told += segment.count
        return Step(Kind.FORGOTTEN if segment.forgotten else Kind.BLOCKS, segment=segment)

    # ---- ends

    def keep_only(self, sessions: Collection[int]) -> None:
        """Watchers of other sessions end."""
        error = CoreError(ErrorKind.NOT_FOUND, "the session has ended", field="session")
        self._end([w for w in self._all() if w.session not in sessions], error)

    def close(self) -> None:
        """The server stops."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._end(self._all(), CoreError(ErrorKind.UNAVAILABLE, "the server stops", field="watch"))

    def _end(self, watchers: list[Watcher], error: CoreError) -> None:
        for watcher in watchers:
            watcher.ended = error
            watcher.wake.set()
