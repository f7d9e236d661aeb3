"""A result's push and pull ratios by batch size, as an SVG file in plain text.

    python -m bench.plot bench/results/DATE.json docs/performance.svg

Bars are medians, whiskers the lowest and highest of the rounds, dashed lines the floors.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 64, 60
_COLOURS = {
    ("push", 0): "#1f5fa8",
    ("push", 1): "#86b4e4",
    ("pull", 0): "#b4541a",
    ("pull", 1): "#edb083",
}
_FLOOR_COLOURS = {"push": "#1f5fa8", "pull": "#b4541a"}
_INK = "#333333"


def svg(result: dict[str, Any]) -> str:
    """The picture of one result with a `transfer` section."""
    rows = result["transfer"]
    batches = sorted({row["batch_blocks"] for row in rows})
    clients = sorted({row["clients"] for row in rows})
    series = [(o, n) for o in ("push", "pull") for n in range(len(clients))]
    top = max(1.0, *(row["ratio_high"] for row in rows)) * 1.05
    parts = [_frame(top), _title(result, rows[0]["block_bytes"])]
    group = (WIDTH - LEFT - RIGHT) / len(batches)
    bar = group * 0.8 / len(series)
    found = {(row["operation"], row["clients"], row["batch_blocks"]): row for row in rows}
    for i, batch in enumerate(batches):
        start = LEFT + i * group + group * 0.1
        middle = LEFT + (i + 0.5) * group
        parts.append(_text(middle, HEIGHT - BOTTOM + 18, _per_call(batch), anchor="middle"))
        for j, (operation, n) in enumerate(series):
            row = found.get((operation, clients[n], batch))
            if row is not None:
                parts.append(_bar(start + j * bar, bar, row, _COLOURS[operation, n % 2], top))
    for operation in ("push", "pull"):
        floor = next(row["floor"] for row in rows if row["operation"] == operation)
        parts.append(_floor(floor, operation, top))
    parts.append(_legend(series, clients))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _per_call(batch: int) -> str:
    return f"{batch} block{'s' if batch > 1 else ''} a call"


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _frame(top: float) -> str:
    lines = []
    step = 0.2 if top <= 2 else 0.5
    for i in range(int(top / step) + 1):
        value = i * step
        y = _y(value, top)
        colour = _INK if i == 0 else "#dddddd"
        lines.append(_line(LEFT, y, WIDTH - RIGHT, y, colour))
        lines.append(_text(LEFT - 8, y + 4, f"{value:.1f}", anchor="end"))
    return "\n".join(lines)


def _title(result: dict[str, Any], block_bytes: int) -> str:
    facts = result["machine"]
    title = f"Push and verified pull over shared memory, {block_bytes / (1 << 20):g} MiB blocks"
    detail = f"speed as a share of memcpy in the same run; {facts['cores']} cores, {facts['date']}"
    return _text(LEFT, 22, title, size=15) + "\n" + _text(LEFT, 40, detail)


def _bar(x: float, width: float, row: dict[str, Any], colour: str, top: float) -> str:
    y = _y(row["ratio"], top)
    height = HEIGHT - BOTTOM - y
    middle = x + width * 0.45
    ink = "white" if colour in _FLOOR_COLOURS.values() else _INK
    return "\n".join(
        (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width * 0.9:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>',
            _line(middle, _y(row["ratio_low"], top), middle, _y(row["ratio_high"], top), _INK),
            _text(middle, HEIGHT - BOTTOM - 6, f"{row['ratio']:.2f}", anchor="middle", fill=ink),
        )
    )


def _floor(value: float, operation: str, top: float) -> str:
    y = _y(value, top)
    colour = _FLOOR_COLOURS[operation]
    return _line(LEFT, y, WIDTH - RIGHT, y, colour, dashed=True)


def _legend(series: list[tuple[str, int]], clients: list[int]) -> str:
    parts = []
    x = float(LEFT)
    y = HEIGHT - 18
    for operation, n in series:
        count = clients[n]
        name = f"{operation}, {count} client{'s' if count > 1 else ''}"
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="12" height="12" '
            f'fill="{_COLOURS[operation, n % 2]}"/>'
        )
        parts.append(_text(x + 17, y, name))
        x += 125
    parts.append(_line(x, y - 4, x + 24, y - 4, _INK, dashed=True))
    parts.append(_text(x + 30, y, "floors"))
    return "\n".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, fill: str = _INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{fill}">{escape(text)}</text>'
    )


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m bench.plot RESULT.json PICTURE.svg", file=sys.stderr)
        return 2
    result = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(svg(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
