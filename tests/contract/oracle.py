"""What the contract tests share: namespaces of their own, and the check of whole chains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from kvclient import AsyncNamespace
from tests.support.payload import Blocks

_seeds = count(1)


def fresh(**shape: int) -> Blocks:
    """Blocks of a namespace that no other test has."""
    number = next(_seeds)
    return Blocks(weights=number.to_bytes(32, "little"), **shape)


async def check_all(namespace: AsyncNamespace, blocks: Blocks, keys: Sequence[bytes]) -> None:
    out = blocks.out(len(keys))
    result = await namespace.pull(keys, out)
    assert result.found.all()
    assert blocks.wrong(keys, out, result.found) == []
