"""Log lines: one line an event, readable by machines and people."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kvserver.observe import logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger("kvserver")
    before = (list(root.handlers), root.level, root.propagate)
    yield
    root.handlers, root.propagate = before[0], before[2]
    root.setLevel(before[1])


def lines(style: str, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    logs.configure(level=level, style=style, stream=stream)
    return logs.get_logger("part"), stream


def test_json_lines_carry_event_part_level_and_fields() -> None:
    log, stream = lines("json")
    logs.event(log, "ready", epoch=3, key=b"\x01\xff", path="ä\n")
    line = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "ready",
        "part": "part",
        "epoch": 3,
        "key": "01ff",
        "path": "ä\n",
    }


def test_text_lines_quote_what_has_spaces() -> None:
    log, stream = lines("text")
    logs.event(log, "disk_down", logging.WARNING, reason="no space left", count=2)
    assert stream.getvalue().endswith('warning disk_down reason="no space left" count=2\n')


def test_the_level_is_kept_and_errors_carry_a_traceback() -> None:
    log, stream = lines("json", level="error")
    logs.event(log, "quiet")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logs.event(log, "loud", logging.ERROR)
    (line,) = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert line["event"] == "loud"
    assert "RuntimeError: boom" in line["traceback"]


def test_configuring_twice_does_not_double_the_lines() -> None:
    lines("json")
    log, stream = lines("text")
    logs.event(log, "once")
    assert stream.getvalue().count("once") == 1
