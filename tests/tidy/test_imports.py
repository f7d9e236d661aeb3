"""Imports run one way. The table below is the architecture; a new arrow is a change of design."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.tidy.tree import Import, Module, imports, product, targets

OURS = frozenset({"kvproto", "kvclient", "kvserver", "kvserver_vllm"})

# Layer -> what of ours it may import beside itself. The longest matching layer of a module counts.
LAYERS: dict[str, frozenset[str]] = {
    "kvproto": frozenset(),
    "kvclient": frozenset({"kvproto"}),
    "kvserver_vllm": frozenset({"kvclient", "kvproto"}),
    "kvserver.core": frozenset({"kvproto"}),
    "kvserver.tiers": frozenset({"kvproto"}),
    "kvserver.journal": frozenset({"kvproto"}),
    "kvserver.observe": frozenset(),
    "kvserver.transfer": frozenset({"kvserver.tiers", "kvproto"}),
    "kvserver.runtime": frozenset(
        {"kvserver.core", "kvserver.tiers", "kvserver.journal", "kvserver.transfer", "kvproto"}
    ),
    "kvserver.service": frozenset({"kvserver.runtime", "kvserver.core", "kvproto"}),
    "kvserver.options": frozenset({"kvproto"}),
    "kvserver.config": frozenset({"kvserver.options", "kvproto"}),
    "kvserver.router": frozenset({"kvserver.observe", "kvserver.options"}),
    # The command line, the wiring and the package itself stand on top of everything.
    "kvserver": frozenset({"kvserver", "kvproto"}),
}

# Packages of others: the layers that may use them, at any depth, and nobody else.
THIRD_PARTY: dict[str, frozenset[str]] = {
    "numpy": frozenset({"kvproto", "kvclient", "kvserver_vllm", "kvserver"}),
    "xxhash": frozenset({"kvproto", "kvclient", "kvserver_vllm", "kvserver.tiers"}),
    "grpc": frozenset({"kvclient", "kvserver.service", "kvserver.server", "kvserver.cli"}),
    "google": frozenset({"kvclient", "kvserver.service", "kvserver.cli", "kvserver.tables"}),
    "grpc_health": frozenset({"kvclient", "kvserver.service", "kvserver.server", "kvserver.cli"}),
    "grpc_reflection": frozenset({"kvserver.service", "kvserver.server"}),
    "prometheus_client": frozenset({"kvserver.observe", "kvserver_vllm.figures"}),
    "rocksdict": frozenset({"kvserver.journal"}),
    "cupy": frozenset({"kvserver.tiers"}),
    "aiohttp": frozenset({"kvserver.router"}),
    "multidict": frozenset({"kvserver.router"}),
    "yarl": frozenset({"kvserver.router"}),
    "huggingface_hub": frozenset({"kvserver_vllm"}),
    "torch": frozenset({"kvserver_vllm"}),
    "vllm": frozenset({"kvserver_vllm"}),
}

# The core decides; it neither waits, nor draws lots, nor looks at a clock, a file or a socket.
IMPURE = frozenset(
    {"asyncio", "concurrent", "ctypes", "fcntl", "io", "logging", "mmap", "multiprocessing", "os"}
    | {"pathlib", "queue", "random", "sched", "secrets", "select", "selectors", "shutil", "signal"}
    | {"socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "uuid"}
)


def _within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


def _layer(module: str) -> str:
    return max((layer for layer in LAYERS if _within(module, layer)), key=len)


def _ours(module: Module) -> Iterator[tuple[Import, str]]:
    for found in imports(module):
        for target in targets(found):
            if target.split(".")[0] in OURS:
                yield found, target


def _wrong_way(modules: Iterable[Module]) -> list[str]:
    wrong = []
    for module in modules:
        layer = _layer(module.name)
        allowed = LAYERS[layer] | {layer}
        for found, target in _ours(module):
            if target == "kvserver" and _within(layer, "kvserver"):
                continue  # the package itself holds its version, and nothing else
            if not any(_within(target, other) for other in allowed):
                wrong.append(f"{module.where}:{found.line} {layer} -> {target}")
    return wrong


def test_imports_run_one_way() -> None:
    assert _wrong_way(product()) == []


def test_the_package_itself_imports_nothing() -> None:
    (package,) = (module for module in product() if module.name == "kvserver")
    assert list(imports(package)) == []


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("kvserver.core.hub", "kvserver.runtime.driver"),
        ("kvserver.core.hub", "kvserver.tiers.host"),
        ("kvserver.tiers.host", "kvserver.core.events"),
        ("kvserver.journal.record", "kvserver.tiers.disk"),
        ("kvserver.server", "kvclient.aio"),
        ("kvserver.observe.metrics", "kvproto.grid"),
        ("kvserver.service.cache", "kvserver.transfer.shm"),
        ("kvclient.aio", "kvserver.core.events"),
        ("kvclient.aio", "kvserver_vllm.layout"),
        ("kvproto.grid", "kvclient.errors"),
        ("kvserver_vllm.worker", "kvserver.config"),
        ("kvserver.router.engines", "kvserver.core.hub"),
        ("kvserver.router.engines", "kvserver.server"),
    ],
)
def test_the_table_forbids_the_arrows_it_should(name: str, target: str) -> None:
    layer = _layer(name)
    assert not any(_within(target, other) for other in LAYERS[layer] | {layer})


def test_packages_of_others_stay_where_they_belong() -> None:
    wrong = []
    for module in product():
        for found in imports(module):
            root = found.module.split(".")[0]
            if root in OURS or root in sys.stdlib_module_names or root == "__future__":
                continue
            layers = THIRD_PARTY.get(root)
            if layers is None:
                wrong.append(f"{module.where}:{found.line} {root} is in no list")
            elif not any(_within(module.name, layer) for layer in layers):
                wrong.append(f"{module.where}:{found.line} imports {root}")
    assert wrong == []


def test_the_core_is_pure() -> None:
    wrong = []
    for module in product():
        if not _within(module.name, "kvserver.core"):
            continue
        for found in imports(module):
            root = found.module.split(".")[0]
            pure = root in sys.stdlib_module_names and root not in IMPURE
            pure = pure or root in {"numpy", "kvproto"} or _within(found.module, "kvserver.core")
            if not pure:
                wrong.append(f"{module.where}:{found.line} imports {found.module}")
            if root == "numpy" and ("random" in found.names or ".random" in found.module):
                wrong.append(f"{module.where}:{found.line} imports numpy.random")
        wrong += [
            f"{module.where}:{node.lineno} calls {node.func.id}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"open", "print", "input"}
        ]
        wrong += [
            f"{module.where}:{node.lineno} is asynchronous"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith)
        ]
        wrong += [
            f"{module.where}:{node.lineno} uses numpy.random"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node) in {"np.random", "numpy.random"}
        ]
    assert wrong == []


def test_only_the_runtime_drives_the_hub() -> None:
    """The service knows the core's types; the hub itself has one driver."""
    wrong = [
        f"{module.where}:{found.line}"
        for module in product()
        if not _within(module.name, "kvserver.core")
        and not _within(module.name, "kvserver.runtime")
        for found in imports(module)
        if found.module == "kvserver.core.hub" and "Hub" in found.names
    ]
    assert wrong == []


