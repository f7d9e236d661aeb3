"""An endpoint of `tcp` over a real arena, with its loop in a thread, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvproto.arena import UNIT
from kvproto.frames import Hello, HelloStatus, Op, Place
from kvproto.grid import Region
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.permits import Permits, new_secret
from kvserver.transfer.tcp.endpoint import TcpEndpoint
from tests.support.tcp import RawTcp

TOKEN = b"0123456789abcdef"
SESSION = 77
HASTE_S = 0.4
LAYERS, HEADS, CELL = 6, 4, 24 * 1024
WHOLE = Region(0, LAYERS, 0, HEADS)
SLOT_BYTES = 40 * UNIT  # 6 * 4 cells of 24 KiB, the trailer, and some room
Result = TypeVar("Result")


class TcpBench:
    """`workers` 0: threads of this process; else processes."""

    def __init__(self, directory: Path, *, workers: int = 0, **options: Any) -> None:
        self.arena = HostArena.open(directory, 8 << 20)
        self.liveness = Liveness(directory)
        secret = new_secret()
        self.permits = Permits(secret)
        self.alive = True
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.endpoint = TcpEndpoint(
            "127.0.0.1:0",
            arena=self.arena,
            liveness=self.liveness,
            authorise=lambda session, client, token: (session, token) == (SESSION, TOKEN),
            alive=lambda session, client: self.alive,
            secret=secret,
            workers=workers,
            **{"stall_s": 20.0, "hello_s": 20.0, **options},
        )
        try:
            self._run(self.endpoint.start())
        except BaseException:
            self.close()
            raise

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def ask(self, function: Callable[[], Result]) -> Result:
        """What `function` says on the loop's thread."""

        async def run() -> Result:
            return function()

        result: Result = self._run(run())
        return result

    def counters(self) -> dict[str, int]:
        return self.ask(self.endpoint.counters)

    def close(self) -> None:
        self._run(self.endpoint.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.arena.close(keep=False)

    # ---- clients and slots ---------------------------------------------------------------------

    def raw(self) -> RawTcp:
        return RawTcp(self.endpoint.address)

    def connect(self, client: int = 1) -> RawTcp:
        raw = self.raw()
        welcome = raw.hello(Hello(SESSION, client, TOKEN))
        assert welcome.status is HelloStatus.OK, welcome
        assert (welcome.epoch, welcome.arena_id) == (self.arena.epoch, self.arena.arena_id)
        return raw

    def reserve(self, number: int = 0, *, client: int = 1, granted: Region = WHOLE) -> Place:
        """Slot `number`, filled with 0xEE and reserved for the client, with a permit to write."""
        offset = number * SLOT_BYTES
        self.slot(number)[:] = 0xEE
        generation = self.arena.read_entry(offset).generation + 1
        self.arena.write_reserved(offset, SLOT_BYTES, generation, (client,))
        return self.permit(Op.WRITE, self.place(number, granted=granted), client=client)

    def place(self, number: int = 0, *, granted: Region = WHOLE) -> Place:
        """The slot as it is now, without a permit."""
        offset = number * SLOT_BYTES
        generation = self.arena.read_entry(offset).generation
        return Place(5, offset, generation, CELL, LAYERS, HEADS, granted)

    def permit(self, op: Op, place: Place, *, client: int = 1) -> Place:
        return replace(place, permit=self.permits.mint(op, client, place))

    def slot(self, number: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.arena.slot(number * SLOT_BYTES, SLOT_BYTES)

    def cells(self, number: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[layers, heads, bytes], a view."""
        return self.slot(number)[: LAYERS * HEADS * CELL].reshape(LAYERS, HEADS, CELL)
