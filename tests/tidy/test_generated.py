"""The gRPC stubs are committed; they are exactly what the .proto file says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tidy.tree import ROOT

SOURCE = "kvproto/v1/kvserver.proto"
STUBS = ("kvserver_pb2.py", "kvserver_pb2.pyi", "kvserver_pb2_grpc.py")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    out = tmp_path_factory.mktemp("stubs")
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *options, f"proto/{SOURCE}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=50)
    return out / Path(SOURCE).parent


@pytest.mark.parametrize("name", STUBS)
def test_stubs_are_what_the_source_says(generated: Path, name: str) -> None:
    committed = ROOT / "proto" / Path(SOURCE).parent / name
    assert committed.read_bytes() == (generated / name).read_bytes(), "run `make proto`"


def test_stubs_accept_every_runtime_that_pyproject_allows() -> None:
    """A stub refuses, on import, a runtime older than the generator it came from."""
    folder = ROOT / "proto" / "kvproto" / "v1"
    text = (ROOT / "pyproject.toml").read_text()
    messages = (folder / "kvserver_pb2.py").read_text()
    services = (folder / "kvserver_pb2_grpc.py").read_text()
    needs = {
        "protobuf": re.search(r"# Protobuf Python Version: ([\d.]+)", messages),
        "grpcio": re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", services),
    }
    for name, need in needs.items():
        floor = re.search(rf'^  "{name}>=([\d.]+)', text, re.MULTILINE)
        assert need is not None, name
        assert floor is not None, name
        assert _numbers(floor[1]) >= _numbers(need[1]), name


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch; what is not told is 0."""
    return tuple(int(part) for part in (version + ".0.0").split(".")[:3])
