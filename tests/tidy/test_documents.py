"""What the documents say exists: commands, targets, files, options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

from kvserver.cli import build_parser
from kvserver.config import load, option_table
from kvserver.options import flag_of
from tests.tidy.tree import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@cache
def _make_targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text()
    return frozenset(re.findall(r"^([a-z][a-z-]*):.*## ", text, re.MULTILINE))


def _commands(path: Path) -> list[str]:
    """Shell lines of a document: its fenced blocks, and what stands in backquotes."""
    text = path.read_text(encoding="utf-8")
    lines = [
        line
        for language, body in _FENCE.findall(text)
        if language in {"sh", "bash", "console", ""}
        for line in body.replace("\\\n", " ").splitlines()
    ]
    return [*lines, *_CODE.findall(_FENCE.sub("", text))]


def test_there_are_documents() -> None:
    assert {"README.md", "CHANGELOG.md", "SECURITY.md"} <= {path.name for path in DOCUMENTS}


def test_documented_make_targets_exist() -> None:
    absent = [
        f"{path.relative_to(ROOT)}: make {target}"
        for path in DOCUMENTS
        for command in _commands(path)
        for target in re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", command.strip())
        if target not in _make_targets()
    ]
    assert absent == []


def test_make_help_tells_every_target() -> None:
    told = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert {line.split()[1] for line in told.splitlines()} == set(phony[1].split())


@cache
def _help(command: str) -> str:
    """What `kvserver COMMAND --help` prints."""
    return _subcommands()[command].format_help()


@cache
def _subcommands() -> dict[str, ArgumentParser]:
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return commands


def test_documented_kvserver_commands_and_flags_exist() -> None:
    wrong = []
    for path in DOCUMENTS:
        for command in _commands(path):
            match = re.match(r"(?:\$ )?kvserver ([a-z][a-z-]*)(.*)", command.strip())
            if match is None:
                continue
            if match[1] not in _subcommands():
                wrong.append(f"{path.name}: {command}")
                continue
            words = shlex.split(match[2], comments=True)
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            wrong += [
                f"{path.name}: {command}: {flag}" for flag in flags if flag not in _help(match[1])
            ]
    assert wrong == []


def test_links_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in DOCUMENTS
        for target in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8")))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_paths_in_the_documents_exist() -> None:
    """Files, folders and `file::test` in backquotes."""
    folders = "bench|client|constraints|docker|docs|kvserver|proto|scripts|tests|vllm_adapter"
    path_like = re.compile(rf"((?:{folders})/[\w./-]*[\w/])(?:::(\w+))?")
    absent = []
    for document in DOCUMENTS:
        for code in _CODE.findall(_FENCE.sub("", document.read_text(encoding="utf-8"))):
            match = path_like.fullmatch(code)
            if match is None:
                continue
            path = ROOT / match[1]
            if not path.exists() or (match[2] and f"def {match[2]}(" not in path.read_text()):
                absent.append(f"{document.name}: {code}")
    assert absent == []


def test_every_option_says_what_it_is() -> None:
    table = option_table()
    assert table
    assert [name for name, meta in table.items() if len(meta["help"]) < 8] == []


def test_serve_help_tells_every_option() -> None:
    told = re.sub(r"\s+", " ", _help("serve"))
    assert [name for name in option_table() if flag_of(name) not in told] == []


def test_the_example_configuration_is_what_the_options_say() -> None:
    command = [sys.executable, "scripts/example_config.py", "-"]
    written = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=50
    )
    example = (ROOT / "docker" / "kvserver.example.toml").read_text()
    assert example == written.stdout, "run `make config`"


def test_the_example_configuration_changes_nothing(tmp_path: Path) -> None:
    """Each line of the example, uncommented, sets an option to what it is anyway."""
    text = (ROOT / "docker" / "kvserver.example.toml").read_text()
    settings = re.findall(r"^#([a-z]\w* = .*)$", text, re.MULTILINE)
    assert [line.partition(" ")[0] for line in settings] == list(option_table())
    file = tmp_path / "kvserver.toml"
    file.write_text("\n".join(settings))
    assert load(file=file) == load()
