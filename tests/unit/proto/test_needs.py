"""How long a prefix several groups of layers can use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvproto.needs import usable_prefix


@dataclass(frozen=True)
class Need:
    kind: str
    blocks: int = 0


EVERY, LAST, STATE = Need("every"), Need("last", 2), Need("state")


def test_usable_prefix_by_need() -> None:
    have = np.array([True, True, False, True, True, True, False])
    assert usable_prefix([have], [EVERY]) == 2
    assert usable_prefix([have], [LAST]) == 6
    assert usable_prefix([have], [STATE]) == 6
    assert usable_prefix([have], [Need("last", 4)]) == 2
    assert usable_prefix([have, have], [EVERY, STATE]) == 2
    assert usable_prefix([np.array([False, True])], [STATE]) == 2
    assert usable_prefix([np.array([False])], [STATE]) == 0
    assert usable_prefix([np.array([], dtype=bool)], [EVERY]) == 0


def test_needs_that_find_different_blocks_are_judged_together() -> None:
    """The longest prefix of one is no answer: its own last blocks may be another's gap."""
    full = np.array([True, True, True, True, False])
    window = np.array([False, True, True, False, True])
    assert usable_prefix([full], [EVERY]) == 4
    assert usable_prefix([window], [LAST]) == 3
    assert usable_prefix([full, window], [EVERY, LAST]) == 3
    assert usable_prefix([full, window], [EVERY, Need("last", 1)]) == 3
    assert usable_prefix([full, window, ~window], [EVERY, LAST, STATE]) == 0
