"""The prefix hash: fixed vectors, a second implementation, and no dependence on the process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto.errors import FieldError
from kvproto.prefix import (
    EXTRA_KEY_BYTES_MAX,
    EXTRA_KEYS_MAX,
    ROOT,
    block_hash,
    pack_hashes,
    prefix_hashes,
    token_array,
    unpack_hashes,
)

# Published in docs/protocol.md. A change of any of them is a new format version.
ONE = "046e9284f65efe4603f054f4b78aec1d1f99179f08049855870aaf57e932c30a"
FIRST = "8bbe44f8084dd4c8848622fd607c636fa3b79cbf8dfd1baf7190a4fd095d5af1"
SECOND = "40416d39d6c5f445ab3d6ff7a20e35f2fbbc32ad7367516b1db83fc281ad723c"
TAIL = "dedc1cd6fcb744d1e22cbdd09b9065fadb5ceb8078fcc90eb12e109d53db8c52"
SALTED = "273c1933a3c3ead1ad6755a097078a1981a8daee4389fef1e5b8f17cea1bddd9"
ADAPTED = "a94ce6ecada1bb80f93ac5140764062696e0e1e80522803fa1afb45ea860b4e1"
VECTORS = [
    (ONE, ROOT, [0], []),
    (FIRST, ROOT, list(range(128)), []),
    (SECOND, bytes.fromhex(FIRST), list(range(128, 256)), []),
    (TAIL, bytes.fromhex(FIRST), [4294967295, 7, 0], []),
    (SALTED, ROOT, list(range(128)), [b"salt"]),
    (ADAPTED, ROOT, list(range(128)), [b"", b"lora:\x00\x01\x02\x03"]),
]

TEXT: Any = ["text"]
BARE: Any = b"salt"  # not in a list

tokens_lists = st.lists(st.integers(0, 0xFFFF_FFFF), max_size=300)
extras = st.lists(st.binary(max_size=40), max_size=4)


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _by_the_book(parent: bytes, tokens: list[int], extra: list[bytes]) -> bytes:
    """The definition in docs/protocol.md, written a second time."""
    message = b"kvp1" + parent + _u32(len(tokens)) + b"".join(map(_u32, tokens))
    message += _u32(len(extra)) + b"".join(_u32(len(key)) + key for key in extra)
    return hashlib.sha256(message).digest()


@pytest.mark.parametrize(("digest", "parent", "tokens", "extra"), VECTORS)
def test_vectors(digest: str, parent: bytes, tokens: list[int], extra: list[bytes]) -> None:
    assert block_hash(parent, tokens, extra).hex() == digest
    assert _by_the_book(parent, tokens, extra).hex() == digest


def test_vectors_stand_in_the_protocol_document() -> None:
    document = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    assert [digest for digest, *_ in VECTORS if digest not in document] == []


def test_a_chain_is_its_blocks() -> None:
    chain = prefix_hashes(range(256), 128)
    assert [digest.hex() for digest in chain] == [FIRST, SECOND]


@pytest.mark.parametrize("seed", ["0", "1", "4242", "random"])
def test_pythons_hash_seed_does_not_matter(seed: str) -> None:
    code = (
        "from kvproto.prefix import *\nfrom kvproto.namespace import NamespaceSpec as N\n"
        "print(prefix_hashes(range(256), 128)[1].hex())\n"
        "attributes = {k: k for k in {'b', 'a', 'window', 'rope'}}\n"
        "print(N(model='m', weights=bytes(32), kv_dtype='d', encoding='e', layers=1, kv_heads=1,"
        " page_bytes=1, attributes=attributes).id.hex())"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert outcome.stdout.split() == [
        SECOND,
        "04414811dd922aa69ebff46f200fc19e94ba7b6f193aff43e9d5cbf860043d40",
    ]


@given(tokens_lists, st.integers(1, 64), st.lists(extras, max_size=8), st.booleans())
def test_chain_against_the_definition(
    tokens: list[int], block_tokens: int, extra: list[list[bytes]], tail: bool
) -> None:
    expected, parent = [], ROOT
    for index, start in enumerate(range(0, len(tokens), block_tokens)):
        block = tokens[start : start + block_tokens]
        if len(block) < block_tokens and not tail:
            break
        parent = _by_the_book(parent, block, extra[index] if index < len(extra) else [])
        expected.append(parent)
    assert prefix_hashes(tokens, block_tokens, extra=extra, tail=tail) == expected


@given(tokens_lists, st.integers(1, 32), st.integers(0, 10))
def test_a_chain_can_be_continued(tokens: list[int], block_tokens: int, blocks: int) -> None:
    whole = prefix_hashes(tokens, block_tokens)
    cut = min(blocks, len(whole))
    parent = whole[cut - 1] if cut else ROOT
    assert prefix_hashes(tokens[cut * block_tokens :], block_tokens, parent=parent) == whole[cut:]


@given(tokens_lists.filter(bool), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    tokens: list[int], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[at] ^= data.draw(st.integers(1, 0xFFFF_FFFF))
    one = prefix_hashes(tokens, 16, tail=True)
    two = prefix_hashes(other, 16, tail=True)
    assert [a == b for a, b in zip(one, two, strict=True)] == [
        i < at // 16 for i in range(len(one))
    ]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_a_tail_is_keyed_by_exactly_its_tokens(tokens: list[int]) -> None:
    longer = [*tokens, 0]
    assert block_hash(ROOT, tokens) != block_hash(ROOT, longer)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([b"ab", b"c"], [b"a", b"bc"]),
        ([b"a", b"b"], [b"b", b"a"]),
        ([], [b""]),
        ([b""], [b"", b""]),
        ([b"\0\0\0\0"], [b""]),
    ],
)
def test_extra_keys_cannot_be_confused(one: list[bytes], two: list[bytes]) -> None:
    assert block_hash(ROOT, [1], one) != block_hash(ROOT, [1], two)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", "<u4", ">u8", "u2", "i1"])
def test_every_integer_type_gives_the_same_hash(dtype: str) -> None:
    tokens = list(range(127))
    assert block_hash(ROOT, np.array(tokens, dtype=dtype)) == block_hash(ROOT, tokens)


def test_a_strided_array_gives_the_same_hash() -> None:
    array = np.arange(512, dtype=np.int64)
    assert prefix_hashes(array[::2], 64) == prefix_hashes(list(range(0, 512, 2)), 64)
    assert prefix_hashes(tuple(range(128)), 64) == prefix_hashes(range(128), 64)


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([-1], "-1"),
        ([3, 2**32], str(2**32)),
        ([2**64], "object"),
        ([1, 2**63], ""),
        ([1.0], "float64"),
        ([True], "bool"),
        (["1"], "<U1"),
        ([[1, 2], [3, 4]], "(2, 2)"),
        (np.array([2**40], dtype=np.uint64), str(2**40)),
    ],
)
def test_bad_tokens_are_named(tokens: list[int], shown: str) -> None:
    with pytest.raises(FieldError) as caught:
        prefix_hashes(tokens, 1)
    assert caught.value.field == "tokens"
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("call", "field", "limit"),
    [
        (lambda: block_hash(ROOT, []), "tokens", "at least one token"),
        (lambda: block_hash(bytes(31), [1]), "parent", "32 bytes"),
        (lambda: prefix_hashes([1], 1, parent=b""), "parent", "32 bytes"),
        (lambda: prefix_hashes([1], 0), "block_tokens", "from 1 to 65536"),
        (lambda: prefix_hashes([1], 65_537), "block_tokens", "from 1 to 65536"),
        (lambda: block_hash(ROOT, [1], [b""] * (EXTRA_KEYS_MAX + 1)), "extra", "at most 4096"),
        (lambda: block_hash(ROOT, [1], [bytes(EXTRA_KEY_BYTES_MAX + 1)]), "extra", "65536 bytes"),
        (lambda: block_hash(ROOT, [1], TEXT), "extra", "byte strings"),
        (lambda: block_hash(ROOT, [1], BARE), "extra", "byte strings"),
        (lambda: pack_hashes([bytes(31)]), "hashes", "32 bytes"),
        (lambda: unpack_hashes("hashes", bytes(33), count_max=9), "hashes", "a multiple of 32"),
        (lambda: unpack_hashes("parents", bytes(96), count_max=2), "parents", "at most 2 keys"),
    ],
)
def test_bad_arguments_are_named(call: object, field: str, limit: str) -> None:
    assert callable(call)
    with pytest.raises(FieldError) as caught:
        call()
    assert caught.value.field == field
    assert limit in caught.value.limit


def test_no_tokens_no_hashes() -> None:
    assert prefix_hashes([], 16) == []
    assert prefix_hashes([], 16, tail=True) == []
    assert prefix_hashes([1] * 15, 16) == []
    assert token_array([]).dtype == np.dtype("<u4")


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_packing_round_trip(hashes: list[bytes]) -> None:
    packed = pack_hashes(hashes)
    assert len(packed) == 32 * len(hashes)
    assert unpack_hashes("hashes", packed, count_max=20) == hashes
