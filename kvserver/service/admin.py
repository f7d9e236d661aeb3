"""The operator's handlers.

Rule 1: what deletes names one namespace by its full id; there is no call that deletes everything.
"""

from __future__ import annotations

from typing import Any

from kvproto.namespace import NAMESPACE_ID_BYTES
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.core import events, instructions
from kvserver.runtime.node import Node
from kvserver.service import convert
from kvserver.service.calls import Servicer, unary
from kvserver.service.stats import namespace_stats, stats_reply

OBEY_MS = 5_000  # how long an engine has to obey, when a call does not say
OBEY_MS_MAX = 60_000


class AdminService(Servicer, kvserver_pb2_grpc.AdminServicer):
    """`keys_max` and `drain_ms_max` are limits of a call."""

    def __init__(self, node: Node, *, keys_max: int, drain_ms_max: int, **base: Any) -> None:
        super().__init__(**base)
        self._node = node
        self._driver = node.driver
        self._keys_max = keys_max
        self._drain_ms_max = drain_ms_max

    @unary
    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        return stats_reply(self._node, self.incidents.count)

    @unary
    async def ListNamespaces(
        self, request: pb.ListNamespacesRequest, context: Any
    ) -> pb.ListNamespacesReply:
        return pb.ListNamespacesReply(namespaces=namespace_stats(self._node))

    @unary
    async def Evict(self, request: pb.EvictRequest, context: Any) -> pb.EvictReply:
        event = events.Evict(
            self._driver.ticket(),
            _namespace_id(request.namespace_id),
            convert.hashes_from("hashes", request.hashes, count_max=self._keys_max),
        )
        evicted = await self._driver.ask(event, instructions.Evicted)
        return pb.EvictReply(blocks=evicted.blocks, bytes=evicted.bytes, in_use=evicted.in_use)

    @unary
    async def DropNamespace(
        self, request: pb.DropNamespaceRequest, context: Any
    ) -> pb.DropNamespaceReply:
        evicted = await self._node.drop_namespace(_namespace_id(request.namespace_id))
        return pb.DropNamespaceReply(blocks=evicted.blocks, bytes=evicted.bytes)

    @unary
    async def SetRole(self, request: pb.SetRoleRequest, context: Any) -> pb.SetRoleReply:
        name = convert.text_from("engine", request.engine)
        session = self._node.sessions.engine(name)
        assert session.follower is not None, "engine() finds those that take orders"
        seconds = convert.seconds_from(
            "obey_ms_max", request.deadline_ms, maximum_ms=OBEY_MS_MAX, zero=OBEY_MS
        )
        role = await session.follower.order(
            produces=request.produces if request.HasField("produces") else None,
            consumes=request.consumes if request.HasField("consumes") else None,
            deadline_s=seconds,
        )
        return pb.SetRoleReply(
            engine=session.name,
            role=convert.role_to(role),
            ceiling=convert.role_to(session.follower.ceiling),
        )

    @unary
    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:
        seconds = convert.seconds_from(
            "drain_ms_max", request.deadline_ms, maximum_ms=self._drain_ms_max
        )
        return pb.DrainReply(drained=await self._node.drain(seconds))


def _namespace_id(raw: bytes) -> bytes:
    return convert.id_from("namespace_id", raw, length=NAMESPACE_ID_BYTES)
