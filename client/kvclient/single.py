"""A pull of one whole block over shm, by the thread that asks for it, in few steps.

Between two copies of some MiB the interpreter's own code and data leave the caches, and then each
step of Python takes microseconds (docs/adr/0014). So what is asked for most, one full block into
an array whose cells stand one behind the other, is written out here.

Rules:
 1. What comes in between is left to an ordinary pull, from its beginning (`kvclient.reading`): a
    refusal, a tail, a slot that was lost, wrong bytes. `out` is unspecified until then anyway.
 2. What was granted goes back as it does there, with the next Acquire or soon, also when the copy
    fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvclient.checks import Arrays, dense, hash_list, targets_of
from kvclient.copying import HERE_BYTES_MAX, Outcome, Slot, as_arena, as_array, read_whole
from kvclient.errors import Unavailable
from kvclient.results import PullResult
from kvclient.transfer.cutting import region_message
from kvproto import calls
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.inline import Inline, Namespace
    from kvclient.line import Line
    from kvclient.timing import Deadline


def pull(
    inline: Inline,
    namespace: Namespace,
    line: Line,
    hashes: Sequence[bytes],
    out: Arrays,
    deadline_s: float | None,
) -> PullResult | None:
    """None where rule 1 leaves it to an ordinary pull."""
    grid, link = namespace.grid, line.link
    (key,) = hash_list("hashes", hashes)
    (target,) = targets_of("out", out, [1], grid, grid.whole)
    arena, size = as_arena(link.transfer), grid.payload_bytes()
    if arena is None or not dense(target, grid) or size > HERE_BYTES_MAX:
        return None
    grant = _grant(inline, namespace, line, key, namespace.deadline(deadline_s))
    if grant is None:
        return None
    if not grant.lease:  # nothing is there
        return PullResult(np.zeros(1, np.bool_), np.zeros(1, np.uint32), np.zeros(1, np.uint8), 0)
    try:
        tokens = int.from_bytes(grant.tokens, "little")
        if tokens != grid.block_tokens:
            return None
        slot = Slot(
            int.from_bytes(grant.offsets, "little"),
            int.from_bytes(grant.generations, "little"),
            tokens,
            int.from_bytes(grant.roots, "little"),
        )
        if read_whole(arena, grid, slot, as_array(target)) is not Outcome.OK:
            return None
    finally:
        inline.leases.give_back(link, grant.lease, soon=False)
    tiers = np.frombuffer(grant.tiers, np.uint8)
    return PullResult(np.ones(1, np.bool_), np.full(1, tokens, np.uint32), tiers, size)


def _grant(
    inline: Inline, namespace: Namespace, line: Line, key: bytes, deadline: Deadline
) -> pb.Grant | None:
    """The hub's answer: the one block under its lease, or an empty Grant where it has none. None
    when it refused, or is to be asked anew.
    """
    link = line.link
    request = pb.AcquireRequest(
        session=link.session,
        client=link.client,
        namespace=link.handles.get(namespace.id, 0),
        hashes=key,
        region=region_message(namespace.grid.whole),
        release=inline.leases.take(link),
    )
    if link.lost is not None or not line.send("Acquire", request, deadline):
        return None
    grant = pb.Grant()
    try:
        while True:
            reply = line.receive("Acquire", deadline)
            if reply.status != calls.OK:
                return None
            message: pb.AcquireReply = line.message("Acquire", reply)
            if message.HasField("grant"):
                grant = message.grant
            if reply.last:
                return grant
    except Unavailable:
        inline.look()
        raise
