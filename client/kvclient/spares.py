"""Slots reserved ahead of their keys, so that a small push waits for its hub once, not twice.

A push of one block reserves, copies and commits, and waits for two answers. Who pushes one block
after another is given slots ahead: each is filled when there is something to push, and its Commit
says which block that is (`kvserver.core.naming`).

Rules:
 1. A spare is a reservation like any other, of a key that is 32 random bytes: it expires, is
    aborted and is fenced. It takes one block, whole and full.
 2. Only a run of pushes has them: RUN in a row, each within IDLE_S of the last. AHEAD at most, and
    only where that is a small SHARE of the arena.
 3. And only where cores are free: then the hub works while the client copies. Where they are not,
    one turn for two calls costs more than it saves.
 4. They are asked for along with a call that is made anyway, and nobody waits for them.
 5. When a run ends they go back, at most 2 * IDLE_S after its last push.
 6. Where a name is taken, or there is no space, the run is over, and the next one has to be twice
    as long: what is there already is better found before the copy.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from kvclient.errors import KVError
from kvclient.session import Link
from kvclient.transfer.cutting import region_message
from kvclient.transfer.shm import ShmArena
from kvclient.writing import Reservation
from kvproto.prefix import HASH_BYTES, ROOT
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.inline import Inline, Namespace
    from kvclient.line import Line

RUN = 3
RUN_MAX = 1024
AHEAD = 2
SHARE = 1 / 32  # of an arena, at most
IDLE_S = 0.25
TTL_S = 5.0
MARGIN_S = 1.0  # a spare that expires sooner is not begun with
_ANSWER_MS = 1000


class Spares:
    """Those of one synchronous client. Used by whoever uses its Inline."""

    def __init__(self, inline: Inline) -> None:
        self._inline = inline
        self._line: Line | None = None
        self._of = b""  # the namespace's id
        self._ready: list[Reservation] = []
        self._asked: dict[int, float] = {}  # call -> when, on the monotonic clock
        self._run = 0
        self._wanted = RUN
        self._last = 0.0
        self._armed = False

    def take(self, namespace: Namespace, line: Line) -> Reservation | None:
        """A slot for the one block of this push, if there is one."""
        now = time.monotonic()
        goes_on = line is self._line and self._of == namespace.id and now - self._last < IDLE_S
        if not goes_on:
            self.give_back()
            self._line, self._of = line, namespace.id
        self._run += 1
        self._last = now
        if self._run < self._wanted or not _allowed(namespace, line.link):
            return None
        if not self._ready:
            line.poll()
        self._collect(namespace, line)
        if self._run < self._wanted:  # there was no space
            return None
        spare = self._first()
        if not line.crowded:
            self._ask(namespace, line, now)
        return spare

    def left(self, spare: Reservation, *, taken: bool) -> None:
        """This one was not used up: its block was there, or it had expired."""
        self._inline.session.background(spare.abort())
        if taken:
            self._over()

    def give_back(self) -> None:
        """Have none. The hub frees their slots at once: nobody writes to them any more."""
        self._run = 0
        line = self._line
        if line is not None and self._asked:
            line.cancel(self._asked)
        for spare in self._ready:
            self._inline.session.background(spare.abort())
        self._ready.clear()
        self._asked.clear()

    # ---- inside ----------------------------------------------------------------------------

    def _over(self) -> None:
        self.give_back()
        self._wanted = min(2 * self._wanted, RUN_MAX)

    def _first(self) -> Reservation | None:
        while self._ready:
            spare = self._ready.pop(0)
            if spare.left_s() > MARGIN_S:
                self._wanted = max(RUN, self._wanted // 2)
                return spare
            self._inline.session.background(spare.abort())
        return None

    def _collect(self, namespace: Namespace, line: Line) -> None:
        for call, asked_at in list(self._asked.items()):
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
            spare = Reservation(
                namespace, line.link, message,
                count=1, tokens=[grid.block_tokens], region=grid.whole, asked_at=asked_at,
            )  # fmt: skip
            if spare.writable:
                self._ready.append(spare)
            else:
                self._over()
                return

    def _ask(self, namespace: Namespace, line: Line, now: float) -> None:
        handle = line.link.handles.get(namespace.id)
        while handle is not None and len(self._ready) + len(self._asked) < AHEAD:
            request = pb.ReserveRequest(
                session=line.link.session,
                client=line.link.client,
                namespace=handle,
                hashes=os.urandom(HASH_BYTES),
                parents=ROOT,
                region=region_message(namespace.grid.whole),
                ttl_ms=int(1000 * TTL_S),
            )
            self._asked[line.along("Reserve", request, _ANSWER_MS)] = now
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


def _allowed(namespace: Namespace, link: Link) -> bool:
    transfer, limits = link.transfer, link.limits
    if namespace.session.options.read_only or not limits.commit_names:
        return False
    if limits.reservation_s_max < TTL_S or not isinstance(transfer, ShmArena):
        return False
    return AHEAD * namespace.grid.payload_bytes() <= SHARE * transfer.data_bytes
