"""Which transport `auto` takes, and what it says when none will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvclient import Tls, Unavailable, Unsupported
from kvclient.options import Options
from kvclient.timing import Deadline
from kvclient.transfer import choose
from kvproto import nixlib
from kvproto.rdma import rdma_devices
from kvproto.v1 import kvserver_pb2 as pb

OFFERS = {
    "shm": pb.TransportOffer(name="shm", address="/run/shm.sock"),
    "nixl": pb.TransportOffer(name="nixl", options={"backend": "UCX", "rdma": "mlx5_0"}),
    "tcp": pb.TransportOffer(name="tcp", address="hub:50053"),
}


class Opened:
    """A transfer that only says by which name it was opened."""

    epoch, arena_id = 3, bytes(16)

    def __init__(self, transport: str) -> None:
        self.transport = transport


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which they were opened; those in `fail` fail."""
    names: list[str] = []

    async def opening(name: str, *rest: Any) -> Opened:
        names.append(name)
        if name == "shm" and rest[0].name == "remote":
            raise Unsupported("no such socket")
        if rest[0].name == "cut off":
            raise Unavailable("nobody answers")
        return Opened(name)

    monkeypatch.setattr(choose, "_open", opening)
    return names


@pytest.mark.parametrize(("staging_s", "left_s"), [(0.0, 1.0), (30.0, 30.0)])
async def test_nixl_may_take_longer_to_open_than_a_call(
    staging_s: float, left_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's calls end within seconds. An agent and its memory that took longer were thrown
    away and begun anew, for ever."""
    given: list[float] = []

    async def opening(hello: Any, *, deadline: Deadline, **rest: Any) -> Opened:
        given.append(deadline.left())
        return Opened("nixl")

    monkeypatch.setattr(choose.nixl, "open_nixl", opening)
    hello = pb.HelloReply(epoch=3, arena_id=bytes(16), transports=[OFFERS["nixl"]])
    options = Options("hub:50051", transport="nixl", staging_s=staging_s).check()
    await choose.open_transfer(options, hello, Deadline(1), None)
    assert left_s - 0.5 < given[0] <= left_s


async def choose_of(*names: str, here: str = "", transport: str = "auto") -> str:
    hello = pb.HelloReply(epoch=3, arena_id=bytes(16), transports=[OFFERS[name] for name in names])
    options = Options("hub:50051", name=here, transport=transport)
    return (await choose.open_transfer(options, hello, Deadline(1), None)).transport


@pytest.mark.parametrize(
    ("here", "rdma", "taken"),
    [("", True, "shm"), ("remote", True, "nixl"), ("remote", False, "tcp")],
)
async def test_auto(
    monkeypatch: pytest.MonkeyPatch, tried: list[str], here: str, rdma: bool, taken: str
) -> None:
    monkeypatch.setattr(choose, "rdma_devices", lambda: ["mlx5_1"] if rdma else [])
    monkeypatch.setattr(nixlib, "available", lambda: True)
    assert await choose_of("tcp", "nixl", "shm", here=here) == taken


async def test_rdma_on_one_side_only_is_none(
    monkeypatch: pytest.MonkeyPatch, tried: list[str]
) -> None:
    monkeypatch.setattr(choose, "rdma_devices", lambda: ["mlx5_1"])
    monkeypatch.setattr(nixlib, "available", lambda: True)
    monkeypatch.setitem(
        OFFERS, "nixl", pb.TransportOffer(name="nixl", options={"backend": "UCX", "rdma": ""})
    )
    assert await choose_of("tcp", "nixl", "shm", here="remote") == "tcp"


async def test_what_is_named_is_taken_or_nothing(tried: list[str]) -> None:
    assert await choose_of("shm", "tcp", transport="tcp") == "tcp"
    with pytest.raises(Unsupported, match="offers shm; this client wants tcp"):
        await choose_of("shm", transport="tcp")
    with pytest.raises(Unsupported, match="shm: no such socket"):
        await choose_of("shm", "tcp", here="remote", transport="shm")
    assert tried == ["tcp", "shm"]


async def test_every_failure_is_told(monkeypatch: pytest.MonkeyPatch, tried: list[str]) -> None:
    with pytest.raises(Unavailable, match=r"shm: nobody.*hub's host; tcp: nobody") as caught:
        await choose_of("shm", "tcp", here="cut off")
    assert "hub:50051 offers shm, tcp" in str(caught.value)


@pytest.mark.parametrize(("offered", "ours"), [(True, False), (False, True)])
async def test_tls_on_one_side_only_is_refused(tmp_path: Path, offered: bool, ours: bool) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-")
    offer = pb.TransportOffer(name="tcp", address="h:1", options={"tls": "1"} if offered else {})
    options = Options("h:0", transport="tcp", tls=Tls(ca=str(ca)) if ours else None)
    hello = pb.HelloReply(transports=[offer])
    with pytest.raises(Unsupported, match="TLS"):
        await choose.open_transfer(options, hello, Deadline(1), None)


def test_devices_are_those_of_the_kernel(tmp_path: Path) -> None:
    assert rdma_devices(tmp_path / "none") == []
    for name in ("mlx5_1", "efa_0"):
        (tmp_path / name).mkdir()
    assert rdma_devices(tmp_path) == ["efa_0", "mlx5_1"]
