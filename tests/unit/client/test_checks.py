"""Bad input at the client's door: the error names the argument and what would be accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvclient import checks
from kvclient.errors import InvalidArgument
from kvproto.grid import Grid, Region
from kvproto.prefix import ROOT

GRID = Grid(layers=3, heads=2, block_tokens=32, page_tokens=16, page_bytes=8)
KEY = bytes(32)
FULL = np.zeros((3, 2, 16), np.uint8)
SIGNED: Any = FULL.view(np.int8)
NO_ARRAY: Any = b"abc"


@pytest.mark.parametrize(
    ("call", "field", "limit"),
    [
        (lambda: checks.hash_list("hashes", []), "hashes", "non-empty"),
        (lambda: checks.hash_list("hashes", KEY), "hashes", "list"),  # type: ignore[arg-type]
        (lambda: checks.hash_list("hashes", [KEY, b"x"]), "hashes[1]", "32 bytes"),
        (lambda: checks.hash_list("hashes", [KEY] * 3, count_max=2), "hashes", "at most 2"),
        (lambda: checks.parent_list([KEY], [KEY, KEY]), "parents", "2 digests"),
        (lambda: checks.parent_list([b""], [KEY]), "parents[0]", "32 bytes"),
        (lambda: checks.token_list([1], 2, GRID), "tokens", "2 numbers"),
        (lambda: checks.token_list([32, 33], 2, GRID), "tokens[1]", "from 1 to 32"),
        (lambda: checks.token_list([0], 1, GRID), "tokens[0]", "from 1 to 32"),
        (lambda: checks.region_in(Region(0, 4, 0, 2), GRID), "region.layers", "[0, 3)"),
        (lambda: checks.region_in(Region(1, 1, 0, 2), GRID), "region.layers", "non-empty"),
        (lambda: checks.region_in(Region(0, 1, 0, 3), GRID), "region.heads", "[0, 2)"),
        (
            lambda: checks.region_in(Region(0, 2, 0, 2), GRID, Region(1, 3, 0, 2)),
            *("region", "within"),
        ),
        (lambda: checks.milliseconds("wait_s", -1, 5), "wait_s", "from 0 to 5 s"),
        (lambda: checks.milliseconds("wait_s", 5.1, 5), "wait_s", "from 0 to 5 s"),
        (lambda: checks.milliseconds("wait_s", float("nan"), 5), "wait_s", "from 0 to 5 s"),
        (lambda: checks.blocks_of("arrays", [FULL], [32, 32], GRID, GRID.whole), "arrays", "2 b"),
        (
            lambda: checks.blocks_of("arrays", [FULL[:2]], [32], GRID, GRID.whole),
            *("arrays[0]", "shape [3, 2, 16"),
        ),
        (
            lambda: checks.blocks_of("arrays", [FULL[:, :, :15]], [32], GRID, GRID.whole),
            *("arrays[0]", "16 or more"),
        ),
        (
            lambda: checks.blocks_of("arrays", [SIGNED], [32], GRID, GRID.whole),
            *("arrays[0]", "uint8"),
        ),
        (
            lambda: checks.blocks_of("arrays", [NO_ARRAY], [32], GRID, GRID.whole),
            *("arrays[0]", "uint8"),
        ),
        (
            lambda: checks.targets_of(
                "out", [np.zeros((3, 2, 32), np.uint8)[:, :, ::2]], [32], GRID, GRID.whole
            ),
            *("out[0]", "contiguous"),
        ),
        (
            lambda: checks.targets_of(
                "out",
                [np.frombuffer(bytes(96), np.uint8).reshape(3, 2, 16)],
                [32],
                GRID,
                GRID.whole,
            ),
            *("out[0]", "writable"),
        ),
        (
            lambda: checks.blocks_of(
                "arrays", [np.zeros((3, 2, 4, 8), np.uint8)[:, :, ::2]], [32], GRID, GRID.whole
            ),
            *("arrays[0]", "contiguous"),
        ),
    ],
)
def test_the_error_names_field_and_limit(
    call: Callable[[], object], field: str, limit: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert caught.value.field == field
    assert limit in caught.value.limit
    assert (caught.value.kind, field in str(caught.value)) == ("invalid", True)


def test_parents_default_to_the_chain() -> None:
    keys = [bytes([i]) * 32 for i in range(3)]
    assert checks.parent_list(None, keys) == [ROOT, *keys[:2]]


def test_tails_may_be_narrow_and_full_arrays_wide() -> None:
    tail = np.zeros((3, 2, 8), np.uint8)
    blocks = checks.blocks_of("arrays", [FULL, tail], [32, 16], GRID, GRID.whole)
    assert [block.shape for block in blocks] == [(3, 2, 16), (3, 2, 8)]
    wide = np.zeros((2, 3, 2, 16), np.uint8)
    assert len(checks.blocks_of("arrays", wide, [32, 1], GRID, GRID.whole)) == 2


def test_paged_arrays_are_seen_as_cells_without_a_copy() -> None:
    paged = np.zeros((3, 2, 2, 8), np.uint8)
    (block,) = checks.targets_of("out", [paged], [32], GRID, GRID.whole)
    block[1, 1, 9] = 5
    assert paged[1, 1, 1, 1] == 5
