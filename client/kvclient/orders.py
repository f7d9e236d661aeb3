"""Orders: an engine hears from its hub that it is to stop or start producing or consuming.

Rules:
 1. The role is the engine's own: a hub that is gone changes nothing; one that comes is told.
 2. `obey` is called on the client's loop and takes effect at once; then the hub is told.
 3. The stream stays open without a deadline: it ends with its session, and is opened again under
    the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvclient.errors import KVError, Unavailable, Unsupported
from kvclient.results import Role
from kvclient.session import Link, Message, Session
from kvclient.timing import Backoff, Deadline
from kvproto.v1 import kvserver_pb2 as pb


class Orders:
    """What an engine does now; `run` keeps it as the hub says."""

    def __init__(self, session: Session, ceiling: Role, obey: Callable[[Role], None]) -> None:
        """`ceiling` is what the engine was started for, and does at first."""
        self._session = session
        self._ceiling = ceiling
        self._obey = obey
        self._backoff = Backoff()
        self.now = ceiling

    async def run(self) -> None:
        """Follow until the client is closed, or for good where the hub gives no orders."""
        while not self._session.closed:
            try:
                await self._follow()
            except Unsupported:
                return
            except KVError:
                await asyncio.sleep(self._backoff.next())

    async def _follow(self) -> None:
        link = await self._session.ready(self._deadline())
        request = pb.OrdersRequest(
            session=link.session, role=role_message(self.now), ceiling=role_message(self._ceiling)
        )
        stream = self._session.stream(link, "Orders", request)
        try:
            while (order := await stream.read()) is not None:
                self._backoff.reset()
                await self._do(link, order)
        except KVError as error:
            raise self._session.stream_failed(link, error) from None
        finally:
            stream.cancel()
        raise Unavailable("the hub ended the stream of orders")

    async def _do(self, link: Link, order: pb.OrdersReply) -> None:
        role = role_from(order.role)
        self._obey(role)
        self.now = role

        async def make(at: Link) -> Message:
            return pb.ObeyRequest(session=at.session, order=order.order, role=order.role)

        await self._session.call("Obey", make, self._deadline(), link=link)

    def _deadline(self) -> Deadline:
        return Deadline(self._session.options.deadline_s)


def role_message(role: Role) -> pb.Role:
    return pb.Role(produces=role.produces, consumes=role.consumes)


def role_from(message: pb.Role) -> Role:
    return Role(produces=message.produces, consumes=message.consumes)
