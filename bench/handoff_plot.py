"""One hand-off as a picture: layers computed, committed and fetched, from two event logs.

    python -m bench.handoff_plot PREFILL.jsonl DECODE.jsonl docs/handoff.svg

The logs are those of a prefill and a decode engine (`event_log`) on one machine; drawn is the last
prompt of the prefill engine. Lines are shares of what that prompt has in all.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 76, 48
TITLE = "One hand-off: shares of a prompt's KV, by the time since its prefill began"
TICKS_MAX = 8
LABEL_SIZE, LETTER, ROW = 10, 6.0, 13
"""Of the labels above the curves: the size, a letter's width at most, and a row's height."""
_INK = "#333333"
Points = list[tuple[float, float]]
Mark = tuple[float, str, str]
"""Where, what, and which of `start` and `end` of the label stands there."""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _steps(events: Iterable[tuple[float, float]]) -> Points:
    """Running shares of the sum."""
    ordered = sorted(events)
    total, done = sum(weight for _, weight in ordered), 0.0
    points = []
    for at, weight in ordered:
        done += weight
        points.append((at, done / total))
    return points


def _layers(event: dict[str, Any]) -> int:
    first, stop = event["layers"]
    return int(stop - first)


def svg(prefill: list[dict[str, Any]], decode: list[dict[str, Any]]) -> str:
    request = [e for e in prefill if e["event"] == "scheduled"][-1]["request"]
    chunks = [e for e in prefill if e["event"] == "scheduled" and e["request"] == request]
    start = chunks[0]["t"]
    mine = [e for e in prefill if e["t"] >= start]
    theirs = [e for e in decode if e["t"] >= start]
    tokens = {job: e["tokens"] for e, job in zip(chunks, _jobs(mine), strict=False)}
    hooks = [e for e in mine if e["event"] == "save_layer"]
    first = next(e["t"] for e in theirs if e["event"] == "scheduled")
    series = [
        ("computed", "#888888", _steps((e["t"], tokens.get(e["jobs"][0], 1)) for e in hooks)),
        (
            "committed at the hub",
            "#1f5fa8",
            _steps((e["t"], e["blocks"] * _layers(e)) for e in mine if e["event"] == "commit"),
        ),
        (
            "held by the decode engine",
            "#b4541a",
            _steps((e["t"], e["tokens"] * _layers(e)) for e in theirs if e["event"] == "fetched"),
        ),
    ]
    end = first + 0.03 * (first - start)
    marks = [(_x(e["t"], start, end), f"chunk {n}", "start") for n, e in enumerate(chunks, 1)]
    marks.append((_x(hooks[-1]["t"], start, end), "last layer", "end"))
    marks.append((_x(first, start, end), "first token", "end"))
    parts = [_text(LEFT, 20, TITLE, size=14), _frame(start, end)]
    for (x, label, anchor), y in label_rows(marks):
        beside = LETTER / 2 if anchor == "start" else -LETTER / 2
        parts.append(_line(x, y - LABEL_SIZE, x, HEIGHT - BOTTOM, "#cccccc"))
        parts.append(_text(x + beside, y, label, anchor=anchor, size=LABEL_SIZE))
    for number, (label, colour, points) in enumerate(series):
        parts.append(_curve(points, start, end, colour))
        parts.append(_text(LEFT + 210 * number, HEIGHT - 8, label, colour=colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def label_rows(marks: Sequence[Mark]) -> list[tuple[Mark, float]]:
    """The base line of each label, which stands above the curves and beside its mark's line: at its
    start or its end. Where two would meet, that whose line stands outside is raised, so that no
    line crosses a label."""
    starts = [mark for mark in marks if mark[2] == "start"]
    ends = [mark for mark in marks if mark[2] == "end"]
    rows: list[list[tuple[float, float]]] = []
    places = []
    for mark in [*reversed(starts), *ends]:
        x, label, anchor = mark
        width = LETTER * (len(label) + 1)
        left, right = (x, x + width) if anchor == "start" else (x - width, x)
        free = (n for n, row in enumerate(rows) if all(left > b or right < a for a, b in row))
        row = next(free, len(rows))
        rows[row:] = [[*(rows[row] if row < len(rows) else []), (left, right)], *rows[row + 1 :]]
        places.append((mark, TOP - 6.0 - ROW * row))
    return places


def _jobs(events: list[dict[str, Any]]) -> list[int]:
    """The push of each chunk, in order."""
    return list(dict.fromkeys(e["jobs"][0] for e in events if e["event"] == "save_layer"))


def _x(at: float, start: float, end: float) -> float:
    return LEFT + (at - start) / (end - start) * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(start: float, end: float) -> str:
    lines = []
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        lines.append(_line(LEFT, y, WIDTH - RIGHT, y, "#eeeeee" if tenth else _INK))
        lines.append(_text(LEFT - 8, y + 4, f"{10 * tenth} %", anchor="end"))
    for seconds in ticks(end - start):
        x = _x(start + seconds, start, end)
        lines.append(_text(x, HEIGHT - BOTTOM + 18, f"{seconds:g} s", anchor="middle"))
    return "\n".join(lines)


def ticks(seconds: float) -> list[float]:
    """Round times from 0 on: steps of 1, 2 or 5 and a power of ten, at most TICKS_MAX of them."""
    power = 10.0 ** math.floor(math.log10(seconds / TICKS_MAX))
    steps = (power * digit for digit in (1, 2, 5, 10, 20))
    step, last = next((s, n) for s in steps if (n := int(seconds / s + 1e-9)) < TICKS_MAX)
    return [round(step * n, 9) for n in range(last + 1)]


def _curve(points: Points, start: float, end: float, colour: str) -> str:
    path, share = [f"M {_x(points[0][0], start, end):.1f} {_y(0):.1f}"], 0.0
    for at, value in points:
        x = _x(at, start, end)
        path.append(f"L {x:.1f} {_y(share):.1f} L {x:.1f} {_y(value):.1f}")
        share = value
    return f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = _INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(text)}</text>'
    )


def main(arguments: list[str]) -> int:
    prefill, decode, target = (Path(argument) for argument in arguments)
    target.write_text(svg(read(prefill), read(decode)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
