"""How the processes of engines come about.

Importing vLLM takes longer than everything else an engine does before it serves. So a fork server
(the standard library's) imports it once, and each engine is a fork of that, with an environment,
standard streams and a session of its own. The fork server runs no thread of Python's and has no
engine, no gRPC and no device; it ends with the process that started it.

An engine is a fresh interpreter instead where one is asked for: behind `runner` (another network
namespace), or with variables that only the start of a process reads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tests.support import engine_main

MAIN = Path(engine_main.__file__)
# What any engine on a CPU imports sooner or later. One that is not there is left out.
PRELOADED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.entrypoints.anthropic.protocol",
    "vllm.entrypoints.launchers.cli_args",
    "transformers.models.llama.configuration_llama",
)
# Read when an interpreter, an allocator or a pool of threads starts, which a fork no longer does.
_START_ONLY = ("PYTHON", "LD_", "MALLOC_", "OMP_", "KMP_", "GOMP_", "GRPC_")


class EngineProcess(Protocol):
    """The process, with text streams to and from it. Its id is that of its session."""

    @property
    def pid(self) -> int: ...

    @property
    def stdin(self) -> TextIO: ...

    @property
    def stdout(self) -> TextIO: ...

    def poll(self) -> int | None:
        """Its exit status (negative: the signal), None while it runs."""
        ...

    def wait(self, timeout_s: float) -> int:
        """subprocess.TimeoutExpired when it still runs then."""
        ...


def launch(
    settings: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    log_path: Path,
    runner: Sequence[str] = (),
) -> EngineProcess:
    """An engine with `settings` (of `vllm.LLM`); `environment` is the whole of it."""
    changed = {name for name in environment if environment[name] != os.environ.get(name)}
    if runner or any(name.startswith(_START_ONLY) for name in changed):
        return Fresh(settings, environment, log_path, runner)
    return Forked(settings, environment, log_path)


class Fresh:
    """An interpreter of its own."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        log_path: Path,
        runner: Sequence[str],
    ) -> None:
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [*runner, sys.executable, str(MAIN), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(environment),
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.stdin = self._process.stdin
        self.stdout = self._process.stdout

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)


class Forked:
    """A fork of the fork server."""

    def __init__(
        self, settings: Mapping[str, Any], environment: Mapping[str, str], log_path: Path
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        commands, self.stdin = _pipe(reading=False)
        self.stdout, answers = _pipe(reading=True)
        with log_path.open("a") as log:
            streams = engine_main.Streams(commands, answers, log.fileno())
            process = context.Process(
                target=engine_main.forked, args=(settings, dict(environment), streams)
            )
            process.start()
        for end in (commands, answers):
            os.close(end)
        assert process.pid is not None
        self.pid: int = process.pid
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked engine", timeout_s)
        return self._process.exitcode


def _pipe(*, reading: bool) -> tuple[Any, Any]:
    """(read end, write end): ours as a text file, the other as a descriptor."""
    read, write = os.pipe()
    if reading:
        return os.fdopen(read, "r"), write
    return read, os.fdopen(write, "w")
