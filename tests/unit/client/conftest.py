"""An arena served over its real socket, with nothing else of a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvclient.transfer.shm import ShmArena, open_arena
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.shm import ShmServer

TOKEN = b"0123456789abcdef"
SESSION = 77


class ServedArena:
    """`arena` behind a socket at `path`, whose loop runs in a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arena = HostArena.open(directory, 8 << 20)
        self.liveness = Liveness(directory)
        self.path = str(directory / "shm.sock")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = ShmServer(
            directory / "shm.sock",
            arena=self.arena,
            liveness=self.liveness,
            authorise=lambda session, _, token: (session, token) == (SESSION, TOKEN),
        )
        self._run(self._server.start)

    def _run(self, work: Callable[[], object]) -> None:
        async def go() -> None:
            await work()  # type: ignore[misc]

        asyncio.run_coroutine_threadsafe(go(), self._loop).result(5)

    def open(self, client: int = 1, *, read_only: bool = False) -> ShmArena:
        return open_arena(
            self.path,
            session=SESSION,
            client=client,
            token=TOKEN,
            read_only=read_only,
            deadline_s=5,
        )

    def close(self) -> None:
        self._run(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.arena.close(keep=False)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedArena]:
    served = ServedArena(tmp_path / "host")
    yield served
    served.close()
