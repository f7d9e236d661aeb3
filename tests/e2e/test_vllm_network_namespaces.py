"""Prefill engine, hub and decode engine on three hosts: network namespaces with own addresses.

Nothing of the network is shared, loopback included: what P computed reaches D over the hub's
address or not at all, and the interfaces have counted it. Over nixl, UCX is told by its
environment to use tcp on the hosts' interface; left alone it would see one machine and copy from
process to process (CMA).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import netns
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    page_complaints,
    transports_of,
    wait_connected,
    wait_for,
    wait_pushed,
)
from tests.support.netns import Network
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import TINY, prompt, write_model
from tests.support.ways import WAYS, Way

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

BLOCK, TOKENS = 128, 12
PROMPTS = [prompt(61, 700), prompt(62, 520)]
BLOCKS = sum(len(tokens) // BLOCK for tokens in PROMPTS)
BYTES = BLOCKS * BLOCK * TINY.kv_bytes_per_token
UCX = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": netns.DEVICE}


@dataclass
class World:
    way: Way
    network: Network
    server: ServerProcess
    prefill: Engine
    decode: Engine
    path: Path

    def log(self, host: str) -> Path:
        return self.path / f"{host}.jsonl"

    def stats(self) -> dict[str, Any]:
        """As `kvserver stats` on the hub's host prints them."""
        command = [sys.executable, "-m", "kvserver", "stats", "--json"]
        told = subprocess.run(
            [*self.network.runner("hub"), *command, "--address", self.server.address],
            capture_output=True,
            check=True,
            timeout=30,
        )
        stats: dict[str, Any] = json.loads(told.stdout)
        return stats


@pytest.fixture(scope="module", params=["tcp", "nixl"])
def way(request: pytest.FixtureRequest) -> Way:
    way = WAYS[request.param]
    if way.missing:
        pytest.skip(way.missing)
    return way


@pytest.fixture(scope="module")
def network(way: Way) -> Iterator[Network]:
    if reason := netns.missing():
        pytest.skip(reason)
    with Network("hub", "p", "d") as network:
        yield network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture(scope="module")
def baseline(model: Path) -> list[Generated]:
    """The answers of an engine that never heard of a hub."""
    with Engine.start(model) as engine:
        return [engine.generate(tokens, tokens=TOKENS) for tokens in PROMPTS]


@pytest.fixture(scope="module")
def world(
    way: Way,
    network: Network,
    model: Path,
    baseline: list[Generated],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    path = tmp_path_factory.mktemp("world")
    own = network.address("hub")
    options: dict[str, object] = {"listen": f"{own}:20051", "metrics_listen": ""}
    if way.transport == "tcp":
        options["tcp_listen"] = f"{own}:20053"
    else:
        options["nixl_enabled"] = "true"
    variables = UCX if way.transport == "nixl" else {}
    engines: list[Engine] = []
    with start_server(
        path,
        runner=network.runner("hub", **variables),
        host_bytes="64MiB",
        shm_tenants="nobody",
        **options,
    ) as server:
        try:
            for host, role in (("p", "kv_producer"), ("d", "kv_consumer")):
                config = hub_config(
                    server.address,
                    role=role,
                    event_log=path / f"{host}.jsonl",
                    transport=way.transport,
                    **PATIENT,
                )
                runner = network.runner(host, **variables)
                engines.append(Engine.launch(model, config=config, runner=runner))
            for engine in engines:
                engine.wait_ready()
                engine.generate(prompt(98, 40), tokens=2)
            world = World(way, network, server, *engines, path)
            wait_connected(world.log("p"))
            wait_connected(world.log("d"))
            yield world
        finally:
            for engine in engines:
                engine.close()


def test_what_one_host_prefilled_another_decodes(world: World, baseline: list[Generated]) -> None:
    for tokens in PROMPTS:
        world.prefill.generate(tokens, tokens=1)
    wait_pushed(world.log("p"), BLOCKS)
    for tokens, want in zip(PROMPTS, baseline, strict=True):
        got = world.decode.generate(tokens, tokens=TOKENS)
        assert answer_complaints(got, want) == []
        assert got.cached >= len(tokens) // BLOCK * BLOCK - 1
    pushed = cells(read_events(world.log("p")), "pushed")
    pulled = cells(read_events(world.log("d")), "pulled")
    assert len(pushed) == len(pulled) == BLOCKS * TINY.kv_heads
    assert page_complaints(pushed, pulled) == []


def test_the_bytes_crossed_the_network(world: World) -> None:
    """After the test above: hub, engines and interfaces have counted them."""
    chosen = world.way.transport

    def done() -> bool:
        counters = world.stats()["counters"]
        return all(int(counters[f"{chosen}_bytes_{way}"]) >= BYTES for way in ("in", "out"))

    wait_for(f"{BYTES} bytes each way over {chosen}", done, 15.0)
    assert [s["transports"] for s in world.stats()["sessions"]] == [[chosen], [chosen]]
    for host in ("p", "d"):
        assert transports_of(world.log(host)) == {chosen}
    sent, _ = world.network.moved("p")
    _, received = world.network.moved("d")
    assert min(sent, received) >= BYTES


def test_nothing_is_left_of_a_network_that_failed() -> None:
    if reason := netns.missing():
        pytest.skip(reason)
    network = Network("left")
    with contextlib.suppress(ZeroDivisionError), network:
        sleeper = subprocess.Popen([*network.runner("left"), "sleep", "60"])
        assert network.exists
        raise ZeroDivisionError
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not network.exists
