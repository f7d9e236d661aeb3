"""Packed fields, single fields and errors: what is refused, and how it is named."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from kvproto.errors import FieldError
from kvproto.grid import Grid, Region
from kvproto.namespace import NamespaceSpec
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import (
    Place,
    Tier,
)
from kvserver.service import convert

GRID = Grid(layers=4, heads=2, block_tokens=32, page_tokens=16, page_bytes=64)
SPEC = NamespaceSpec(
    model="m",
    weights=bytes(32),
    kv_dtype="float32",
    encoding="test/1",
    layers=4,
    kv_heads=2,
    page_bytes=64,
    block_tokens=32,
    attributes={"rope": "1"},
)


def test_every_kind_of_error_has_a_status() -> None:
    assert set(convert.STATUSES) == set(ErrorKind)


def test_a_refusal_carries_kind_field_and_limit() -> None:
    error = CoreError(ErrorKind.LIMIT, "too many", field="sessions_max", limit=3)
    code, message, trailers = convert.status_of(error)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message == "too many"
    assert dict(trailers) == {"kv-kind": "limit", "kv-field": "sessions_max", "kv-limit": "3"}


def test_metadata_is_printable_ascii_of_bounded_length() -> None:
    error = FieldError("feld\nß", "x", "ü" * 10_000)
    _, _, trailers = convert.status_of(error)
    for _, value in trailers:
        assert value.isascii()
        assert value.isprintable()
        assert len(value) <= 512


def test_hashes_are_split_and_ragged_or_too_many_are_refused() -> None:
    raw = bytes(range(64))
    assert convert.hashes_from("hashes", raw, count_max=2) == [raw[:32], raw[32:]]
    with pytest.raises(FieldError, match="hashes is 63, must be a multiple of 32"):
        convert.hashes_from("hashes", raw[:-1], count_max=2)
    with pytest.raises(CoreError, match="keys_per_call_max = 1") as caught:
        convert.hashes_from("hashes", raw, count_max=1)
    assert caught.value.kind is ErrorKind.LIMIT
    with pytest.raises(FieldError, match="at least one key"):
        convert.some_hashes_from("hashes", b"", count_max=1)


def test_numbers_are_read_little_endian_and_counted() -> None:
    raw = np.array([1, 2, 1 << 31], "<u4").tobytes()
    assert convert.numbers_from("tokens", raw, "<u4", count=3).tolist() == [1, 2, 1 << 31]
    with pytest.raises(FieldError, match="tokens is 11, must be a multiple of 4"):
        convert.numbers_from("tokens", raw[:-1], "<u4")
    with pytest.raises(FieldError, match="tokens is 3, must be 2 numbers"):
        convert.numbers_from("tokens", raw, "<u4", count=2)
    with pytest.raises(CoreError, match="keys_per_call_max"):
        convert.numbers_from("indices", raw, "<u4", count_max=2)


def test_durations_are_refused_beyond_their_limit() -> None:
    assert convert.seconds_from("wait_ms_max", 1500, maximum_ms=2000) == 1.5
    assert convert.seconds_from("lease_ms_max", 0, maximum_ms=2000, zero=2000) == 2.0
    with pytest.raises(CoreError, match="wait_ms_max = 2000"):
        convert.seconds_from("wait_ms_max", 2001, maximum_ms=2000)
    assert convert.milliseconds(0.0015) == 2
    assert convert.milliseconds(-1.0) == 0


@pytest.mark.parametrize(
    ("region", "field"),
    [
        ((0, 0, 0, 2), "region.layers"),
        ((3, 2, 0, 2), "region.layers"),
        ((0, 5, 0, 2), "region.layers"),
        ((0, 4, 0, 3), "region.heads"),
        ((0, 4, 1, 1), "region.heads"),
        ((0, 4_000_000_000, 0, 2), "region.layers"),
    ],
)
def test_a_region_outside_the_grid_is_refused(region: tuple[int, ...], field: str) -> None:
    message = pb.Region(
        layer_start=region[0], layer_stop=region[1], head_start=region[2], head_stop=region[3]
    )
    with pytest.raises(FieldError, match=field):
        convert.region_within(message, GRID)


def test_a_region_within_the_grid_is_taken_as_it_is() -> None:
    message = pb.Region(layer_start=1, layer_stop=3, head_start=0, head_stop=2)
    assert convert.region_within(message, GRID) == Region(1, 3, 0, 2)


def test_needs_name_what_is_wrong() -> None:
    need = pb.LayerGroupNeed
    whole = pb.Region(layer_stop=4, head_stop=2)
    needs = convert.needs_from([need(kind=need.LAST_BLOCKS, blocks=2, region=whole)], GRID)
    assert [(n.kind, n.blocks, n.region) for n in needs] == [("last", 2, GRID.whole)]
    with pytest.raises(FieldError, match=r"need\.blocks"):
        convert.needs_from([need(kind=need.LAST_BLOCKS)], GRID)
    with pytest.raises(FieldError, match=r"need\.kind"):
        convert.needs_from([need(kind=77)], GRID)
    with pytest.raises(FieldError, match="at most 64 layer groups"):
        convert.needs_from([need()] * 65, GRID)


def test_a_spec_survives_the_wire_and_its_errors_name_the_field() -> None:
    message = convert.spec_to(SPEC)
    assert convert.spec_from(pb.NamespaceSpec.FromString(message.SerializeToString())) == SPEC
    message.weights = b"short"
    with pytest.raises(FieldError, match=r"spec\.weights is b'short', must be 32 bytes"):
        convert.spec_from(message)


def test_places_are_packed_with_holes() -> None:
    offsets, generations = convert.places_to([Place(Tier.HOST, 16384, 16384, 7), None])
    assert np.frombuffer(offsets, "<u8").tolist() == [16384, (1 << 64) - 1]
    assert np.frombuffer(generations, "<u8").tolist() == [7, 0]
