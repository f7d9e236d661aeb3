"""Slots reserved ahead of their keys, so that a small push is one call, in few steps.

A push of one block reserves, copies and commits, and waits for two answers. Who pushes one block
after another is given slots ahead: each is filled when there is something to push, and its Commit
says which block that is (`kvserver.core.naming`).

Rules:
 1. A spare is of a reservation like any other, of keys that are 32 random bytes each: it expires,
    is aborted and is fenced. It takes one block, whole and full.
 2. Only a run of pushes has them: RUN in a row, each within IDLE_S of the last. At most BATCH + 1,
    and only where that is a small SHARE of the arena.
 3. BATCH of them are asked for at once, along with a Commit that is made anyway, while one is left:
    nobody waits for them.
 4. What takes one is done here in few steps: after each copy this code is found in no cache, and
    then a step takes microseconds. Whatever comes in between is left to an ordinary push, from its
    beginning (`kvclient.pushing`): nothing was changed that it could trip over.
 5. When a run ends they go back, at most 2 * IDLE_S after its last push.
 6. Where a name is taken, or there is no space, the run is over, and the next one has to be twice
    as long: what is there already is better found before the copy.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvclient.checks import Arrays, blocks_of, dense, hash_list, parent_list
from kvclient.copying import HERE_BYTES_MAX, Slot, as_arena, as_array, write_whole
from kvclient.errors import KVError, Unavailable
from kvclient.results import Bytes, CommitVerdict, PushResult, PushVerdict
from kvclient.session import Link
from kvclient.timing import Deadline
from kvclient.transfer.cutting import region_message
from kvclient.transfer.shm import ShmArena
from kvclient.writing import Reservation
from kvproto import calls
from kvproto.prefix import HASH_BYTES, ROOT
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.inline import Inline, Namespace
    from kvclient.line import Line

RUN = 3
RUN_MAX = 1024
BATCH = 4
SHARE = 1 / 32  # of an arena, at most
IDLE_S = 0.25
TTL_S = 5.0
MARGIN_S = 1.0  # a spare that expires sooner is not begun with
_ANSWER_MS = 1000
_INDEX = struct.Struct("<I")
# An enum's member is looked up by Python code, each time.
_WRITTEN = int(PushVerdict.WRITTEN)
_OK, _TAKEN, _GONE = map(int, (CommitVerdict.OK, CommitVerdict.TAKEN, CommitVerdict.GONE))


class Spare(NamedTuple):
    """One block of a reservation."""

    reservation: Reservation
    position: int
    slot: Slot


class Spares:
    """Those of one synchronous client. Used by whoever uses its Inline."""

    def __init__(self, inline: Inline) -> None:
        self._inline = inline
        self._line: Line | None = None
        self._of = b""  # the namespace's id
        self._ready: list[Spare] = []
        self._asked: dict[
            int, tuple[int, float]
        ] = {}  # call -> blocks; when, on the monotonic clock
        self._run = 0
        self._wanted = RUN
        self._last = 0.0
        self._armed = False

    def push(
        self,
        namespace: Namespace,
        line: Line,
        hashes: Sequence[bytes],
        arrays: Arrays,
        parents: Sequence[bytes] | None,
        deadline_s: float | None,
    ) -> PushResult | None:
        """One whole block. None where it is to be pushed as any other is, from its beginning: there
        is no spare, the block is there already, or what is said is refused.
        """
        grid = namespace.grid
        (key,) = hash_list("hashes", hashes)
        (parent,) = parent_list(parents, [key])
        (source,) = blocks_of("arrays", arrays, [grid.block_tokens], grid, grid.whole)
        deadline = namespace.deadline(deadline_s)
        if not dense(source, grid):
            return None
        spare = self._take(namespace, line)
        if spare is None:
            return None
        try:
            verdict = self._fill(namespace, line, spare, key, parent, as_array(source), deadline)
        except BaseException:
            self._drop(spare)
            raise
        if verdict == _OK:
            spare.reservation.committed(spare.position)
            return PushResult(np.full(1, _WRITTEN, np.uint8))
        self._drop(spare)
        if verdict == _TAKEN:
            self._over()
        return None

    def _fill(
        self, namespace: Namespace, line: Line, spare: Spare, key: bytes, parent: bytes,
        source: Bytes, deadline: Deadline,
    ) -> int:  # fmt: skip
        """Copy, and commit under this name. The verdict; GONE where there is none."""
        grid, arena = namespace.grid, as_arena(line.link.transfer)
        sums = None if arena is None else write_whole(arena, grid, spare.slot, source)
        if sums is None:
            return _GONE
        request = pb.CommitRequest(
            session=line.link.session,
            client=line.link.client,
            reservation=spare.reservation.number,
            indices=_INDEX.pack(spare.position),
            region=region_message(grid.whole),
            checksums=sums.astype("<u8", copy=False).tobytes(),
            hashes=key,
            parents=parent,
        )
        if line.link.lost is not None or not line.send("Commit", request, deadline):
            return _GONE
        try:
            reply = line.receive("Commit", deadline)
        except Unavailable:
            self._inline.look()
            raise
        if reply.status != calls.OK:  # the loop is told the same, and decides what it means
            return _GONE
        verdicts: bytes = line.message("Commit", reply).verdicts
        return verdicts[0] if verdicts else _GONE

    def _take(self, namespace: Namespace, line: Line) -> Spare | None:
        """A slot for the one block of this push, if there is one."""
        now = time.monotonic()
        goes_on = line is self._line and self._of == namespace.id and now - self._last < IDLE_S
        if not goes_on:
            self.give_back()
            self._line, self._of = line, namespace.id
        self._run += 1
        self._last = now
        batch = _batch(namespace, line.link)
        if self._run < self._wanted or not batch:
            return None
        if not self._ready:
            line.poll()
        self._collect(namespace, line)
        if self._run < self._wanted:  # there was no space
            return None
        spare = self._first()
        if len(self._ready) <= 1 and not self._asked:
            self._ask(namespace, line, batch, now)
        return spare

    def give_back(self) -> None:
        """Have none. The hub frees their slots at once: nobody writes to them any more."""
        self._run = 0
        line = self._line
        if line is not None and self._asked:
            line.cancel(self._asked)
        self._drop(*self._ready)
        self._asked.clear()

    # ---- inside ----------------------------------------------------------------------------

    def _over(self) -> None:
        self.give_back()
        self._wanted = min(2 * self._wanted, RUN_MAX)

    def _drop(self, *spares: Spare) -> None:
        """Abort their reservations: nobody fills another slot of these from now on."""
        over = {spare.reservation for spare in spares}
        self._ready = [spare for spare in self._ready if spare.reservation not in over]
        for reservation in over:
            self._inline.session.background(reservation.abort())

    def _first(self) -> Spare | None:
        while self._ready:
            spare = self._ready.pop(0)
            if spare.reservation.left_s() > MARGIN_S:
                self._wanted = max(RUN, self._wanted // 2)
                return spare
            self._drop(spare)
        return None

    def _collect(self, namespace: Namespace, line: Line) -> None:
        for call, (blocks, asked_at) in list(self._asked.items()):
            reply = line.take(call)
            if reply is None:
                if time.monotonic() - asked_at > TTL_S:  # it was not answered in time
                    del self._asked[call]
                continue
            del self._asked[call]
            try:
                message = line.message("Reserve", reply)
            except KVError:  # whatever it is, the next ordinary push is told
                self._over()
                return
            grid = namespace.grid
            reservation = Reservation(
                namespace, line.link, message,
                count=blocks, tokens=[grid.block_tokens] * blocks, region=grid.whole,
                asked_at=asked_at,
            )  # fmt: skip
            self._ready += [
                Spare(reservation, index, reservation.slot(index)) for index in reservation.writable
            ]
            if len(reservation.writable) < blocks:  # there is no space
                self._over()
                return

    def _ask(self, namespace: Namespace, line: Line, blocks: int, now: float) -> None:
        handle = line.link.handles.get(namespace.id)
        if handle is not None:
            request = pb.ReserveRequest(
                session=line.link.session,
                client=line.link.client,
                namespace=handle,
                hashes=os.urandom(HASH_BYTES * blocks),
                parents=ROOT * blocks,
                region=region_message(namespace.grid.whole),
                ttl_ms=int(1000 * TTL_S),
            )
            self._asked[line.along("Reserve", request, _ANSWER_MS)] = blocks, now
        if not self._armed:
            self._armed = True
            self._inline.later(IDLE_S, self._look)

    def _look(self) -> None:
        """On the loop, while there are any: whether the run is over."""
        with self._inline.using() as mine:
            if mine and time.monotonic() - self._last >= IDLE_S:
                self.give_back()
            if mine and not self._ready and not self._asked:
                self._armed = False
            else:
                self._inline.later(IDLE_S, self._look)


def _batch(namespace: Namespace, link: Link) -> int:
    """How many blocks are reserved at once; 0: none ahead."""
    transfer, limits = link.transfer, link.limits
    if namespace.session.options.read_only or not limits.commit_names:
        return 0
    if limits.reservation_s_max < TTL_S or not isinstance(transfer, ShmArena):
        return 0
    size = namespace.grid.payload_bytes()
    if size > HERE_BYTES_MAX or 8 * namespace.grid.cells > calls.REQUEST_BODY_BYTES_MAX // 2:
        return 0
    room = int(SHARE * transfer.data_bytes / size)
    return max(0, min(BATCH, room - 1, limits.keys_per_call_max))
