"""What a request must fulfil before anything is done about it."""

from __future__ import annotations

from kvproto.prefix import HASH_BYTES, ROOT
from kvserver.core.blocks import BlockTable
from kvserver.core.books import HOST, Books, Namespace
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Commit, Reserve
from kvserver.core.holds import Reservation, Written


def invalid(name: str, message: str, limit: int | str) -> CoreError:
    return CoreError(ErrorKind.INVALID, f"{name}: {message}", field=name, limit=limit)


def check_reserve(event: Reserve, namespace: Namespace, blocks: BlockTable) -> None:
    """CoreError INVALID unless the Reserve's keys, parents and token counts can be right."""
    count, full = len(event.hashes), namespace.grid.block_tokens
    if len(event.parents) != count:
        raise invalid("parents", f"{len(event.parents)} parents for {count} hashes", count)
    if event.tokens and len(event.tokens) != count:
        raise invalid("tokens", f"{len(event.tokens)} token counts for {count} hashes", count)
    index = blocks.index[namespace.handle]
    for at, key in enumerate(event.hashes):
        _check_name(key, event.parents[at])
        tokens = event.tokens[at] if event.tokens else full
        if not 1 <= tokens <= full:
            raise invalid("tokens", f"a block of {tokens} tokens", full)
        row = index.get(key, 0)
        if row and blocks.tokens[row] not in (0, tokens):
            raise invalid("tokens", "the block holds another number", blocks.tokens[row])


def _check_name(key: bytes, parent: bytes) -> None:
    if len(key) != HASH_BYTES or key == ROOT:
        raise invalid("hashes", "a hash is no digest of 32 bytes", HASH_BYTES)
    if len(parent) != HASH_BYTES or parent == key:
        raise invalid("parents", "a parent is no digest of another block", HASH_BYTES)


def check_commit(event: Commit, reservation: Reservation, mask: int, books: Books) -> None:
    """CoreError INVALID unless every block that the Commit means may have these cells committed,
    and may be given its name.
    """
    if event.hashes:
        _check_names(event, reservation)
    for at in event.indices:
        filling = reservation.blocks.get(at)
        if filling is None:
            if at not in reservation.done:
                raise invalid("indices", f"position {at} was not granted", reservation.count)
            written = reservation.done[at]
            if written is not None and stands(written, books):
                filling = books.blocks.fillings.get(written.row)
                if filling is not None and mask & ~filling.committed:
                    raise invalid("region", "cells that nobody has committed", "")
        elif not filling.gone:
            mine = mask & filling.parts[reservation.ident]
            if mine != mask and (mine or mask & ~filling.committed):
                raise invalid("region", "cells that the reservation does not hold", "")


def _check_names(event: Commit, reservation: Reservation) -> None:
    count = len(event.indices)
    if len(event.hashes) != count:
        raise invalid("hashes", f"{len(event.hashes)} names for {count} blocks", count)
    if len(event.parents) != count:
        raise invalid("parents", f"{len(event.parents)} parents for {count} hashes", count)
    if len(set(event.hashes)) != count:
        raise invalid("hashes", "a name is given twice", count)
    for position, at in enumerate(event.indices):
        _check_name(event.hashes[position], event.parents[position])
        filling = reservation.blocks.get(at)
        if filling is not None and not filling.gone:
            alone = len(filling.parts) == 1 and not filling.committed
            if not alone:
                raise invalid("hashes", f"position {at} has other writers or committed cells", "")


def stands(written: Written, books: Books) -> bool:
    """The block still has the slot that the writer filled, and nobody had it in between."""
    found = books.blocks.slot[HOST][written.row] == written.slot
    return found and books.host.place(written.slot) == written.place
