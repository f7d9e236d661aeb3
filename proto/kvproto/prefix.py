"""The prefix hash: what names a block.

A chain of SHA-256 digests. Block i's digest covers its parent's digest, its own token ids and its
extra keys, so equal digests mean equal prefixes. The encoding is this project's own, fixed byte
for byte (test vectors: docs/protocol.md), and depends neither on an engine's hash, its block size
nor on Python's hash seed:

    digest = SHA-256( "kvp1" | parent[32] | u32 n_tokens | n_tokens x u32 token
                      | u32 n_extra | n_extra x ( u32 length | bytes ) )

All integers are little-endian. The parent of the first block is 32 zero bytes. A block holds
`block_tokens` tokens; a tail holds fewer and is keyed by exactly those.

Extra keys are byte strings that change what the tokens mean: an adapter's content, a multimodal
item's hash with its offset in the block, a cache salt. Their order matters.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError, require_int

HASH_BYTES = 32
ROOT = bytes(HASH_BYTES)
_MAGIC = b"kvp1"
_U32 = struct.Struct("<I")
TOKEN_MAX = 0xFFFF_FFFF
EXTRA_KEYS_MAX = 4096
EXTRA_KEY_BYTES_MAX = 1 << 16

Tokens = Sequence[int] | npt.NDArray[np.integer]


def _encode_extra(extra: Sequence[bytes]) -> bytes:
    if len(extra) > EXTRA_KEYS_MAX:
        raise FieldError("extra", len(extra), f"at most {EXTRA_KEYS_MAX} keys")
    parts = [_U32.pack(len(extra))]
    for key in extra:
        if not isinstance(key, bytes) or len(key) > EXTRA_KEY_BYTES_MAX:
            raise FieldError("extra", key, f"byte strings of at most {EXTRA_KEY_BYTES_MAX} bytes")
        parts.append(_U32.pack(len(key)))
        parts.append(key)
    return b"".join(parts)


def token_array(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as contiguous little-endian u32. FieldError when one is negative or too large."""
    array = np.asarray(tokens)
    if array.size == 0:
        return np.empty(0, dtype="<u4")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise FieldError("tokens", f"{array.dtype}{array.shape}", "a flat sequence of integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > TOKEN_MAX:
        raise FieldError("tokens", low if low < 0 else high, f"token ids from 0 to {TOKEN_MAX}")
    return np.ascontiguousarray(array, dtype="<u4")


def block_hash(parent: bytes, tokens: Tokens, extra: Sequence[bytes] = ()) -> bytes:
    """Digest of one block, 32 bytes. `parent` is the digest of the block before it, or ROOT."""
    if len(parent) != HASH_BYTES:
        raise FieldError("parent", len(parent), f"{HASH_BYTES} bytes")
    array = token_array(tokens)
    if array.size == 0:
        raise FieldError("tokens", 0, "at least one token")
    return _digest(parent, array.tobytes(), array.size, _encode_extra(extra))


def _digest(parent: bytes, raw: bytes, count: int, extra: bytes) -> bytes:
    return sha256(_MAGIC + parent + _U32.pack(count) + raw + extra).digest()


def prefix_hashes(
    tokens: Tokens,
    block_tokens: int,
    *,
    extra: Sequence[Sequence[bytes]] = (),
    tail: bool = False,
    parent: bytes = ROOT,
) -> list[bytes]:
    """Digests of the chain over `tokens`, one per full block, and of the tail if asked for.

    `extra[i]` are the extra keys of block i; blocks past its end have none. Continuing a chain:
    pass the last digest as `parent` and the tokens after it.
    """
    require_int("block_tokens", block_tokens, 1, 65_536)
    if len(parent) != HASH_BYTES:
        raise FieldError("parent", len(parent), f"{HASH_BYTES} bytes")
    array = token_array(tokens)
    raw = memoryview(array.tobytes())
    none = _encode_extra(())
    hashes: list[bytes] = []
    for index, start in enumerate(range(0, array.size, block_tokens)):
        count = min(block_tokens, array.size - start)
        if count < block_tokens and not tail:
            break
        keys = _encode_extra(extra[index]) if index < len(extra) else none
        parent = _digest(parent, bytes(raw[4 * start : 4 * (start + count)]), count, keys)
        hashes.append(parent)
    return hashes


def pack_hashes(hashes: Sequence[bytes]) -> bytes:
    """N digests as one field of N x 32 bytes."""
    for digest in hashes:
        if len(digest) != HASH_BYTES:
            raise FieldError("hashes", len(digest), f"digests of {HASH_BYTES} bytes")
    return b"".join(hashes)


def unpack_hashes(field: str, packed: bytes, *, count_max: int) -> list[bytes]:
    """The digests of a packed field. FieldError when ragged or longer than `count_max`."""
    if len(packed) % HASH_BYTES:
        raise FieldError(field, len(packed), f"a multiple of {HASH_BYTES} bytes long")
    count = len(packed) // HASH_BYTES
    if count > count_max:
        raise FieldError(field, count, f"at most {count_max} keys a call (keys_per_call_max)")
    return [packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES)]
