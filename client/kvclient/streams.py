"""Calls with many replies, as their readers see them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio

from kvclient.errors import from_rpc, late
from kvclient.timing import Deadline

if TYPE_CHECKING:
    from kvclient.session import Session

Message = Any  # a protobuf message


class Stream(Protocol):
    """A server-streaming call. KVErrors only."""

    def done(self) -> bool: ...

    def cancel(self) -> None: ...

    async def read(self, deadline: Deadline | None = None) -> Message | None:
        """The next message, None behind the last. DeadlineExceeded at the deadline, if there is
        one: then the call is cancelled.
        """


class GrpcStream:
    """A Stream over gRPC."""

    def __init__(self, session: Session, name: str, call: Any) -> None:
        self._session = session
        self._name = name
        self._call = call

    def done(self) -> bool:
        return bool(self._call.done())

    def cancel(self) -> None:
        self._call.cancel()

    async def read(self, deadline: Deadline | None = None) -> Message | None:
        try:
            async with asyncio.timeout(None if deadline is None else deadline.left()):
                reply = await self._call.read()
        except TimeoutError:
            self.cancel()
            seconds = 0.0 if deadline is None else deadline.seconds
            raise late(self._name, self._session.address, seconds) from None
        except grpc.RpcError as error:
            raise from_rpc(error, what=self._name, address=self._session.address) from None
        except asyncio.CancelledError:
            self._session.cancelled(self._name)
            raise
        return None if reply is grpc.aio.EOF else reply
