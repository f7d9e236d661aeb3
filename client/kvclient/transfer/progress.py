"""A client's agent of `nixl`, and the thread that lets it take part in what the hub begins.

The hub initiates every transfer, but its target has work as well: answering while the connection is
made, and sending and receiving where no hardware does it (UCX over tcp). NIXL has a thread for
that, which UCX's descriptors wake; while our side of a connection waits for the hub's it goes round
without a pause, a whole core, for as long as the hub gets none (ADR 0018). This one looks at fixed
times instead.

    after a look that found work: EAGER_S later
    moving, and for LINGER_S after: each BUSY_S       else: each IDLE_S

Rules:
 1. One thread at a time calls the agent.
 2. A call that the hub answers with a transfer is made inside `moving`. A transfer that outlives
    its call goes on slowly.
 3. `close` waits for nothing: the thread destroys the agent. Until then what it has registered
    lives.
 4. An interpreter that ends waits for the threads, EXIT_S at most: one that came back from the
    library later would be unwound through it, which ends the process by SIGABRT.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Protocol

from kvclient.errors import DeadlineExceeded, Unsupported
from kvclient.timing import Deadline
from kvclient.transfer.ring import Ring
from kvproto import nixlib
from kvproto.nixlib import Memory, NixlError

BUSY_S = 2e-3
EAGER_S = 1e-4  # what a socket holds would be sent or filled before BUSY_S is over
WORK_S = 2e-4  # processor time of a look that found work; one that finds none takes some 10 us
LINGER_S = 0.5
IDLE_S = 0.1
EXIT_S = 2.0  # for all threads together


class Target(Protocol):
    """What this module needs of `kvproto.nixlib.Agent`; tests have another."""

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...
    def deregister(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...
    def metadata(self) -> bytes: ...
    def progress(self) -> None: ...
    def close(self) -> None: ...


class Area(Protocol):
    """Memory; whoever has it keeps it alive."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def device(self) -> int: ...


class ClientAgent:
    """See the module's rules. NixlError from what the library refuses."""

    def __init__(self, agent: Target, *, keep: object, progresses: bool) -> None:
        """`keep` is what lives as long as the agent. One that `progresses` has a thread of NIXL."""
        self._agent = agent
        self._keep = keep
        self._known: list[Area] = []
        self._calling = threading.Lock()
        self._changed = threading.Condition()
        self._moving = 0
        self._busy_until = 0.0
        self._closing = False
        self._thread: threading.Thread | None = None
        if not progresses:
            self._thread = threading.Thread(target=self._run, name="kvclient-nixl", daemon=True)
            self._thread.start()
            _threads.add(self)

    @property
    def known(self) -> list[Area]:
        """What it has registered besides the ring."""
        return list(self._known)

    def register(self, area: Area) -> None:
        """Unless it is known."""
        with self._calling:
            if area not in self._known:
                self._agent.register(area.address, area.nbytes, area.memory, area.device)
                self._known.append(area)

    def deregister(self, area: Area) -> None:
        """Unless it is not known. What it lies in lives until this is done."""
        with self._calling:
            if area in self._known:
                self._agent.deregister(area.address, area.nbytes, area.memory, area.device)
                self._known.remove(area)

    def metadata(self) -> bytes:
        with self._calling:
            return self._agent.metadata()

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """While the hub may move: rule 2."""
        with self._changed:
            self._moving += 1
            if self._moving == 1:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._moving -= 1
                self._busy_until = time.monotonic() + LINGER_S

    def close(self) -> None:
        """Nothing may follow."""
        if self._thread is None:
            self._agent.close()
            return
        with self._changed:
            self._closing = True
            self._changed.notify()

    def ended(self, limit_s: float) -> bool:
        """Whether the agent is destroyed, after so long at most."""
        if self._thread is not None:
            self._thread.join(limit_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        worked = False
        while True:
            with self._changed:
                if self._closing:
                    break
                busy = self._moving or time.monotonic() < self._busy_until
                self._changed.wait(EAGER_S if worked else BUSY_S if busy else IDLE_S)
            before = time.thread_time()
            with self._calling, contextlib.suppress(NixlError):  # moves say what does not work
                self._agent.progress()
            worked = time.thread_time() - before > WORK_S
        with self._calling:
            self._agent.close()
            self._known.clear()
        self._keep = None


async def open_agent(
    name: str, ring: Ring, *, backend: str, params: Mapping[str, str], direct: bool,
    deadline: Deadline,
) -> ClientAgent:  # fmt: skip
    """An agent that has registered the ring. Unsupported where there can be none. `direct`: memory
    of a card may come, for which the thread needs that card's context; NIXL's own has it."""

    made: list[ClientAgent] = []
    abandoned = False
    deciding = threading.Lock()

    def make() -> ClientAgent:
        ring.prefault()
        progresses = direct and nixlib.cards()
        bare = nixlib.Agent(name, backend=backend, params=params, progress=progresses)
        bare.register(ring.address, ring.bytes.nbytes, Memory.DRAM)
        agent = ClientAgent(bare, keep=ring, progresses=progresses)
        with deciding:
            if not abandoned:
                made.append(agent)
                return agent
        agent.close()
        raise NixlError("it came too late")  # nobody listens, nor need the loop be there still

    try:
        async with asyncio.timeout(max(deadline.left(), 1e-3)):
            return await asyncio.to_thread(make)
    except NixlError as error:
        raise Unsupported(str(error)) from error
    except BaseException as error:
        with deciding:
            abandoned = True
        for agent in made:
            agent.close()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded("no NIXL agent in time", field="deadline_s") from error
        raise


_threads: weakref.WeakSet[ClientAgent] = weakref.WeakSet()


def _end_all() -> None:
    """Rule 4."""
    limit = time.monotonic() + EXIT_S
    left = list(_threads)
    for agent in left:
        agent.close()
    for agent in left:
        agent.ended(max(0.0, limit - time.monotonic()))


atexit.register(_end_all)
