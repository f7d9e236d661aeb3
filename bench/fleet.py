"""Client processes, started and commanded together.

Processes are spawned, not forked: gRPC does not survive a fork. A worker ends when its pipe closes,
so none outlives the coordinator.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from bench.worker import Timing, main

_LEAD_SECONDS = 0.01
_END_SECONDS_MAX = 10.0


class WorkerFailed(RuntimeError):
    """A command failed in a worker; the message is the worker's traceback."""


class Fleet:
    """`size` client processes. Use it as a context manager."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=main, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._pipes)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def all(self, method: str, **arguments: Any) -> list[Any]:
        """Run a command in every worker at once; their results in order."""
        for pipe in self._pipes:
            pipe.send((method, arguments))
        return [_receive(pipe) for pipe in self._pipes]

    def one(self, method: str, *, worker: int = 0, **arguments: Any) -> Any:
        """Run a command in one worker."""
        self.begin(method, worker=worker, **arguments)
        return self.result(worker=worker)

    def begin(self, method: str, *, worker: int = 0, **arguments: Any) -> None:
        """Start a command in one worker; `result` waits for it."""
        self._pipes[worker].send((method, arguments))

    def result(self, *, worker: int = 0) -> Any:
        return _receive(self._pipes[worker])

    def timed(self, plan: str, *, calls: int, batch: int) -> list[Timing]:
        """Plan a job in every worker, then run them all from the same instant on."""
        self.all(plan, calls=calls, batch=batch)
        timings: list[Timing] = self.all("run", at=time.monotonic() + _LEAD_SECONDS)
        return timings

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_END_SECONDS_MAX)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(pipe: Connection) -> Any:
    status, value = pipe.recv()
    if status == "error":
        raise WorkerFailed(value)
    return value
