"""Rooms that one can take in: lengths, docstrings, and nothing left lying about."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.tidy.tree import ROOT, sources, texts

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
LINE_CHARS_MAX = 100

# Spelled in parts, or this file would find itself.
_LEFTOVERS = re.compile(
    "|".join(["TO" + "DO", "FIX" + "ME", r"\bX" + r"XX\b", "NotImpl" + "ementedError"])
    + "|"
    + "|".join([r"\bfor n" + r"ow\b", "place" + "holder"]),
)
# Folders of one machine: a build farm's, somebody's home, a scratch space.
_FOLDERS = "|".join(["wo" + "rk", "fa" + "rm", "ro" + "ot", "ho" + "me/(?!engine)\\w+"])
_PACKAGES = "/op" + "t/(?:py" + "pi|wh" + "eels)"
_MACHINE_PATHS = re.compile(rf"(?<![\w.$}}/-])/(?:{_FOLDERS})/|{_PACKAGES}")


def test_modules_are_short() -> None:
    long = {m.where: n for m in sources() if (n := len(m.text.splitlines())) > MODULE_LINES_MAX}
    assert long == {}


def test_functions_are_short() -> None:
    long = {}
    for module in sources():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long[f"{module.where}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_lines_are_short() -> None:
    long = [
        f"{module.where}:{number}"
        for module in sources()
        for number, line in enumerate(module.text.splitlines(), 1)
        if len(line) > LINE_CHARS_MAX
    ]
    assert long == []


def test_modules_say_what_they_are() -> None:
    """An `__init__.py` without a line of code needs no word either."""
    silent = [m.where for m in sources() if m.tree.body and not ast.get_docstring(m.tree)]
    assert silent == []


def test_nothing_is_left_lying_about() -> None:
    found = [
        f"{module.where}:{number} {match[0]}"
        for module in sources()
        for number, line in enumerate(module.text.splitlines(), 1)
        if (match := _LEFTOVERS.search(line))
    ]
    assert found == []


def test_no_path_of_one_machine_is_committed() -> None:
    found = []
    for path in texts():
        for number, line in enumerate(_lines(path), 1):
            if match := _MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number} {match[0]}")
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert _LEFTOVERS.search("# TO" + "DO: later")
    assert not _LEFTOVERS.search("performance of nowhere")
    assert _MACHINE_PATHS.search('open("/ro' + 'ot/x")')
    assert _MACHINE_PATHS.search("cd /wo" + "rk/main")
    assert not _MACHINE_PATHS.search("docs/wo" + "rk/x and $HOME/ro" + "ot/")


def test_every_skip_says_why() -> None:
    """A skip names what the machine lacks; an expected failure would be a known defect."""
    wrong = []
    for module in sources():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "xfail":
                wrong.append(f"{module.where}:{node.lineno} xfail")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "pytest.skip",
                "pytest.mark.skip",
                "pytest.mark.skipif",
            }:
                words = [k for k in node.keywords if k.arg == "reason"]
                if not words and not (ast.unparse(node.func) == "pytest.skip" and node.args):
                    wrong.append(f"{module.where}:{node.lineno} no reason")
    assert wrong == []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
