"""Struct of arrays: named typed columns of one length that grow together.

A million rows are a dozen flat arrays, invisible to the garbage collector. Scalar access goes
through `array.array` (several times faster than a NumPy scalar), whole-batch access through
NumPy views of the same memory.

Rule: growing replaces the arrays. Never keep a column in a local variable across a call that may
add a row.
"""

from __future__ import annotations

from array import array
from typing import Any, ClassVar

import numpy as np

_DTYPES = {"B": np.uint8, "I": np.uint32, "Q": np.uint64, "q": np.int64}
_CAPACITY_START = 256


class Columns:
    """Subclasses declare `codes` (column name -> array typecode) and `viewed` (with NumPy view)."""

    codes: ClassVar[dict[str, str]]
    viewed: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.capacity = 0
        self.length = 1  # row 0 stands for "none"
        self._unused: list[int] = []
        self._grow(_CAPACITY_START)

    def _grow(self, capacity: int) -> None:
        for name, code in self.codes.items():
            grown: array[Any] = array(code, bytes(array(code).itemsize * capacity))
            if self.capacity:
                grown[: self.capacity] = getattr(self, name)
            setattr(self, name, grown)
            if name in self.viewed:
                setattr(self, f"{name}_view", np.frombuffer(grown, dtype=_DTYPES[code]))
        self.capacity = capacity
        self._regrown()

    def _regrown(self) -> None:
        """The arrays were replaced: subclasses renew what refers to them."""

    def _new(self) -> int:
        """A row whose columns are all zero."""
        if self._unused:
            return self._unused.pop()
        if self.length == self.capacity:
            self._grow(self.capacity * 2)
        self.length += 1
        return self.length - 1

    def _delete(self, row: int) -> None:
        for name in self.codes:
            getattr(self, name)[row] = 0
        self._unused.append(row)

    @property
    def rows(self) -> int:
        """Rows in use."""
        return self.length - 1 - len(self._unused)
