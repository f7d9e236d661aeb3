"""Asking a hub which moves still run, so that withheld memory may be used again.

Rule 1: only an answer frees memory here, or what `kvclient.transfer.ring` calls proof.
Rule 2: whoever asks proves by the key of its Attach that the moves are its own; so a later session
may ask about those of an earlier one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from kvclient.errors import KVError, NotFound
from kvclient.timing import Deadline
from kvclient.transfer.ring import Held, orphans
from kvproto.v1 import kvserver_pb2 as pb

SETTLE_S = 0.2
SETTLE_LIMIT_S = 2.0
SETTLE_MAX = 1024  # moves of one question

Message = Any
Rpc = Callable[[str, Message, Deadline], Awaitable[Message]]


async def settle(rpc: Rpc, session: int, client: int, key: bytes, held: Held) -> None:
    """Ask the hub which of the withheld moves still run; free the memory of the others."""
    numbers = held.withheld[:SETTLE_MAX]
    if not numbers:
        return
    request = pb.SettleRequest(
        session=session, client=client, key=key, moves=np.array(numbers, "<u8").tobytes()
    )
    reply = await rpc("Settle", request, Deadline(SETTLE_LIMIT_S))
    if len(reply.running) != len(numbers):
        raise KVError(f"the hub settled {len(reply.running)} of {len(numbers)} moves")
    for number, running in zip(numbers, reply.running, strict=True):
        if not running:
            held.settled(number)


async def settle_all(rpc: Rpc, session: int, client: int, key: bytes, held: Sequence[Held]) -> None:
    """Ask until nothing is withheld of these. Its caller ends it with the session."""
    while any(one.withheld for one in held):
        for one in held:
            with suppress(KVError):
                await settle(rpc, session, client, key, one)
        if any(one.withheld for one in held):
            await asyncio.sleep(SETTLE_S)


async def settle_orphans(hello: Message, rpc: Rpc, *, once: bool) -> None:
    """Ask this hub about moves of sessions before this one; until none runs, or `once`."""
    while found := orphans.meet(hello.arena_id, hello.epoch):
        for orphan in found:
            try:
                await settle(rpc, hello.session, orphan.client, orphan.key, orphan.held)
            except NotFound:  # this session has ended too: the next one asks
                return
            except KVError:
                pass
            if not orphan.held.busy:
                orphans.drop(orphan)
        if once:
            return
        await asyncio.sleep(SETTLE_S)
