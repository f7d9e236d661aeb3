"""The picture of a hand-off: its labels can be read."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from bench.handoff_plot import LABEL_SIZE, LETTER, ROW, TICKS_MAX, TITLE, TOP, WIDTH, svg, ticks

LAYERS, CHUNKS = 3, 4


def logs(first_token: float) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Of two engines; chunks take a second each, and the last layer is done at 4 s."""
    prefill: list[dict[str, object]] = []
    decode: list[dict[str, object]] = []
    for chunk in range(CHUNKS):
        prefill.append({"event": "scheduled", "t": float(chunk), "request": "r", "tokens": 256})
        for layer in range(LAYERS):
            done = chunk + (layer + 1) / LAYERS
            region = [layer, layer + 1]
            prefill.append({"event": "save_layer", "t": done, "layer": layer, "jobs": [chunk]})
            prefill.append({"event": "commit", "t": done + 0.01, "blocks": 2, "layers": region})
            decode.append({"event": "fetched", "t": done + 0.02, "tokens": 256, "layers": region})
    decode.append({"event": "scheduled", "t": first_token, "request": "d", "tokens": 1})
    return prefill, decode


def test_no_label_meets_another_nor_a_curve_nor_a_line() -> None:
    picture = svg(*logs(first_token=4.05))
    pattern = r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" font-size="10"[^>]*>([^<]+)'
    labels = []
    for x, y, anchor, text in re.findall(pattern, picture):
        width = LETTER * len(text)
        left = float(x) - (width if anchor == "end" else 0)
        labels.append((left, left + width, float(y), text))
    assert sorted(text for *_, text in labels) == [
        *(f"chunk {n + 1}" for n in range(CHUNKS)),
        "first token",
        "last layer",
    ]
    for left, right, y, _ in labels:
        assert 0 < y - LABEL_SIZE < y < TOP
        assert 0 < left < right < WIDTH
    for (left, right, y, text), (other_left, other_right, other_y, other) in combinations(
        labels, 2
    ):
        apart = left >= other_right or other_left >= right
        assert apart or abs(y - other_y) >= ROW, f"{text!r} meets {other!r}"
    upright = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="\1"', picture)
    assert len(upright) == len(labels)
    for x, top in upright:
        for left, right, y, text in labels:
            across = left < float(x) < right and y > float(top)
            assert not across, f"a line crosses {text!r}"


def test_it_says_what_it_is_above_all_labels() -> None:
    picture = svg(*logs(first_token=4.05))
    (y, title) = re.findall(
        r'<text x="[\d.]+" y="([\d.]+)" [^>]*font-size="14"[^>]*>([^<]+)', picture
    )[0]
    assert title == TITLE.replace("'", "&#x27;")
    tops = re.findall(r'y="([\d.]+)" text-anchor="\w+" font-size="10"', picture)
    assert float(y) < min(map(float, tops)) - LABEL_SIZE


@pytest.mark.parametrize("seconds", [0.004, 0.8, 1.0, 4.2, 6.48, 7.999, 8.0, 63.0, 1000.0])
def test_times_are_round(seconds: float) -> None:
    times = ticks(seconds)
    assert 3 <= len(times) <= TICKS_MAX
    assert times[0] == 0
    assert seconds - times[1] < times[-1] <= seconds
    assert f"{times[1]:.0e}"[0] in "125"
    assert all(len(f"{time:g}") <= 6 for time in times)
