"""What a benchmark prints and what it holds against a goal are one figure."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from bench.machine import rounded_down


@given(st.floats(0, 100), st.integers(0, 2000), st.integers(1, 3))
@example(0.39961, 400, 3)  # was shown as 0.4, and missed 0.4
@example(0.4, 400, 3)
@example(0.796, 80, 2)
def test_a_goal_that_is_missed_does_not_look_met(value: float, nth: int, digits: int) -> None:
    shown, floor = rounded_down(value, digits), nth / 10**digits
    assert shown <= value < shown + 1.01 * 10**-digits
    assert (shown >= floor) == (value >= floor)
