"""The link to the hub: one event loop and one session per process, whatever the hub does.

Both halves of an engine that live in one process share a link. It runs on a thread of its own,
started at first use (after vLLM's forks), connects by itself and, when a call went unanswered,
probes in the background until the hub answers again; meanwhile `responsive` is False and nobody
waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from kvclient import (
    AsyncClient,
    AsyncNamespace,
    BlockState,
    DeadlineExceeded,
    Granted,
    KVError,
    Limits,
    Need,
    Pin,
    Role,
    Unavailable,
)
from kvclient.copying import THREADS
from kvproto import cells
from kvproto.bell import Bell
from kvproto.namespace import NamespaceSpec
from kvproto.needs import usable_prefix
from kvserver_vllm.common import Answer
from kvserver_vllm.cores import sharing
from kvserver_vllm.events import EventLog
from kvserver_vllm.messages import Section

logger = logging.getLogger("vllm.kvserver")

BACKOFF_S = (0.05, 1.0)
PROBE_S = 1.0
"""Deadline of one probe, and at most the time between two."""
REGISTER_S = 60.0
"""Deadline of making memory known: RDMA hardware pins all of it."""
CALL_S = 5.0
"""Deadline of calls that nobody waits for."""
STOP_S = 2.0

_links: dict[tuple[str, str], HubLink] = {}
_links_lock = threading.Lock()


class HubLink:
    """Use `HubLink.shared`; each holder calls `close` once."""

    def __init__(
        self, address: str, tenant: str, name: str, lookup_s: float, log: EventLog,
        reach: Mapping[str, Any] | None = None, cores: frozenset[int] | None = None,
    ) -> None:  # fmt: skip
        """`reach`: further arguments of `AsyncClient.connect`, about transport and TLS. `cores`:
        where its thread, and those that it starts, run; default: where this one may."""
        self.address = address
        self.tenant = tenant
        self._name = name
        self._lookup_s = lookup_s
        self._log = log
        self._reach = dict(reach or {})
        self._cores = cores
        self.sharing = sharing(cores)
        """Threads that share a large block's copy."""
        self._holders = 0
        self._client: AsyncClient | None = None
        self._suspect = False
        self._complaint = ""
        self._namespaces: dict[bytes, AsyncNamespace] = {}
        self._memory: list[Any] = []
        self._registered = 0  # of `_memory`, with the client
        self._greeting: list[bytes] = []
        self._ordered: tuple[Role, Callable[[Role], None]] | None = None  # not followed yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._posts: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._bell = Bell()
        self._rung = self._stopped = False
        self._wake = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvserver-link", daemon=True)

    @classmethod
    def shared(
        cls, address: str, *, tenant: str, name: str, lookup_s: float, log: EventLog,
        reach: Mapping[str, Any] | None = None, cores: frozenset[int] | None = None,
    ) -> HubLink:  # fmt: skip
        """The process's link to this hub, started if it is new."""
        with _links_lock:
            link = _links.get((address, tenant))
            if link is None:
                link = cls(address, tenant, name, lookup_s, log, reach, cores)
                link._thread.start()
                _links[address, tenant] = link
            link._holders += 1
            return link

    def close(self) -> None:
        """Give this holder's share back; the last one ends the session within seconds."""
        with _links_lock:
            self._holders -= 1
            if self._holders:
                return
            _links.pop((self.address, self.tenant), None)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)

    # ---- called from any thread --------------------------------------------------------------

    @property
    def responsive(self) -> bool:
        return self._client is not None and not self._suspect

    @property
    def direct(self) -> bool:
        """Whether registered memory is moved without staging. On the link's thread."""
        try:
            known = self._registered == len(self._memory)
            return known and self._client is not None and self._client.direct
        except KVError:
            return False

    def register(self, memory: Sequence[Any]) -> None:
        """Memory that the hub may be sent to, from the next connection on or soon."""
        self._memory += memory
        self.submit(self._register())

    async def _register(self) -> None:
        while self._client is not None and self._registered < len(self._memory):
            one = self._memory[self._registered]
            try:
                await self._client.register(one, deadline_s=REGISTER_S)
            except KVError as error:
                logger.warning("kvserver: pages are staged: %s", error)
                return
            self._registered += 1

    def pin(self, blocks: Sequence[Any]) -> Pin:
        """What a hub may still touch of them."""
        return self._client.pin(blocks) if self._client is not None else Pin([])

    def follow(self, ceiling: Role, obey: Callable[[Role], None]) -> None:
        """Take the hub's orders, on the link's thread; once, from any thread."""
        self._ordered = (ceiling, obey)
        self.submit(self._follow())

    async def _follow(self) -> None:
        if self._client is not None and self._ordered is not None:
            self._client.follow(*self._ordered)
            self._ordered = None

    @property
    def staging_bytes(self) -> int:
        """Staging memory of the transport in use now."""
        return self._client.staging_bytes if self._client is not None else 0

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the link's thread. Its errors are logged; it is dropped once stopped."""
        self.post(self.spawn, work)

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Call this on the link's thread, in the order of the posts; dropped once stopped.

        The engine's thread posts within its steps. It wakes nobody, and is not held up by what the
        link's thread has to do then; that hears of it within milliseconds (`kvproto.bell`).
        """
        self._posts.append((function, args))
        if self._stopped:
            self._discard()
        elif not self._rung:
            self._rung = True
            self._bell.ring()

    def _answer(self) -> None:
        """The bell was rung. Who posts from here on rings again: nothing is left lying."""
        self._bell.heard()
        self._rung = False
        while self._posts:
            function, args = self._posts.popleft()
            self._loop.call_soon(function, *args)

    def _discard(self) -> None:
        with suppress(IndexError):
            while True:
                for arg in self._posts.popleft()[1]:
                    if asyncio.iscoroutine(arg):
                        arg.close()

    @property
    def _limits(self) -> Limits:
        if self._client is None:
            raise Unavailable(f"no connection to {self.address}")
        return self._client.limits

    @property
    def keys_max(self) -> int:
        """Keys that one call may name."""
        return self._limits.keys_per_call_max

    @property
    def window_bytes_max(self) -> int:
        """Bytes that one read may hold leased at once."""
        return self._limits.window_bytes_max

    @property
    def wait_s_max(self) -> float:
        """Seconds that one read may wait for blocks that are being written."""
        return self._limits.wait_s_max

    # ---- called on the link's thread ---------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("kvserver: background work failed", exc_info=task.exception())

    async def verified(self, granted: Granted) -> bool:
        """Whether what was copied of a granted block is what was committed."""
        return await granted.verified() if self.sharing > 1 else granted.verify()

    async def namespace(self, spec: bytes, deadline_s: float = CALL_S) -> AsyncNamespace:
        """The opened namespace of this spec. KVError when the hub cannot be asked."""
        known = self._namespaces.get(spec)
        if known is not None:
            return known
        if self._client is None:
            raise Unavailable(f"no connection to {self.address}")
        opened = await self._client.open_namespace(
            NamespaceSpec.decode(spec), deadline_s=deadline_s
        )
        if spec not in self._namespaces:
            self._namespaces[spec] = opened
            self._log.write("namespace", id=opened.id.hex())
            logger.info(
                "kvserver: hub %s, namespace %s, transport %s, native code %s",
                self.address,
                opened.id.hex()[:16],
                self._client.session.link.transfer.transport,
                "in use" if cells.NATIVE else "not in use",
            )
            for note in opened.near_misses:
                logger.warning("kvserver: %s", note)
        return self._namespaces[spec]

    async def greet(self, specs: Sequence[bytes]) -> None:
        """Open these namespaces as soon as there is a connection: before the first request."""
        self._greeting = list(specs)
        if self._client is not None:
            await self._open_greeting()

    async def _open_greeting(self) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                for spec in self._greeting:
                    await self.namespace(spec)
        except (KVError, TimeoutError) as error:
            self.doubt(error)

    async def lookup(
        self, sections: Sequence[Section], hashes: Sequence[bytes], pin_s: float, *, tail: bool
    ) -> Answer | None:
        try:
            async with asyncio.timeout(self._lookup_s):
                asked = list(hashes[: self.keys_max])
                pin = min(pin_s, self._limits.lease_s_max)
                return await self._look_up(sections, asked, pin, tail=tail)
        except (KVError, TimeoutError) as error:
            self.doubt(error)
            return None

    async def _look_up(
        self, sections: Sequence[Section], asked: list[bytes], pin_s: float, *, tail: bool
    ) -> Answer:
        """What all sections have, as one; each pins what it has to contribute."""
        namespaces = [await self.namespace(section.spec) for section in sections]
        needs = [
            _need(section, namespace, tail)
            for section, namespace in zip(sections, namespaces, strict=True)
        ]
        found = await asyncio.gather(
            *(
                namespace.lookup(asked, pin_s=pin_s, need=[need])
                for namespace, need in zip(namespaces, needs, strict=True)
            )
        )
        usable = usable_prefix([f.states == BlockState.COMPLETE for f in found], needs)
        live = usable_prefix([f.states != BlockState.ABSENT for f in found], needs)
        if pin_s and usable:
            for namespace, need, one in zip(namespaces, needs, found, strict=True):
                if one.usable_blocks != usable and need.kind != "every":
                    await namespace.lookup(asked[:usable], pin_s=pin_s, need=[need])
        committed = sum(one.committed_cells for one in found)
        return Answer(usable, live, tuple(int(tier) for tier in found[0].tiers), committed)

    async def announce(
        self, sections: Sequence[Section], hashes: Sequence[bytes], ttl_s: float
    ) -> None:
        """Of recurrent states only the last one is coming."""
        try:
            async with asyncio.timeout(CALL_S):
                for section in sections:
                    coming = list(hashes[-1:] if section.recurrent else hashes[: self.keys_max])
                    namespace = await self.namespace(section.spec)
                    await namespace.announce(coming, min(ttl_s, self._limits.announce_ttl_s_max))
        except (KVError, TimeoutError) as error:
            self.doubt(error)

    async def withdraw(self, sections: Sequence[Section], hashes: Sequence[bytes]) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                for section in sections:
                    namespace = await self.namespace(section.spec)
                    await namespace.withdraw(list(hashes[: self.keys_max]))
        except (KVError, TimeoutError) as error:
            self.doubt(error)

    def doubt(self, error: BaseException) -> None:
        """A call failed. Unless the hub itself said why, nobody waits for it until it has
        answered a probe."""
        if not isinstance(error, (Unavailable, DeadlineExceeded, TimeoutError)):
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.warning("kvserver: %s", error)
            return
        if not self._suspect:
            logger.warning("kvserver: hub %s does not answer (%s)", self.address, error)
        self._suspect = True
        self._wake.set()

    def _run(self) -> None:
        if self._cores is not None:
            with suppress(OSError):  # taken from the engine meanwhile: stay where it is
                os.sched_setaffinity(0, self._cores)
        asyncio.set_event_loop(self._loop)
        self._loop.add_reader(self._bell.fileno(), self._answer)
        self._bell.watch()
        keeper = self._loop.create_task(self._keep())
        try:
            self._loop.run_forever()
        finally:
            self._stopped = True
            self._discard()
            with suppress(Exception):
                self._loop.run_until_complete(asyncio.wait_for(self._finish(keeper), STOP_S))
            self._loop.close()
            self._bell.stop()

    async def _finish(self, keeper: asyncio.Task[None]) -> None:
        tasks = [keeper, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    async def _keep(self) -> None:
        """Connect, and probe while the hub is in doubt."""
        backoff = BACKOFF_S[0]
        while True:
            try:
                if self._client is None:
                    self._client = await AsyncClient.connect(
                        self.address,
                        name=self._name,
                        tenant=self.tenant,
                        deadline_s=CALL_S,
                        staging_s=REGISTER_S,
                        copy_threads=max(THREADS, self.sharing),
                        **self._reach,
                    )
                    await self._register()
                    await self._follow()
                    transport = self._client.transport
                    self._log.write("connected", address=self.address, transport=transport)
                    await self._open_greeting()
                elif self._suspect:
                    async with asyncio.timeout(PROBE_S):
                        await self._client.list_namespaces()
                if self._suspect:
                    logger.info("kvserver: hub %s answers", self.address)
                self._suspect = False
                backoff = BACKOFF_S[0]
                self._wake.clear()
                await self._wake.wait()
            except (KVError, TimeoutError, OSError) as error:
                if self._client is None and not self._suspect:
                    logger.warning("kvserver: hub %s is unreachable (%s)", self.address, error)
                    self._suspect = True
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, BACKOFF_S[1])


def _need(section: Section, namespace: AsyncNamespace, tail: bool) -> Need:
    if section.recurrent:
        return Need("state")
    blocks = section.blocks_needed(namespace.grid.block_tokens, tail=tail)
    return Need("last", blocks) if blocks else Need("every")