_WALL = {
    "time": frozenset({"time", "time_ns", "localtime", "gmtime", "ctime"}),
    "datetime": frozenset({"now", "utcnow", "today"}),
}


def _wall_clock_reads(module: Module) -> Iterator[int]:
    """Lines that take the time of day, under whatever name the clock was imported."""
    clocks = {name: name for name in _WALL}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            clocks |= {a.asname: a.name for a in node.names if a.asname and a.name in _WALL}
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (node.lineno for alias in node.names if alias.name in _WALL["time"])
        elif isinstance(node, ast.ImportFrom) and node.module == "datetime":
            clocks |= {a.asname or a.name: "datetime" for a in node.names}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            clock = clocks.get(ast.unparse(node.value).partition(".")[0])
            if clock is not None and node.attr in _WALL[clock]:
                yield node.lineno


def test_nobody_but_observe_reads_the_wall_clock() -> None:
    wrong = [
        f"{module.where}:{line}"
        for module in product()
        if not _within(module.name, "kvserver.observe")
        for line in _wall_clock_reads(module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time as t\nt.time_ns()",
        "from time import time",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.utcnow()",
        "import datetime as d\nd.datetime.now()",
        "from datetime import datetime as d, date\nd.now()",
    ],
)
def test_the_wall_clock_is_found_in_every_spelling(source: str) -> None:
    module = _snippet(source)
    assert list(_wall_clock_reads(module))


def test_the_monotonic_clock_is_no_wall_clock() -> None:
    module = _snippet("import time\ntime.monotonic()\nx.time()")
    assert list(_wall_clock_reads(module)) == []


class _Snippet(Module):
    """A module that stands in no file."""

    source: ClassVar[dict[str, str]] = {}

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source[self.name])


def _snippet(source: str) -> Module:
    name = f"kvserver.runtime.snippet_{len(_Snippet.source)}"
    _Snippet.source[name] = source
    return _Snippet(name, Path(name))
