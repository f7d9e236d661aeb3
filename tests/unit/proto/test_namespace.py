"""The namespace's identity: every field counts, every byte of its encoding is fixed."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto.errors import FieldError
from kvproto.grid import CELLS_MAX, HEADS_MAX, LAYERS_MAX, PAGE_BYTES_MAX
from kvproto.namespace import ATTRIBUTES_MAX, TEXT_BYTES_MAX, NamespaceSpec

PLAIN = NamespaceSpec(
    model="demo",
    weights=bytes(32),
    kv_dtype="float32",
    encoding="raw/1",
    layers=4,
    kv_heads=2,
    page_bytes=4096,
)
RICH = NamespaceSpec(
    model="org/modèle",
    weights=bytes(range(32)),
    kv_dtype="bfloat16",
    encoding="flash-kv/1",
    layers=32,
    kv_heads=8,
    page_bytes=8192,
    block_tokens=256,
    page_tokens=32,
    adapter=b"\xff" * 32,
    tenant="acme",
    attributes={"window": "4096", "rope.theta": "1000000", "a": ""},
)
PLAIN_ID = "26001c5d3c5b6d4036600abcfef87e693154331c8f875e9a29eb2d52def7ff7d"
RICH_ID = "e2711acf5cb48675d68cf826c9fa2b58b1e93c38c94ed92265af39b1a39b6a62"

OTHER: dict[str, Any] = {
    "model": "demo2",
    "weights": b"\1" + bytes(31),
    "kv_dtype": "float16",
    "encoding": "raw/2",
    "layers": 5,
    "kv_heads": 3,
    "page_bytes": 4097,
    "block_tokens": 64,
    "page_tokens": 32,
    "adapter": bytes(32),
    "tenant": "t",
    "attributes": {"k": "v"},
}


def _item(raw: bytes) -> bytes:
    return struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    return _item(struct.pack("<Q", value))


def _by_the_book(spec: NamespaceSpec) -> bytes:
    """The encoding as docs/protocol.md words it, written a second time."""
    out = b"kvns" + _number(1)
    for text in (spec.model, spec.kv_dtype, spec.encoding, spec.tenant):
        out += _item(text.encode())
    out += _item(spec.weights) + _item(spec.adapter)
    for count in (spec.block_tokens, spec.page_tokens, spec.layers, spec.kv_heads, spec.page_bytes):
        out += _number(count)
    out += _number(len(spec.attributes))
    for key, value in sorted((k.encode(), v.encode()) for k, v in spec.attributes.items()):
        out += _item(key) + _item(value)
    return out


_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@st.composite
def specs(draw: st.DrawFn) -> NamespaceSpec:
    layers = draw(st.integers(1, LAYERS_MAX))
    page_tokens = draw(st.integers(1, 256))
    return NamespaceSpec(
        model=draw(_text),
        weights=draw(st.binary(min_size=32, max_size=32)),
        kv_dtype=draw(_text),
        encoding=draw(_text),
        layers=layers,
        kv_heads=draw(st.integers(1, min(HEADS_MAX, CELLS_MAX // layers))),
        page_bytes=draw(st.integers(1, PAGE_BYTES_MAX)),
        page_tokens=page_tokens,
        block_tokens=page_tokens * draw(st.integers(1, 256)),
        adapter=draw(st.sampled_from([b"", bytes(32), b"\x7f" * 32])),
        tenant=draw(st.text(st.characters(codec="utf-8"), max_size=20)),
        attributes=draw(st.dictionaries(_text, st.text(st.characters(codec="utf-8"), max_size=40))),
    )


@pytest.mark.parametrize(("spec", "identity"), [(PLAIN, PLAIN_ID), (RICH, RICH_ID)])
def test_vectors(spec: NamespaceSpec, identity: str) -> None:
    assert spec.canonical == _by_the_book(spec)
    assert spec.id.hex() == identity
    assert spec.id == sha256(spec.canonical).digest()
    assert spec.tag == spec.id[:16]


def test_vectors_stand_in_the_protocol_document() -> None:
    document = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    assert PLAIN_ID in document
    assert RICH_ID in document
    assert PLAIN.canonical.hex() in document.replace("\n", "")


@given(specs())
def test_round_trip(spec: NamespaceSpec) -> None:
    again = NamespaceSpec.decode(spec.canonical)
    assert again == spec
    assert again.id == spec.id
    assert hash(again) == hash(spec)
    assert spec.canonical == _by_the_book(spec)


@given(specs(), specs())
def test_equal_encodings_mean_equal_specs(one: NamespaceSpec, two: NamespaceSpec) -> None:
    assert (one.canonical == two.canonical) == (one == two)
    assert (one.differences(two) == []) == (one == two)


@given(specs(), st.data())
def test_a_damaged_encoding_is_refused_or_another_spec(
    spec: NamespaceSpec, data: st.DataObject
) -> None:
    raw = bytearray(spec.canonical)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        other = NamespaceSpec.decode(bytes(raw))
    except FieldError:
        return
    assert other != spec
    assert other.canonical == bytes(raw)


@given(specs(), st.integers(0, 400), st.binary(max_size=8))
def test_a_cut_or_lengthened_encoding_is_refused(
    spec: NamespaceSpec, cut: int, more: bytes
) -> None:
    raw = spec.canonical
    wrong = raw[: max(0, len(raw) - 1 - cut)] if not more else raw + more
    with pytest.raises(FieldError):
        NamespaceSpec.decode(wrong)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FieldError):
        NamespaceSpec.decode(noise)
    with pytest.raises(FieldError):
        NamespaceSpec.decode(b"kvns" + noise)


def test_attributes_out_of_order_are_not_canonical() -> None:
    spec = replace(PLAIN, attributes={"a": "1", "b": "2"})
    pair_a, pair_b = _item(b"a") + _item(b"1"), _item(b"b") + _item(b"2")
    assert spec.canonical.endswith(pair_a + pair_b)
    swapped = spec.canonical[: -len(pair_a + pair_b)] + pair_b + pair_a
    with pytest.raises(FieldError, match="canonical"):
        NamespaceSpec.decode(swapped)


def test_attribute_order_is_no_difference() -> None:
    one = replace(PLAIN, attributes={"a": "1", "b": "2"})
    two = replace(PLAIN, attributes={"b": "2", "a": "1"})
    assert one == two
    assert one.id == two.id


def test_attributes_cannot_change_afterwards() -> None:
    attributes = {"a": "1"}
    spec = replace(PLAIN, attributes=attributes)
    before = spec.id
    attributes["a"] = "2"
    assert dict(spec.attributes) == {"a": "1"}
    assert replace(spec).id == before
    with pytest.raises(TypeError):
        spec.attributes["a"] = "3"  # type: ignore[index]


@pytest.mark.parametrize("name", OTHER)
def test_every_field_is_part_of_the_identity(name: str) -> None:
    other = replace(PLAIN, **{name: OTHER[name]})
    assert other.id != PLAIN.id
    assert PLAIN.differences(other) == ["attributes[k]" if name == "attributes" else name]


def test_a_later_format_is_refused_by_its_version() -> None:
    later = b"kvns" + _number(2) + _item(b"something else entirely")
    with pytest.raises(FieldError) as caught:
        NamespaceSpec.decode(later)
    assert caught.value.field == "format_version"


TOO_MANY = {f"k{i}": "" for i in range(ATTRIBUTES_MAX + 1)}
LONG = "x" * (TEXT_BYTES_MAX + 1)
WIDE = "é" * (TEXT_BYTES_MAX // 2 + 1)  # short enough in characters, not in bytes
TEXT_LIMIT = f"1 to {TEXT_BYTES_MAX} bytes"


@pytest.mark.parametrize(
    ("changes", "field", "limit"),
    [
        ({"format_version": 2}, "format_version", "from 1 to 1"),
        ({"format_version": 1.0}, "format_version", "from 1 to 1"),
        ({"model": ""}, "model", TEXT_LIMIT),
        ({"model": LONG}, "model", TEXT_LIMIT),
        ({"model": WIDE}, "model", TEXT_LIMIT),
        ({"model": "\ud800"}, "model", TEXT_LIMIT),
        ({"model": None}, "model", TEXT_LIMIT),
        ({"kv_dtype": ""}, "kv_dtype", TEXT_LIMIT),
        ({"encoding": ""}, "encoding", TEXT_LIMIT),
        ({"tenant": LONG}, "tenant", f"0 to {TEXT_BYTES_MAX} bytes"),
        ({"weights": bytes(31)}, "weights", "32 bytes"),
        ({"weights": "x" * 32}, "weights", "32 bytes"),
        ({"adapter": bytes(1)}, "adapter", "0 or 32 bytes"),
        ({"attributes": TOO_MANY}, "attributes", f"at most {ATTRIBUTES_MAX}"),
        ({"attributes": {"": "x"}}, "attributes", TEXT_LIMIT),
        ({"attributes": {"k": LONG}}, "attributes[k]", f"0 to {TEXT_BYTES_MAX} bytes"),
        ({"attributes": {"k": 1}}, "attributes[k]", f"0 to {TEXT_BYTES_MAX} bytes"),
        ({"attributes": ["k"]}, "attributes", "a mapping"),
        ({"layers": 0}, "layers", "from 1"),
        ({"layers": -1}, "layers", "from 1"),
        ({"layers": True}, "layers", "an integer"),
        ({"layers": LAYERS_MAX + 1}, "layers", f"to {LAYERS_MAX}"),
        ({"kv_heads": 0}, "kv_heads", "from 1"),
        ({"kv_heads": HEADS_MAX + 1}, "kv_heads", f"to {HEADS_MAX}"),
        ({"layers": 1024, "kv_heads": 17}, "layers * kv_heads", f"at most {CELLS_MAX}"),
        ({"page_bytes": 0}, "page_bytes", "from 1"),
        ({"page_bytes": PAGE_BYTES_MAX + 1}, "page_bytes", f"to {PAGE_BYTES_MAX}"),
        ({"page_bytes": 4096.0}, "page_bytes", "an integer"),
        ({"page_tokens": 0}, "page_tokens", "from 1"),
        ({"page_tokens": 129}, "page_tokens", "to 128"),
        ({"page_tokens": 48}, "page_tokens", "a divisor of block_tokens (128)"),
        ({"block_tokens": 0}, "block_tokens", "from 1"),
        ({"block_tokens": 65_552}, "block_tokens", "to 65536"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:40],
)
def test_a_bad_field_is_named_with_its_limit(
    changes: dict[str, Any], field: str, limit: str
) -> None:
    with pytest.raises(FieldError) as caught:
        replace(PLAIN, **changes)
    assert caught.value.field == field
    assert limit in caught.value.limit
    assert field in str(caught.value)
    assert caught.value.limit in str(caught.value)


def test_the_largest_namespace_is_accepted() -> None:
    spec = replace(
        PLAIN,
        model="x" * TEXT_BYTES_MAX,
        layers=LAYERS_MAX,
        kv_heads=CELLS_MAX // LAYERS_MAX,
        page_bytes=PAGE_BYTES_MAX,
        block_tokens=65_536,
        page_tokens=65_536,
        attributes={f"k{i}": "" for i in range(ATTRIBUTES_MAX)},
    )
    assert NamespaceSpec.decode(spec.canonical) == spec
