"""Every test that docs/promises.md names exists."""

from __future__ import annotations

import re

from tests.tidy.tree import ROOT

_NAME = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_promises_name_tests_that_exist() -> None:
    named = _NAME.findall((ROOT / "docs" / "promises.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    absent = [
        f"{file}::{name}"
        for file, name in named
        if not (path := ROOT / "tests" / file).is_file()
        or not re.search(rf"^(async )?def {name}\(|^(class )?{name}\b", path.read_text(), re.M)
    ]
    assert absent == []
