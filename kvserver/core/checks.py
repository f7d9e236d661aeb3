"""What a request must fulfil before anything is done about it."""

from __future__ import annotations

from kvproto.prefix import HASH_BYTES, ROOT
from kvserver.core.blocks import BlockTable
from kvserver.core.books import Namespace
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Reserve


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
        parent = event.parents[at]
        if len(key) != HASH_BYTES or key == ROOT:
            raise invalid("hashes", "a hash is no digest of 32 bytes", HASH_BYTES)
        if len(parent) != HASH_BYTES or parent == key:
            raise invalid("parents", "a parent is no digest of another block", HASH_BYTES)
        tokens = event.tokens[at] if event.tokens else full
        if not 1 <= tokens <= full:
            raise invalid("tokens", f"a block of {tokens} tokens", full)
        row = index.get(key, 0)
        if row and blocks.tokens[row] not in (0, tokens):
            raise invalid("tokens", "the block holds another number", blocks.tokens[row])
