"""The images and the compose file, as far as they can be shown without a container engine.

The server's build steps are taken out of its Dockerfile and run, in the order in which they stand,
in a folder that holds only what the Dockerfile copies; then its entry point is started with the
image's own environment, and its health check asked. That test needs packages and is marked slow.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvserver.cli import build_parser
from kvserver.config import load, option_table
from kvserver.options import parse_bytes
from kvserver.router import settings as proxy_settings
from tests.support.server import free_port

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
OWNER = "10001:10001"
READY_SECONDS_MAX = 60.0


@dataclass
class Stage:
    """One stage of a Dockerfile: where it starts from, and its instructions in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [text for step, text in self.steps if step == word]

    def last(self, word: str) -> str:
        return self.all(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        return _assignments(" ".join(self.all("ENV")))


def _assignments(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in text.split())
    return {name: value for name, _, value in pairs}


def _stages(name: str) -> list[Stage]:
    """The stages of a Dockerfile; comments go, continued lines are joined."""
    lines = [x for x in (DOCKER / name).read_text().splitlines() if not x.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, text = line.partition(" ")
        if word == "FROM":
            base, _, alias = text.partition(" AS ")
            stages.append(Stage(base.strip(), alias.strip()))
        elif stages:
            stages[-1].steps.append((word, text.strip()))
        else:
            assert word == "ARG", line
    return stages


DOCKERFILES = ["Dockerfile.server", "Dockerfile.engine"]


def _copies(stage: Stage) -> list[tuple[list[str], str]]:
    """(sources, target) of each COPY from the build context."""
    found = []
    for text in stage.all("COPY"):
        words = text.split()
        if not any(word.startswith("--from") for word in words):
            paths = [word for word in words if not word.startswith("--")]
            found.append((paths[:-1], paths[-1]))
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_builder(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for stage in _stages(name):
        for sources, _ in _copies(stage):
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in sent, source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_run_steps_are_shell(name: str) -> None:
    for stage in _stages(name):
        for step in stage.all("RUN"):
            subprocess.run(["sh", "-n", "-c", step], check=True, timeout=20)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_bases_are_pinned(name: str) -> None:
    for stage in _stages(name):
        assert ":" in stage.base or stage.base == "${VLLM_IMAGE}", stage.base
        assert not stage.base.endswith(":latest")


def test_the_servers_final_stage_runs_nothing_as_root() -> None:
    build, final = _stages("Dockerfile.server")
    assert build.name == "build"
    assert final.all("RUN") == []
    assert final.last("USER") == OWNER
    assert json.loads(final.last("ENTRYPOINT")) == ["kvserver"]
    assert json.loads(final.last("CMD")) == ["serve"]
    volumes = json.loads(final.last("VOLUME"))
    owned = [text.split()[-1] for text in final.all("COPY") if f"--chown={OWNER}" in text]
    assert sorted(volumes) == sorted(owned)
    assert final.environment["KVSERVER_HOST_DIR"] in volumes


def test_the_images_environment_is_a_valid_configuration() -> None:
    final = _stages("Dockerfile.server")[-1]
    settings = load(environment=final.environment)
    assert settings.listen.startswith("0.0.0.0:")
    ports = {
        a.rpartition(":")[2]
        for a in (settings.listen, settings.metrics_listen, settings.tcp_listen)
    }
    assert set(final.last("EXPOSE").split()) == ports


def test_health_checks_ask_the_service() -> None:
    final = _stages("Dockerfile.server")[-1]
    assert _health(final)[:2] == ["kvserver", "stats"]
    _, cpu, gpu = _stages("Dockerfile.engine")
    for stage in (cpu, gpu):
        assert "8000/health" in _health(stage)[-1]
        assert json.loads(stage.last("ENTRYPOINT")) == ["vllm", "serve"]
        compile(_health(stage)[-1], stage.name, "exec")
    assert cpu.last("USER") == OWNER


def _health(stage: Stage) -> list[str]:
    found: list[str] = json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2])
    return found


# ---- compose ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


KEYS = frozenset(
    {"build", "image", "depends_on", "environment", "command", "volumes", "networks", "ports"}
    | {"stop_grace_period", "shm_size", "healthcheck", "restart", "mem_limit", "read_only"}
    | {"tmpfs", "cap_drop", "security_opt", "profiles"}
)


def _engines(compose: dict[str, Any]) -> dict[str, Any]:
    """The services that only run vLLM."""
    return {n: body for n, body in compose["services"].items() if n not in ("hub", "proxy")}


def test_compose_has_one_hub_two_prefill_and_two_decode_engines(compose: dict[str, Any]) -> None:
    engines = ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert sorted(_engines(compose)) == engines
    assert {*compose["services"]} == {"hub", "proxy", *engines}
    for name, body in compose["services"].items():
        assert set(body) <= KEYS, (name, set(body) - KEYS)
        dockerfile = (DOCKER / body["build"]["context"] / body["build"]["dockerfile"]).resolve()
        assert dockerfile.is_file()
    for body in _engines(compose).values():
        assert body["depends_on"] == {"hub": {"condition": "service_healthy"}}
        target = body["build"]["target"].removeprefix("${ENGINE:-").removesuffix("}")
        assert target in [stage.name for stage in _stages("Dockerfile.engine")]


def test_engines_and_hub_see_the_arena_at_one_path(compose: dict[str, Any]) -> None:
    hub = compose["services"]["hub"]
    mount = f"arena:{hub['environment']['KVSERVER_HOST_DIR']}"
    for name, body in {"hub": hub, **_engines(compose)}.items():
        assert mount in body["volumes"], name
    options = compose["volumes"]["arena"]["driver_opts"]
    assert options["type"] == "tmpfs"
    words = dict(word.split("=") for word in options["o"].split(","))
    assert f"{words['uid']}:{words['gid']}" == OWNER
    room = parse_bytes(words["size"].removesuffix("m") + "MiB")
    wanted = parse_bytes(hub["environment"]["KVSERVER_HOST_BYTES"])
    assert wanted < room < 1.25 * wanted
    assert parse_bytes(hub["mem_limit"].upper()) > room


def test_the_hubs_environment_is_a_valid_configuration(compose: dict[str, Any]) -> None:
    hub = compose["services"]["hub"]
    given = hub["environment"]
    known = {f"KVSERVER_{name.upper()}" for name in option_table()}
    assert set(given) <= known
    image = _stages("Dockerfile.server")[-1].environment
    settings = load(environment={**image, **given})
    assert settings.disk_path in [volume.split(":")[1] for volume in hub["volumes"]]
    grace = int(hub["stop_grace_period"].removesuffix("s"))
    assert grace * 1000 > settings.drain_ms


def test_volumes_and_networks_are_declared(compose: dict[str, Any]) -> None:
    for body in compose["services"].values():
        volumes = body.get("volumes", [])
        named = [v.split(":")[0] for v in volumes if re.match(r"[a-z]+:", v)]
        assert set(named) <= set(compose["volumes"])
        assert set(body["networks"]) <= set(compose["networks"])


def test_only_engines_and_proxy_are_reachable_and_only_from_this_host(
    compose: dict[str, Any],
) -> None:
    assert "ports" not in compose["services"]["hub"]
    proxy = compose["services"]["proxy"]
    ports = [port for body in (*_engines(compose).values(), proxy) for port in body["ports"]]
    assert len({port.split(":")[1] for port in ports}) == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_connector_gets_settings_that_it_knows(compose: dict[str, Any]) -> None:
    from kvserver_vllm.config import Settings

    for body in _engines(compose).values():
        (option,) = [word for word in body["command"] if word.startswith("--kv-transfer-config=")]
        config = json.loads(option.partition("=")[2])
        assert config["kv_connector"] == "KVServerConnector"
        assert config["kv_load_failure_policy"] == "recompute"
        settings = Settings.parse(config["kv_connector_extra_config"])
        host, _, port = settings.address.rpartition(":")
        assert host in compose["services"]
        assert port == _stages("Dockerfile.server")[-1].last("EXPOSE").split()[0]


def test_the_proxy_knows_all_engines_and_is_started_only_when_asked_for(
    compose: dict[str, Any],
) -> None:
    proxy = compose["services"]["proxy"]
    assert proxy["profiles"] == ["proxy"]
    command, *words = proxy["command"]
    parsed = build_parser().parse_args([command, *words])
    settings = proxy_settings.load(
        {"listen": parsed.listen, "prefill": parsed.prefill, "decode": parsed.decode}
    )
    urls = (*settings.prefill, *settings.decode)
    assert sorted(urls) == sorted(f"http://{name}:8000" for name in _engines(compose))
    port = settings.listen.rpartition(":")[2]
    assert proxy["ports"] == [f"127.0.0.1:8000:{port}"]
    probe = proxy["healthcheck"]["test"][-1]
    assert f":{port}/healthz" in probe
    compile(probe, "healthcheck", "exec")
    grace = int(proxy["stop_grace_period"].removesuffix("s"))
    assert grace * 1000 > settings.drain_ms


# ---- the server's image, built step by step ------------------------------------------------------


def _build(stage: Stage, root: Path, arguments: dict[str, str]) -> dict[str, str]:
    """Carry out a stage under `root` instead of /. Gives the paths that moved."""
    moved = {place: str(root) + place for place in ("/opt/kvserver", "/src", "/owned")}
    work = Path(moved[stage.last("WORKDIR")])
    work.mkdir(parents=True)
    (root / "opt").mkdir()
    (root / "bin").mkdir()
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    (root / "bin" / "python").symlink_to(base)
    environment = {"PATH": f"{root}/bin:/usr/bin:/bin", "HOME": str(root)}
    for word, text in stage.steps:
        if word == "COPY":
            words = text.split()
            for source in words[:-1]:
                target = work / words[-1]
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, target, ignore=ignore)
                else:
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, target)
        elif word == "ENV":
            environment |= _assignments(_move(text, moved))
        elif word == "ARG":
            name, _, default = text.partition("=")
            environment[name] = arguments.get(name, default)
        elif word == "RUN":
            subprocess.run(
                ["sh", "-ec", _move(text, moved)],
                cwd=work,
                env={**_pip_environment(), **environment},
                check=True,
                timeout=500,
            )
    return moved


