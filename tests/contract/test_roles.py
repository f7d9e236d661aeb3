"""An operator changes what an engine does, through a live hub."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import pytest

from kvclient import (
    AsyncClient,
    Client,
    Conflict,
    InvalidArgument,
    NotFound,
    Role,
    Unavailable,
)
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.cli import EXIT_BAD, EXIT_USAGE, main
from tests.support.server import ServerProcess, start_server

BOTH = Role(produces=True, consumes=True)
CONSUMER = Role(produces=False, consumes=True)
Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all tests that leave it as it was."""
    with start_server(tmp_path_factory.mktemp("hub")) as server:
        yield server


class Engine:
    """A session that takes orders, as the adapter's scheduler half does."""

    def __init__(self, client: AsyncClient, ceiling: Role) -> None:
        self.client = client
        self.heard: list[Role] = []
        self.orders = client.follow(ceiling, self.heard.append)


async def roles(operator: AsyncClient) -> dict[str, tuple[pb.Role, pb.Role]]:
    sessions = (await operator.stats()).sessions
    return {s.client_name: (s.role, s.ceiling) for s in sessions if s.HasField("role")}


async def until_known(operator: AsyncClient, *names: str) -> None:
    for _ in range(500):
        if set(names) <= set(await roles(operator)):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{names} take no orders")


