"""Moving estimates of prefills and loads."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.pace import PREFILL_TOKENS_MIN, Line, Pace


def test_nothing_is_estimated_before_it_was_measured() -> None:
    pace = Pace()
    assert pace.prefill_s(100) is None
    assert pace.load_s(100) is None


def test_a_line_has_a_fixed_part_and_one_per_token() -> None:
    line = Line()
    for tokens in (128, 4096, 512, 2048, 128):
        line.add(tokens, 0.02 + tokens * 1e-5)
    assert line.at(10_000) == pytest.approx(0.12)
    assert line.at(1) == pytest.approx(0.02, rel=0.01)


def test_loads_of_one_length_say_nothing_of_the_fixed_part() -> None:
    line = Line()
    for _ in range(5):
        line.add(512, 0.1)
    assert line.at(512) == pytest.approx(0.1)
    assert line.at(1024) == pytest.approx(0.2)


def test_old_measurements_fade() -> None:
    line = Line()
    for _ in range(50):
        line.add(512, 1.0)
    for _ in range(50):
        line.add(512, 0.1)
    assert line.at(512) == pytest.approx(0.1, rel=0.1)


def test_a_line_is_never_negative() -> None:
    line = Line()
    for tokens, seconds in ((1000, 0.1), (2000, 0.05), (100, 0.3)):
        line.add(tokens, seconds)
    for tokens in (1, 1000, 100_000):
        estimate = line.at(tokens)
        assert estimate is not None
        assert estimate >= 0


def test_steps_count_by_their_prompt_tokens() -> None:
    pace = Pace()
    pace.step_begins(0.0, PREFILL_TOKENS_MIN - 1)
    pace.step_ends(9.0)
    assert pace.prefill_s(100) is None
    pace.step_begins(10.0, 1000)
    pace.step_ends(10.5)
    pace.step_ends(99.0)
    assert pace.prefill_s(2000) == pytest.approx(1.0)
