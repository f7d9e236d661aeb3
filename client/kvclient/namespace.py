"""A namespace, opened: the calls about its blocks. Asynchronous; `kvclient.client` mirrors it.

Keys are prefix hashes of 32 bytes (`kvproto.prefix`), in chain order where order matters. Times
are seconds, sizes bytes. `deadline_s` of a call replaces the client's; waiting (`wait_s`) comes on
top of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvclient.checks import (
    Arrays,
    blocks_of,
    hash_list,
    milliseconds,
    parent_list,
    region_in,
    token_list,
)
from kvclient.copying import Copier
from kvclient.errors import InvalidArgument, KVError, NotFound, late
from kvclient.leases import Leases
from kvclient.pushing import Push
from kvclient.reading import Pull, ReadStream
from kvclient.results import Lookup, Need, PullResult, PushResult
from kvclient.session import Link, Session
from kvclient.staging import Buffers
from kvclient.timing import Deadline
from kvclient.transfer.cutting import region_message
from kvclient.watching import Watch
from kvclient.writing import Reservation
from kvproto.grid import Grid, Region
from kvproto.namespace import NamespaceSpec
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.aio import AsyncClient

_Make = Callable[[Link, int], Any]  # the request under a Link, with the namespace's handle there
_NEED_KINDS = {
    "every": pb.LayerGroupNeed.EVERY_BLOCK,
    "last": pb.LayerGroupNeed.LAST_BLOCKS,
    "state": pb.LayerGroupNeed.LAST_ONLY,
}


class AsyncNamespace:
    """Comes from `AsyncClient.open_namespace`. Survives reconnects: it is opened again on demand.

    spec, id (32 bytes), grid   what it is
    near_misses                 live namespaces that differ in one field ("why no hits?")
    overlaps                    whether steps of one call may run side by side
    """

    overlaps = True

    def __init__(self, client: AsyncClient, spec: NamespaceSpec) -> None:
        self._client = client
        self.spec = spec
        self.id: bytes = spec.id
        self.grid: Grid = spec.grid
        self.near_misses: tuple[str, ...] = ()
        self.slot_bytes = 0

    def __repr__(self) -> str:
        return f"AsyncNamespace({self.spec.model!r}, id={self.id.hex()[:8]})"

    # ---- finding -------------------------------------------------------------------------

    async def lookup(
        self,
        hashes: Sequence[bytes],
        *,
        pin_s: float = 0.0,
        need: Sequence[Need] = (),
        deadline_s: float | None = None,
    ) -> Lookup:
        """The longest usable prefix of `hashes`, and each block's state and tier.

        `need` says what each group of layers needs (default: every block, every cell). With
        `pin_s`, the usable prefix is pinned for that long: see Lookup.lease.
        At most `limits.keys_per_call_max` keys.
        """
        limits = self.session.link.limits
        keys = hash_list("hashes", hashes, count_max=limits.keys_per_call_max)
        pin_ms = milliseconds("pin_s", pin_s, limits.lease_s_max)
        groups = [self._need(i, one) for i, one in enumerate(need)]

        def make(link: Link, handle: int) -> pb.LookupRequest:
            return pb.LookupRequest(
                session=link.session,
                namespace=handle,
                hashes=b"".join(keys),
                need=groups,
                pin_ms=pin_ms,
            )

        _, reply = await self._call("Lookup", make, self.deadline(deadline_s))
        return Lookup(
            usable_blocks=reply.usable_blocks,
            live_blocks=reply.live_blocks,
            states=np.frombuffer(reply.states, np.uint8),
            tiers=np.frombuffer(reply.tiers, np.uint8),
            lease=reply.lease,
            lease_s=reply.lease_ms / 1000,
            committed_cells=reply.committed_cells,
        )

    async def announce(
        self, hashes: Sequence[bytes], ttl_s: float, *, deadline_s: float | None = None
    ) -> int:
        """Say that these blocks are coming within `ttl_s`; how many this call announced."""
        limits = self.session.link.limits
        keys = hash_list("hashes", hashes, count_max=limits.keys_per_call_max)
        ttl_ms = milliseconds("ttl_s", ttl_s, limits.announce_ttl_s_max)

        def make(link: Link, handle: int) -> pb.AnnounceRequest:
            return pb.AnnounceRequest(
                session=link.session, namespace=handle, hashes=b"".join(keys), ttl_ms=ttl_ms
            )

        _, reply = await self._call("Announce", make, self.deadline(deadline_s))
        return int(reply.announced)

    async def withdraw(self, hashes: Sequence[bytes], *, deadline_s: float | None = None) -> int:
        """These blocks, which this session has announced, are not coming: who waits for them is
        told at once. How many announcements that ended."""
        keys = hash_list("hashes", hashes, count_max=self.session.link.limits.keys_per_call_max)

        def make(link: Link, handle: int) -> pb.AnnounceRequest:
            return pb.AnnounceRequest(
                session=link.session, namespace=handle, hashes=b"".join(keys), withdraw=True
            )

        _, reply = await self._call("Announce", make, self.deadline(deadline_s))
        return int(reply.announced)

    # ---- writing -------------------------------------------------------------------------

    async def reserve(
        self,
        hashes: Sequence[bytes],
        parents: Sequence[bytes] | None = None,
        *,
        tokens: Sequence[int] | None = None,
        region: Region | None = None,
        ttl_s: float | None = None,
        wait_s: float = 0.0,
        durable: bool = False,
        deadline_s: float | None = None,
    ) -> Reservation:
        """The right to fill `region` (default: all cells) of the blocks that the hub grants.

        `parents` default to the chain (ROOT, hashes[0], ...), `tokens` to full blocks, `ttl_s` to
        the hub's longest. Waits up to `wait_s` for space. With `durable`, the commit of a block's
        last cell answers only after disk and journal are synced.
        """
        keys = hash_list("hashes", hashes, count_max=self.session.link.limits.keys_per_call_max)
        return await self.reserve_within(
            self.deadline(deadline_s, wait_s),
            keys,
            parent_list(parents, keys),
            token_list(tokens, len(keys), self.grid),
            region=region_in(region, self.grid),
            ttl_s=ttl_s,
            wait_s=wait_s,
            durable=durable,
        )

    async def reserve_within(
        self,
        deadline: Deadline,
        hashes: list[bytes],
        parents: list[bytes],
        tokens: list[int],
        *,
        region: Region,
        ttl_s: float | None = None,
        wait_s: float = 0.0,
        durable: bool = False,
    ) -> Reservation:
        """`reserve` with its arguments checked, as a part of a longer call."""
        if self.session.options.read_only:
            raise InvalidArgument.of("read_only", True, "False to write")
        limits = self.session.link.limits
        ttl_ms = 0 if ttl_s is None else milliseconds("ttl_s", ttl_s, limits.reservation_s_max)
        wait_ms = milliseconds("wait_s", wait_s, limits.wait_s_max)
        full = all(count == self.grid.block_tokens for count in tokens)

        def make(link: Link, handle: int) -> pb.ReserveRequest:
            return pb.ReserveRequest(
                session=link.session,
                client=link.client,
                namespace=handle,
                hashes=b"".join(hashes),
                parents=b"".join(parents),
                tokens=b"" if full else np.array(tokens, "<u4").tobytes(),
                region=region_message(region),
                ttl_ms=ttl_ms,
                wait_ms=wait_ms,
                durable=durable,
            )

        asked_at = time.monotonic()
        link, reply = await self._call("Reserve", make, deadline)
        return Reservation(
            self,
            link,
            reply,
            count=len(hashes),
            tokens=tokens,
            region=region,
            asked_at=asked_at,
        )

    async def push(
        self,
        hashes: Sequence[bytes],
        arrays: Arrays,
        *,
        parents: Sequence[bytes] | None = None,
        tokens: Sequence[int] | None = None,
        region: Region | None = None,
        durable: bool = False,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> PushResult:
        """Reserve, copy, checksum and commit. Any number of keys.

        `arrays` is uint8 [N, layers, heads, pages * page_bytes] or a list of such blocks; layers
        and heads are those of `region`. A tail uses the first bytes of each cell; zero its last
        page behind the tokens before. What is already there is not copied.
        """
        keys = hash_list("hashes", hashes)
        part = region_in(region, self.grid)
        counts = token_list(tokens, len(keys), self.grid)
        deadline = self.deadline(deadline_s, wait_s)
        sources = blocks_of("arrays", arrays, counts, self.grid, part)
        push = Push(
            self,
            hashes=keys,
            parents=parent_list(parents, keys),
            tokens=counts,
            sources=sources,
            region=part,
            durable=durable,
            wait_s=wait_s,
            deadline=deadline,
        )
        with self.pinning(sources):
            async with self.within(deadline, "push"):
                await push.run()
        return PushResult(push.verdicts)

    # ---- reading -------------------------------------------------------------------------

    def acquire(
        self,
        hashes: Sequence[bytes],
        *,
        region: Region | None = None,
        wait_s: float = 0.0,
        window_bytes: int = 0,
        lease_s: float = 0.0,
        inherit_lease: int = 0,
        deadline_s: float | None = None,
    ) -> ReadStream:
        """Lease blocks as they become readable: `async with ns.acquire(...) as stream`, then
        `async for granted in stream`.

        Waits up to `wait_s` for blocks that are filling or announced; others are missing at once.
        `window_bytes` bounds what is leased at once (0: the hub's maximum), `lease_s` is the life
        of each lease (0: the hub's maximum). `inherit_lease` is the lease of a lookup of this
        session. The deadline holds for each step of the stream.
        """
        limits = self.session.link.limits
        if not 0 <= window_bytes <= limits.window_bytes_max:
            limit = f"from 0 to {limits.window_bytes_max} (window_bytes_max)"
            raise InvalidArgument.of("window_bytes", window_bytes, limit)
        return ReadStream(
            self,
            hash_list("hashes", hashes, count_max=limits.keys_per_call_max),
            region=region_in(region, self.grid),
            wait_ms=milliseconds("wait_s", wait_s, limits.wait_s_max),
            window_bytes=window_bytes,
            lease_ms=milliseconds("lease_s", lease_s, limits.lease_s_max),
            inherit_lease=inherit_lease,
            step_s=self.deadline(deadline_s, wait_s).seconds,
        )

    async def pull(
        self,
        hashes: Sequence[bytes],
        out: Arrays,
        *,
        region: Region | None = None,
        wait_s: float = 0.0,
        window_bytes: int = 0,
        inherit_lease: int = 0,
        deadline_s: float | None = None,
    ) -> PullResult:
        """Acquire, copy into `out`, check, release. Any number of keys.

        `out` is uint8 [N, layers, heads, pages * page_bytes] or a list of such blocks, each cell
        contiguous. A block is found with exactly the bytes that were committed, or it is a miss.
        Cells that begin at multiples of 64 bytes are filled fastest (`kvclient.staging.aligned`).
        When this returns or raises, nothing writes to `out` any more; but for memory that was
        registered (`AsyncClient.register`): then see `pin` of what is raised.
        """
        keys = hash_list("hashes", hashes)
        deadline = self.deadline(deadline_s, wait_s)
        pull = Pull(self, keys, out, region=region_in(region, self.grid), deadline=deadline)
        with self.pinning(out):
            async with self.within(deadline, "pull"):
                return await pull.run(
                    wait_s=wait_s, window_bytes=window_bytes, inherit_lease=inherit_lease
                )

    async def release(self, *leases: int) -> None:
        """Give back leases of lookups; sent soon, with others."""
        for lease in leases:
            if lease:
                self.leases.give_back(self.session.link, lease)

    async def report_corrupt(
        self, hashes: Sequence[bytes], *, deadline_s: float | None = None
    ) -> int:
        """Tell the hub that these blocks read wrong; it verifies them. How many it dropped."""
        keys = hash_list("hashes", hashes)

        def make(link: Link, handle: int) -> pb.ReportCorruptRequest:
            return pb.ReportCorruptRequest(
                session=link.session, namespace=handle, hashes=b"".join(keys)
            )

        _, reply = await self._call("ReportCorrupt", make, self.deadline(deadline_s))
        return int(reply.dropped)

    def watch(self) -> Watch:
        """Which blocks of this namespace are where, first all of them, then every change."""
        return Watch(self.session, self.id, self.handle)

    async def open(self, deadline: Deadline) -> None:
        """Open it now; other calls do so on demand."""

        async def make(link: Link) -> Any:
            return pb.OpenNamespaceRequest(session=link.session, spec=spec_message(self.spec))

        link, reply = await self.session.call("OpenNamespace", make, deadline)
        self._opened(link, reply)

    # ---- for this package ----------------------------------------------------------------

    @property
    def session(self) -> Session:
        return self._client.session

    @property
    def copier(self) -> Copier:
        return self._client.copier

    @property
    def buffers(self) -> Buffers:
        return self._client.buffers

    @property
    def leases(self) -> Leases:
        return self._client.leases

    def deadline(self, deadline_s: float | None, wait_s: float = 0.0) -> Deadline:
        return self._client.deadline(deadline_s, wait_s)

    @asynccontextmanager
    async def within(self, deadline: Deadline, what: str) -> AsyncIterator[None]:
        """Cancel the body at the deadline, and raise DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline.left()):
                yield
        except TimeoutError:
            raise late(what, self.session.address, deadline.seconds) from None

    @contextmanager
    def pinning(self, blocks: Iterable[Any]) -> Iterator[None]:
        """Have what the body raises tell what of registered memory a hub may still touch."""
        try:
            yield
        except KVError as error:
            pin = self._client.pin(blocks)
            if not pin.done:
                error.pinned(pin)
            raise

    async def handle(self, link: Link, deadline: Deadline) -> int:
        """This namespace's handle under `link`; opens it there the first time."""
        handle = link.handles.get(self.id)
        if handle is None:
            request = pb.OpenNamespaceRequest(session=link.session, spec=spec_message(self.spec))
            reply = await self.session.rpc("OpenNamespace", request, deadline)
            handle = self._opened(link, reply)
        return handle

    def _opened(self, link: Link, reply: pb.OpenNamespaceReply) -> int:
        if reply.namespace_id != self.id:
            raise KVError("the hub derives another id from this spec: its format differs")
        link.handles[self.id] = reply.handle
        self.near_misses = tuple(reply.near_misses)
        self.slot_bytes = reply.geometry.slot_bytes
        return int(reply.handle)

    def stale_handle(self, link: Link, error: KVError) -> bool:
        """Forget the handle when the hub no longer knows it (the namespace was dropped)."""
        if isinstance(error, NotFound) and error.field == "namespace":
            return link.handles.pop(self.id, None) is not None
        return False

    def report_soon(self, hashes: list[bytes], link: Link) -> None:
        if link.lost is None:
            self.session.background(self._report(hashes))

    async def _report(self, hashes: list[bytes]) -> None:
        try:
            await self.report_corrupt(hashes)
        except KVError as error:
            self._client.log.warning("corrupt blocks not reported: %s", error)

    async def _call(self, name: str, make: _Make, deadline: Deadline) -> tuple[Link, Any]:
        """A call that names this namespace; opened again when the hub forgot it."""

        async def build(link: Link) -> object:
            return make(link, await self.handle(link, deadline))

        try:
            return await self.session.call(name, build, deadline)
        except NotFound as error:
            link = self.session.link
            if not self.stale_handle(link, error):
                raise
            return await self.session.call(name, build, deadline)

    def _need(self, position: int, need: Need) -> pb.LayerGroupNeed:
        kind = _NEED_KINDS.get(need.kind)
        if kind is None:
            raise InvalidArgument.of(f"need[{position}].kind", need.kind, "every, last or state")
        message = pb.LayerGroupNeed(kind=kind, blocks=need.blocks)
        if need.region is not None:
            message.region.CopyFrom(region_message(region_in(need.region, self.grid)))
        return message


def spec_message(spec: NamespaceSpec) -> pb.NamespaceSpec:
    return pb.NamespaceSpec(
        format_version=spec.format_version,
        model=spec.model,
        weights=spec.weights,
        adapter=spec.adapter,
        kv_dtype=spec.kv_dtype,
        encoding=spec.encoding,
        block_tokens=spec.block_tokens,
        page_tokens=spec.page_tokens,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        page_bytes=spec.page_bytes,
        tenant=spec.tenant,
        attributes=dict(spec.attributes),
    )
