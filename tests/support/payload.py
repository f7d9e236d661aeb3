"""Blocks whose bytes follow from their key, so that every byte served can be checked.

    blocks = Blocks(layers=4, heads=2, page_bytes=4096)
    namespace.push(blocks.chain(1, 8), blocks.payloads(blocks.chain(1, 8)))

The oracle stores nothing: `payload(key)` makes again what must come back for `key`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvproto.namespace import NamespaceSpec
from kvproto.prefix import prefix_hashes
from tests.support.heap import HEAP

Bytes = npt.NDArray[np.uint8]


class Blocks:
    """Keys and payloads of one namespace. `payload_bytes` of a block are layers x heads x cell."""

    def __init__(
        self,
        *,
        layers: int = 4,
        heads: int = 2,
        page_bytes: int = 4096,
        block_tokens: int = 128,
        page_tokens: int = 16,
        name: str = "oracle",
        weights: bytes = bytes(32),
    ) -> None:
        self.spec = NamespaceSpec(
            model=name,
            weights=weights,
            kv_dtype="float32",
            encoding="raw/1",
            layers=layers,
            kv_heads=heads,
            page_bytes=page_bytes,
            block_tokens=block_tokens,
            page_tokens=page_tokens,
        )
        self.shape = (layers, heads, self.spec.grid.cell_bytes())

    @property
    def payload_bytes(self) -> int:
        return self.spec.grid.payload_bytes()

    def chain(self, seed: int, count: int) -> list[bytes]:
        """Keys of a prompt of `count` blocks; another seed is another prompt."""
        tokens = np.arange(count * self.spec.block_tokens, dtype=np.uint32) % 997
        tokens[0] = 1000 + seed
        return prefix_hashes(tokens, self.spec.block_tokens)

    def payload(self, key: bytes) -> Bytes:
        """The bytes of a full block [layers, heads, cell_bytes], a function of its key."""
        seed = int.from_bytes(key[:8], "little")
        raw = np.random.Generator(np.random.SFC64(seed)).bytes(self.payload_bytes)
        return np.frombuffer(raw, np.uint8).reshape(self.shape)

    def payloads(self, keys: Sequence[bytes]) -> Bytes:
        out = HEAP.array((len(keys), *self.shape))
        return np.stack([self.payload(key) for key in keys], out=out) if keys else out

    def out(self, count: int) -> Bytes:
        """Room for `count` pulled blocks, filled with a byte pattern that no block consists of."""
        out = HEAP.array((count, *self.shape))
        out[:] = 0xA5
        return out

    def wrong(
        self, keys: Sequence[bytes], out: Bytes, found: Sequence[bool] | npt.NDArray[np.bool_]
    ) -> list[int]:
        """Positions that were reported as found with bytes that are not theirs."""
        return [
            i
            for i, key in enumerate(keys)
            if found[i] and not np.array_equal(out[i].reshape(self.shape), self.payload(key))
        ]