def _move(text: str, moved: dict[str, str]) -> str:
    for place, there in moved.items():
        text = re.sub(rf"(?<![\w/]){re.escape(place)}(?![\w])", there, text)
    return text


def _pip_environment() -> dict[str, str]:
    """Where this machine's pip finds packages, if its environment says so."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _asked_for() -> dict[str, str]:
    """The build arguments that the Dockerfile's head shows."""
    head = (DOCKER / "Dockerfile.server").read_text().partition("FROM")[0]
    return dict(re.findall(r"--build-arg (\w+)=(\S+)", head))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arguments", "modules"),
    [({}, ""), (_asked_for(), "import cupy, nixl_cu12._bindings")],
    ids=["as it is", "with RDMA and a GPU"],
)
def test_the_servers_image_builds_serves_and_is_healthy(
    tmp_path: Path, arguments: dict[str, str], modules: str
) -> None:
    build, final = _stages("Dockerfile.server")
    root = tmp_path / "image"
    root.mkdir()
    moved = _build(build, root, arguments)
    python = root / "opt/kvserver/bin/python"
    subprocess.run([python, "-c", modules], check=True, timeout=100)
    host_dir = tmp_path / "host"
    host_dir.mkdir()
    listen = f"127.0.0.1:{free_port()}"
    environment = {
        **{name: _move(value, moved) for name, value in final.environment.items()},
        "HOME": str(tmp_path),
        "KVSERVER_LISTEN": listen,
        "KVSERVER_METRICS_LISTEN": "127.0.0.1:0",
        "KVSERVER_TCP_LISTEN": "127.0.0.1:0",
        "KVSERVER_HOST_DIR": str(host_dir),
        "KVSERVER_HOST_BYTES": "32MiB",
        "KVSERVER_NIXL_ENABLED": str("NIXL" in arguments).lower(),
    }
    command = [*json.loads(final.last("ENTRYPOINT")), *json.loads(final.last("CMD"))]
    program = shutil.which(command[0], path=environment["PATH"])
    assert program is not None
    assert program.startswith(str(root)), "the image's own, not this environment's"
    with subprocess.Popen([program, *command[1:]], env=environment, cwd=tmp_path) as server:
        try:
            health = [program if w == "kvserver" else w for w in _health(final)]
            health[health.index("--address") + 1] = listen
            deadline = time.monotonic() + READY_SECONDS_MAX
            while subprocess.run(
                health, env=environment, capture_output=True, check=False, timeout=20
            ).returncode:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server never became healthy"
                time.sleep(0.2)
        finally:
            server.terminate()
        assert server.wait(timeout=30) == 0
