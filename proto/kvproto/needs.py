"""What a group of layers needs of a prefix, and how long a prefix satisfies several of them.

Full attention reads every block of a prefix, a sliding window the last ones, recurrent state only
the state behind the last. The hub judges one namespace so; a reader whose layers lie in several
namespaces judges them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class NeedLike(Protocol):
    @property
    def kind(self) -> str:
        """'every', 'last' or 'state'."""

    @property
    def blocks(self) -> int:
        """How many, of 'last'."""


def usable_prefix(have: Sequence[Mask], needs: Sequence[NeedLike]) -> int:
    """The longest N such that every need is satisfied by a prefix of N blocks.

    'every' needs blocks 0..N-1, 'last' the last `blocks` of them, 'state' block N-1; `have[i]` says
    which blocks needs[i] finds. At least one need; masks of equal length.
    """
    count = len(have[0])
    if not count:
        return 0
    positions = np.arange(1, count + 1)
    fits = np.ones(count, np.bool_)
    for mine, need in zip(have, needs, strict=True):
        if need.kind == "every":
            gaps = np.flatnonzero(~mine)
            fits &= positions <= (int(gaps[0]) if gaps.size else count)
        elif need.kind == "last":
            # The run of blocks that we have and that ends at each position.
            last_gap = np.maximum.accumulate(np.where(mine, 0, positions))
            fits &= positions - last_gap >= np.minimum(need.blocks, positions)
        else:
            fits &= mine
    found = np.flatnonzero(fits)
    return int(found[-1]) + 1 if found.size else 0
