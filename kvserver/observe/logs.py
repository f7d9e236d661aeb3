"""Log lines that a person or a machine can read.

Every line is an event with fields: `event(log, "ready", listen="127.0.0.1:50051")`.

    json    {"time": "2026-01-05T10:00:00.123Z", "level": "info", "event": "ready", "listen": ...}
    text    2026-01-05T10:00:00.123Z info    ready listen=127.0.0.1:50051

Rule 1: an event's name is a constant of snake_case words, what varies is in the fields.
Rule 2: no log line holds a key's tokens, a session token or payload bytes.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "text")
_ROOT = "kvserver"


def get_logger(name: str) -> logging.Logger:
    """The logger of a part, below the one that `configure` sets up."""
    return logging.getLogger(f"{_ROOT}.{name}")


def event(log: logging.Logger, name: str, level: int = logging.INFO, **fields: object) -> None:
    """Log one event. An exception being handled is added when `level` is ERROR."""
    if log.isEnabledFor(level):
        failed = level >= logging.ERROR and sys.exc_info()[0] is not None
        log.log(level, name, extra={"fields": fields}, exc_info=failed)


def configure(*, level: str, style: str, stream: TextIO | None = None) -> None:
    """Send all events to `stream` (stderr) in one of FORMATS. Replaces an earlier configuration."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    root = logging.getLogger(_ROOT)
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    root.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return fields


def _stamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "part": record.name.removeprefix(f"{_ROOT}."),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=_plain, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        pairs = [f"{key}={_shown(value)}" for key, value in _fields(record).items()]
        head = f"{_stamp(record)} {record.levelname.lower():<7} {record.getMessage()}"
        line = " ".join([head, *pairs])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)


def _shown(value: object) -> str:
    text = str(_plain(value))
    plain = text.isprintable() and not set(text) & set(' "=') and text
    return text if plain else json.dumps(text, ensure_ascii=False)
