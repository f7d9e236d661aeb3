"""The namespace: everything that must match for two engines to share KV.

Its id is SHA-256 over a canonical encoding: fields in a fixed order, each as
`u32 length | bytes`, integers as 8 little-endian bytes, attributes sorted by name. Two versions
of a model, two dtypes, two page sizes are two namespaces; nothing is ever compared by name alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from kvproto.errors import FieldError, require_int
from kvproto.grid import Grid

FORMAT_VERSION = 1
NAMESPACE_ID_BYTES = 32
TAG_BYTES = 16
DEFAULT_BLOCK_TOKENS = 128
DEFAULT_PAGE_TOKENS = 16
TEXT_BYTES_MAX = 512
ATTRIBUTES_MAX = 64
_MAGIC = b"kvns"
_TEXTS = ("model", "kv_dtype", "encoding", "tenant")
_COUNTS = ("block_tokens", "page_tokens", "layers", "kv_heads", "page_bytes")


@dataclass(frozen=True)
class NamespaceSpec:
    """What two engines agree on. `weights` and `adapter` are digests of content, never of paths.

    Raises FieldError, which names the field and its limit, when a value cannot be right.
    """

    model: str
    weights: bytes
    kv_dtype: str
    encoding: str
    layers: int
    kv_heads: int
    page_bytes: int
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    page_tokens: int = DEFAULT_PAGE_TOKENS
    adapter: bytes = b""
    tenant: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require_int("format_version", self.format_version, FORMAT_VERSION, FORMAT_VERSION)
        for name in _TEXTS:
            _check_text(name, getattr(self, name), empty=name == "tenant")
        if not isinstance(self.weights, bytes) or len(self.weights) != 32:
            raise FieldError("weights", self.weights, "32 bytes")
        if not isinstance(self.adapter, bytes) or len(self.adapter) not in (0, 32):
            raise FieldError("adapter", self.adapter, "0 or 32 bytes")
        if not isinstance(self.attributes, Mapping):
            raise FieldError("attributes", self.attributes, "a mapping of names to texts")
        if len(self.attributes) > ATTRIBUTES_MAX:
            raise FieldError("attributes", len(self.attributes), f"at most {ATTRIBUTES_MAX}")
        for key, value in self.attributes.items():
            _check_text("attributes", key, empty=False)
            _check_text(f"attributes[{key}]", value, empty=True)
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))
        _ = self.grid

    @cached_property
    def grid(self) -> Grid:
        for name in _COUNTS:
            require_int(name, getattr(self, name), 1, 1 << 31)
        return Grid(
            layers=self.layers,
            heads=self.kv_heads,
            block_tokens=self.block_tokens,
            page_tokens=self.page_tokens,
            page_bytes=self.page_bytes,
        )

    @cached_property
    def canonical(self) -> bytes:
        """The canonical encoding, from which `decode` builds an equal spec."""
        parts = [_MAGIC, _item(_number(self.format_version))]
        parts += [_item(getattr(self, name).encode()) for name in _TEXTS]
        parts += [_item(self.weights), _item(self.adapter)]
        parts += [_item(_number(getattr(self, name))) for name in _COUNTS]
        parts.append(_item(_number(len(self.attributes))))
        for key in sorted(self.attributes):
            parts += [_item(key.encode()), _item(self.attributes[key].encode())]
        return b"".join(parts)

    @cached_property
    def id(self) -> bytes:
        """32 bytes: the namespace's identity."""
        return sha256(self.canonical).digest()

    @property
    def tag(self) -> bytes:
        """The first 16 bytes of the id, as directory entries and journal records store it."""
        return self.id[:TAG_BYTES]

    def __hash__(self) -> int:
        return hash(self.id)

    def differences(self, other: NamespaceSpec) -> list[str]:
        """Names of the fields in which two specs differ."""
        names = [f.name for f in fields(self) if f.name != "attributes"]
        differing = [n for n in names if getattr(self, n) != getattr(other, n)]
        keys = sorted(set(self.attributes) | set(other.attributes))
        differing += [
            f"attributes[{k}]" for k in keys if self.attributes.get(k) != other.attributes.get(k)
        ]
        return differing

    @classmethod
    def decode(cls, raw: bytes) -> NamespaceSpec:
        """The inverse of `canonical`. FieldError when `raw` is no canonical encoding."""
        reader = _Reader(raw)
        require_int("format_version", reader.number(), FORMAT_VERSION, FORMAT_VERSION)
        values: dict[str, Any] = {name: reader.text() for name in _TEXTS}
        values |= {name: reader.item() for name in ("weights", "adapter")}
        values |= {name: reader.number() for name in _COUNTS}
        count = min(reader.number(), ATTRIBUTES_MAX + 1)
        values["attributes"] = {reader.text(): reader.text() for _ in range(count)}
        spec = cls(**values)
        if spec.canonical != raw:
            raise FieldError("spec", len(raw), "a canonical encoding")
        return spec


def _check_text(name: str, value: object, *, empty: bool) -> None:
    low = 0 if empty else 1
    try:
        size = len(value.encode()) if isinstance(value, str) else -1
    except UnicodeEncodeError:  # a lone surrogate
        size = -1
    if not low <= size <= TEXT_BYTES_MAX:
        raise FieldError(name, value, f"UTF-8 text of {low} to {TEXT_BYTES_MAX} bytes")


def _number(value: int) -> bytes:
    return struct.pack("<Q", value)


def _item(raw: bytes) -> bytes:
    return struct.pack("<I", len(raw)) + raw


class _Reader:
    """Reads the items of a canonical encoding; FieldError at the first byte that is wrong."""

    def __init__(self, raw: bytes) -> None:
        if raw[:4] != _MAGIC:
            raise FieldError("spec", raw[:4], "a canonical encoding")
        self._raw = raw
        self._at = 4

    def item(self) -> bytes:
        head = self._raw[self._at : self._at + 4]
        if len(head) < 4:
            raise FieldError("spec", len(self._raw), "a whole canonical encoding")
        length = struct.unpack("<I", head)[0]
        start = self._at + 4
        if start + length > len(self._raw):
            raise FieldError("spec", len(self._raw), "a whole canonical encoding")
        self._at = start + length
        return self._raw[start : start + length]

    def number(self) -> int:
        raw = self.item()
        if len(raw) != 8:
            raise FieldError("spec", raw, "numbers of 8 bytes")
        value: int = struct.unpack("<Q", raw)[0]
        return value

    def text(self) -> str:
        try:
            return self.item().decode()
        except UnicodeDecodeError as error:
            raise FieldError("spec", "undecodable text", "UTF-8") from error