@pytest.fixture
async def operator(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient.connect(server.address, name="operator", deadline_s=5) as client:
        yield client


async def test_threads_can_give_orders_too(server: ServerProcess, operator: AsyncClient) -> None:
    async with AsyncClient.connect(server.address, name="vllm-t") as client:
        engine = Engine(client, BOTH)
        await until_known(operator, "vllm-t")

        def give() -> Role:
            with Client.connect(server.address, name="a thread") as blocking:
                return blocking.set_role("vllm-t", produces=False, deadline_s=5)

        assert await asyncio.to_thread(give) == CONSUMER
        assert engine.heard == [CONSUMER]


async def test_an_engine_obeys_within_a_second_and_stats_say_so(
    server: ServerProcess, operator: AsyncClient
) -> None:
    async with AsyncClient.connect(server.address, name="vllm-a") as client:
        engine = Engine(client, BOTH)
        await until_known(operator, "vllm-a")
        taken = []
        for _ in range(5):
            for produces in (True, False):
                started = time.monotonic()
                told = await operator.set_role("vllm-a", produces=produces)
                taken.append(time.monotonic() - started)
                assert told == (BOTH if produces else CONSUMER)
        assert sorted(taken)[5] < 1, "a pause of the machine is none of theirs"
        assert engine.heard[-1] == CONSUMER
        del engine.heard[:]
        role, ceiling = (await roles(operator))["vllm-a"]
        assert (role.produces, role.consumes) == (False, True)
        assert (ceiling.produces, ceiling.consumes) == (True, True)
        neither = Role(produces=False, consumes=False)
        assert await operator.set_role("vllm-", consumes=False) == neither
        assert await operator.set_role("vllm-a", consumes=False) == neither, "no order is needed"
        assert await operator.set_role("vllm-a", produces=True, consumes=True) == BOTH
        assert engine.heard == [neither, BOTH]


async def test_the_ceiling_is_told(server: ServerProcess, operator: AsyncClient) -> None:
    async with AsyncClient.connect(server.address, name="decoder") as client:
        engine = Engine(client, CONSUMER)
        await until_known(operator, "decoder")
        with pytest.raises(Conflict, match=r"started to consume .*cannot be told to produce") as no:
            await operator.set_role("decoder", produces=True)
        assert (no.value.field, no.value.limit) == ("role", "consume")
        with pytest.raises(Conflict, match="only one started as kv_both"):
            await operator.set_role("decoder", consumes=False)
        assert await operator.set_role("decoder", consumes=True) == CONSUMER
        assert engine.heard == []


async def test_names_must_mean_one_engine(server: ServerProcess, operator: AsyncClient) -> None:
    async with (
        AsyncClient.connect(server.address, name="vllm-1") as one,
        AsyncClient.connect(server.address, name="vllm-12") as two,
    ):
        engines = [Engine(client, BOTH) for client in (one, two)]
        await until_known(operator, "vllm-1", "vllm-12")
        for name in ("vllm-", "operator", ""):
            with pytest.raises(NotFound, match="must name one engine") as refused:
                await operator.set_role(name, produces=False)
            assert refused.value.field == "engine"
            assert "vllm-12" in refused.value.limit
        await operator.set_role("vllm-1", produces=False)
        assert [len(engine.heard) for engine in engines] == [1, 0]
        with pytest.raises(InvalidArgument, match="engine"):
            await operator.set_role("x" * 200, produces=False)


async def test_a_role_outlives_the_hub(serve: Serve) -> None:
    server = serve()
    async with (
        AsyncClient.connect(server.address, name="vllm-a", deadline_s=3) as client,
        AsyncClient.connect(server.address, name="operator", deadline_s=3) as operator,
    ):
        engine = Engine(client, BOTH)
        await until_known(operator, "vllm-a")
        await operator.set_role("vllm-a", produces=False)
        server.kill()
        server.restart()
        for _ in range(200):
            if operator.healthy and client.healthy:
                break
            await asyncio.sleep(0.05)
        await until_known(operator, "vllm-a")
        role, _ = (await roles(operator))["vllm-a"]
        assert (role.produces, role.consumes) == (False, True)
        assert await operator.set_role("vllm-a", produces=True) == BOTH
        assert engine.heard == [CONSUMER, BOTH]


async def test_an_engine_that_does_not_obey_is_told_of_and_hears_the_last_order_later(
    server: ServerProcess, operator: AsyncClient
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        cache = kvserver_pb2_grpc.CacheStub(channel)
        hello = await cache.Hello(pb.HelloRequest(protocol_version=1, client_name="stuck"))
        both = pb.Role(produces=True, consumes=True)
        request = pb.OrdersRequest(session=hello.session, role=both, ceiling=both)
        stream = cache.Orders(request)
        await until_known(operator, "stuck")
        for switch in ({"produces": False}, {"consumes": False}):
            with pytest.raises(Unavailable, match=r"not obeyed within 1\.8 s; the order stands"):
                await operator.set_role("stuck", deadline_s=2.0, **switch)
        orders = [await stream.read()]
        if orders[-1].order == 1:  # it had left the hub before the second one came
            orders.append(await stream.read())
        assert (orders[-1].order, orders[-1].role) == (2, pb.Role())
        await cache.Obey(pb.ObeyRequest(session=hello.session, order=2))
        role, _ = (await roles(operator))["stuck"]
        assert role == pb.Role()
        admin = kvserver_pb2_grpc.AdminStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="obey_ms_max = 60000"):
            await admin.SetRole(pb.SetRoleRequest(engine="stuck", deadline_ms=60_001))
        waiting = asyncio.create_task(operator.set_role("stuck", produces=True))
        await stream.read()
        goodbye = pb.GoodbyeRequest(session=hello.session, client=hello.client, drained=True)
        await cache.Goodbye(goodbye)
        with pytest.raises(Unavailable, match="session has ended"):
            await waiting
        assert await stream.read() is grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError, match="session"):
            await cache.Obey(pb.ObeyRequest(session=hello.session, order=3))


async def test_the_command(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    async with AsyncClient.connect(server.address, name="vllm-a") as client:
        engine = Engine(client, BOTH)
        await until_known(client, "vllm-a")

        async def run(*arguments: str) -> tuple[int, str, str]:
            command = [*arguments, "--address", server.address]
            status = await asyncio.to_thread(main, command)
            return (status, *capsys.readouterr())

        said = "vllm-a: kv_consumer (of kv_both)\n"
        assert await run("role", "vllm", "--produce", "off") == (0, said, "")
        status, out, _ = await run("role", "vllm-a", "--consume", "off", "--json")
        assert (status, json.loads(out)["role"]) == (0, {"produces": False, "consumes": False})
        assert "neither" in (await run("stats"))[1]
        status, _, error = await run("role", "nobody", "--consume", "off")
        assert (status, "NOT_FOUND" in error) == (EXIT_BAD, True)
        assert (await run("role", "vllm-a"))[0] == EXIT_USAGE
        assert len(engine.heard) == 2
