"""The project's own files, as the tidy tests see them: paths, module names, syntax trees, imports.

Files are found by walking known folders, so that a copy without version control reads the same.
Generated stubs are not ours to judge and are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "kvproto": ROOT / "proto" / "kvproto",
    "kvclient": ROOT / "client" / "kvclient",
    "kvserver_vllm": ROOT / "vllm_adapter" / "kvserver_vllm",
    "kvserver": ROOT / "kvserver",
}
HELPERS = {name: ROOT / name for name in ("bench", "scripts", "tests")}
_TEXT_FOLDERS = (".ci", "client", "constraints", "docker", "docs", "kvserver", "proto", "scripts")
_TEXT_SUFFIXES = frozenset({".md", ".toml", ".txt", ".yaml", ".yml", ".proto", ".cfg", ".sh", ""})


@dataclass(frozen=True)
class Module:
    """One source file of ours. `name` is its import name."""

    name: str
    path: Path

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def tree(self) -> ast.Module:
        return _parse(self.path)


@dataclass(frozen=True)
class Import:
    """One imported module. `names` are what a from-import takes from it."""

    module: str
    names: tuple[str, ...]
    line: int


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def _modules(package: str, folder: Path) -> Iterator[Module]:
    for path in sorted(folder.rglob("*.py")):
        if _is_generated(path) or "__pycache__" in path.parts:
            continue
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        yield Module(".".join(p for p in parts if p != "__init__"), path)


@cache
def product() -> tuple[Module, ...]:
    """The modules of the distribution."""
    return tuple(m for name, folder in PACKAGES.items() for m in _modules(name, folder))


@cache
def sources() -> tuple[Module, ...]:
    """All Python that people write here: the distribution, its tests, benchmarks, scripts."""
    helpers = (m for name, folder in HELPERS.items() for m in _modules(name, folder))
    return (*product(), *helpers)


@cache
def texts() -> tuple[Path, ...]:
    """Everything that people write here and that is text."""
    found = {m.path for m in sources()}
    found |= {p for p in ROOT.iterdir() if p.is_file() and p.suffix in _TEXT_SUFFIXES}
    found.discard(ROOT / ".git")  # a file where this is one of several work trees
    for folder in (*_TEXT_FOLDERS, "bench", "tests", "vllm_adapter"):
        for path in (ROOT / folder).rglob("*"):
            wanted = path.suffix in _TEXT_SUFFIXES or path.suffix == ".json"
            if path.is_file() and wanted and "__pycache__" not in path.parts:
                found.add(path)
    return tuple(sorted(found))


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, wherever it stands, with relative ones resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(_absolute(module, node), names, node.lineno)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package = package[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def targets(found: Import) -> Iterator[str]:
    """What an import may reach: `from a import b` reaches `a.b` when that is a module of ours."""
    known = {m.name for m in product()}
    submodules = [f"{found.module}.{n}" for n in found.names if f"{found.module}.{n}" in known]
    yield from submodules
    if len(submodules) < len(found.names) or not found.names:
        yield found.module
