"""Writes docker/kvserver.example.toml: every option, what it is, and its default.

The words and the defaults are those of `kvserver.config`; a test compares the two. With `-`, the
text goes to standard output instead.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from kvserver.config import option_table

TARGET = Path(__file__).resolve().parent.parent / "docker" / "kvserver.example.toml"
_SHIFTS = ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))
_HEAD = """\
# Every option of `kvserver serve`, with its default. Use it as `kvserver serve --config FILE`.
# Flags and KVSERVER_* environment variables win over it. Written by `make config`.
"""


def shown(name: str, value: object) -> str:
    """A default as TOML, sizes in the largest unit that is exact."""
    if isinstance(value, int) and not isinstance(value, bool) and "bytes" in name:
        for shift, unit in _SHIFTS:
            if value and value % (1 << shift) == 0:
                return f'"{value >> shift}{unit}"'
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def lines() -> Iterator[str]:
    group = ""
    for name, meta in option_table().items():
        if meta["group"] != group:
            group = meta["group"]
            yield f"\n# ---- {group} ".ljust(80, "-")
        yield ""
        yield from textwrap.wrap(meta["help"], 96, initial_indent="# ", subsequent_indent="# ")
        yield f"#{name} = {shown(name, meta['default'])}"


def text() -> str:
    return _HEAD + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(text())
    else:
        TARGET.write_text(text())
