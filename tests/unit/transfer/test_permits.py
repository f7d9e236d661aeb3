"""A permit holds for exactly what it was given for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvproto.frames import PERMIT_BYTES, Op, Place
from kvproto.grid import Region
from kvserver.transfer.permits import Permits, new_secret

PLACE = Place(
    hold=7,
    offset=1 << 14,
    generation=3,
    cell_bytes=4096,
    layers=4,
    heads=2,
    granted=Region(0, 4, 0, 2),
)


@pytest.fixture
def permits() -> Permits:
    return Permits(new_secret())


def permitted(permits: Permits, op: Op = Op.WRITE, client: int = 9) -> Place:
    return replace(PLACE, permit=permits.mint(op, client, PLACE))


def test_what_was_minted_is_accepted(permits: Permits) -> None:
    for op in Op:
        assert permits.check(op, 9, permitted(permits, op))


@pytest.mark.parametrize(
    "change",
    [
        {"hold": 8},
        {"offset": 2 << 14},
        {"generation": 4},
        {"cell_bytes": 8192},
        {"layers": 5},
        {"heads": 3},
        {"granted": Region(0, 4, 0, 1)},
        {"permit": bytes(PERMIT_BYTES)},
    ],
)
def test_any_other_place_is_refused(permits: Permits, change: dict[str, object]) -> None:
    other = replace(permitted(permits), **change)  # type: ignore[arg-type]
    assert not permits.check(Op.WRITE, 9, other)


def test_another_operation_or_client_is_refused(permits: Permits) -> None:
    place = permitted(permits)
    assert not permits.check(Op.READ, 9, place)
    assert not permits.check(Op.WRITE, 8, place)


def test_another_server_process_refuses_it(permits: Permits) -> None:
    assert not Permits(new_secret()).check(Op.WRITE, 9, permitted(permits))


def test_permits_are_packed_in_order_with_zeros_for_nothing(permits: Permits) -> None:
    other = replace(PLACE, offset=0)
    packed = permits.mint_all(Op.READ, 1, [PLACE, None, other])
    assert packed == (permits.mint(Op.READ, 1, PLACE) + bytes(16) + permits.mint(Op.READ, 1, other))


def test_every_bit_of_a_permit_counts(permits: Permits) -> None:
    good = permitted(permits)
    for bit in range(8 * PERMIT_BYTES):
        raw = bytearray(good.permit)
        raw[bit // 8] ^= 1 << bit % 8
        assert not permits.check(Op.WRITE, 9, replace(good, permit=bytes(raw)))
