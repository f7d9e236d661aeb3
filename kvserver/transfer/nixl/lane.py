"""One thread of a nixl worker, with an agent of its own: takes posts of the worker's jobs.

Rules:
 1. The agent belongs to the lane's thread. Others have it do something by `ask`, between two steps,
    and `wire` while it is not in one.
 2. A lane ends when the jobs are closed and nothing of its own runs.
 3. What goes wrong in it ends the process (`fail`), and with that whatever it moves.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from kvserver.transfer.nixl.agent import WIRE_S, NixlAgent
from kvserver.transfer.nixl.jobs import Jobs

Order = Callable[[NixlAgent], None]


class Lane:
    """See the module's rules. `wiring` is set when the agent has a connection to make, or one that
    is more urgent than before."""

    def __init__(
        self,
        number: int,
        agent: NixlAgent,
        jobs: Jobs,
        *,
        wiring: threading.Event,
        fail: Callable[[Exception], None],
    ) -> None:
        self.agent = agent
        self._jobs = jobs
        self._wiring = wiring
        self._fail = fail
        self._stepping = threading.Lock()
        self._wire_s: float | None = None  # the agent's `wiring` when it was last asked
        self._orders: queue.SimpleQueue[tuple[Order, Future[None]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"nixl-lane-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ended(self, limit_s: float) -> bool:
        """Whether it has, after so long at most."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def ask(self, order: Order) -> None:
        """Returns when it was carried out, and raises what that raised. A lane that is in a post
        which does not come back keeps its caller: the hub notices by the worker's silence."""
        future: Future[None] = Future()
        self._orders.put((order, future))
        self._jobs.wake()
        future.result()

    def wire(self) -> float | None:
        """From another thread: `NixlAgent.wire`, and in how many seconds again."""
        if self._wire_s is None:
            return None
        if not self._stepping.acquire(timeout=WIRE_S):
            return WIRE_S  # it is in a step, which lets its connections go on as well
        try:
            if self.agent.wiring is not None:
                self.agent.wire()
            self._wire_s = self.agent.wiring
            return self._wire_s
        finally:
            self._stepping.release()

    def _run(self) -> None:
        try:
            while not (self._jobs.closed and not self.agent.in_flight):
                changes = self._jobs.changes
                with self._stepping:
                    self._obey()
                    moved = self.agent.step()
                    before, self._wire_s = self._wire_s, self.agent.wiring
                    if self._wire_s is not None and (before is None or self._wire_s < before):
                        self._wiring.set()
                    pause_s = self.agent.pause_s
                if not moved:
                    self._jobs.wait(changes, pause_s)
        except Exception as error:
            self._fail(error)

    def _obey(self) -> None:
        while not self._orders.empty():
            order, future = self._orders.get()
            try:
                order(self.agent)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)
