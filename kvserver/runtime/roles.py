"""Roles: an operator tells an engine to stop or start producing or consuming; it obeys and says so.

Theory of operation. An engine opens a stream of orders when it connects, and says what it does and
what it was started for. The last order is the only one that counts: an engine that was away hears
that one. An operator's call waits until the engine has obeyed.

Rule 1: an order never goes beyond the ceiling, and only engines that were started for both change:
vLLM fences its blocks for what it was started for.
Rule 2: a role is the engine's own: it keeps it when the hub restarts, and tells it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from kvserver.core.errors import CoreError, ErrorKind

_ENDED = "the engine's session has ended"


@dataclass(frozen=True, slots=True)
class Role:
    produces: bool
    consumes: bool

    def __str__(self) -> str:
        words = (("produce", self.produces), ("consume", self.consumes))
        return " and ".join(word for word, on in words if on) or "do neither"


BOTH = Role(produces=True, consumes=True)


@dataclass(eq=False, slots=True)
class Follower:
    """An engine that takes orders. On the loop's thread."""

    now: Role
    ceiling: Role
    wanted: Role | None = None  # the last order, until it is obeyed
    number: int = 0  # of the last order
    ended: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: dict[int, asyncio.Future[Role]] = field(default_factory=dict)  # by order

    async def orders(self) -> AsyncGenerator[tuple[int, Role], None]:
        """Orders as they come, the last one if there were several. Ends with the follower."""
        told = 0
        while not self.ended:
            self.wake.clear()
            if self.wanted is not None and self.number > told:
                told = self.number
                yield told, self.wanted
            else:
                await self.wake.wait()

    async def order(
        self, *, produces: bool | None, consumes: bool | None, deadline_s: float
    ) -> Role:
        """The role once the engine has obeyed; None leaves that half as it is. CoreError CONFLICT
        beyond the ceiling, UNAVAILABLE when it does not obey in time.
        """
        if self.ended:
            raise CoreError(ErrorKind.UNAVAILABLE, _ENDED, field="engine")
        base = self.wanted or self.now
        role = Role(
            produces=base.produces if produces is None else produces,
            consumes=base.consumes if consumes is None else consumes,
        )
        self._check(role)
        if role == self.now and self.wanted is None:
            return role
        self.number += 1
        number, self.wanted = self.number, role
        done: asyncio.Future[Role] = asyncio.get_running_loop().create_future()
        self.waiting[number] = done
        self.wake.set()
        try:
            async with asyncio.timeout(deadline_s):
                return await done
        except TimeoutError:
            raise CoreError(
                ErrorKind.UNAVAILABLE,
                f"the engine has not obeyed within {deadline_s:g} s; the order stands",
                field="engine",
            ) from None
        finally:
            self.waiting.pop(number, None)

    def _check(self, role: Role) -> None:
        top = self.ceiling
        if role.produces > top.produces or role.consumes > top.consumes:
            raise CoreError(
                ErrorKind.CONFLICT,
                f"the engine was started to {top} (its kv_role): it cannot be told to {role}",
                field="role",
                limit=str(top),
            )
        if top != BOTH and role != self.now:
            raise CoreError(
                ErrorKind.CONFLICT,
                f"the engine was started to {top}: only one started as kv_both changes its role",
                field="role",
                limit=str(top),
            )

    def obeyed(self, number: int, role: Role) -> None:
        """The engine's word: it does this now, after that order."""
        self.now = role
        if number >= self.number:
            self.wanted = None
        for order in [order for order in self.waiting if order <= number]:
            done = self.waiting.pop(order)
            if not done.done():
                done.set_result(role)

    def end(self) -> None:
        """The session is over, or has another stream."""
        self.ended = True
        self.wake.set()
        for done in self.waiting.values():
            if not done.done():
                done.set_exception(CoreError(ErrorKind.UNAVAILABLE, _ENDED, field="engine"))
        self.waiting.clear()
