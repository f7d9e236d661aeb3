"""An engine of the 136 M parameter model on one core, its hub and the adapter's threads on another.

vLLM's processes and their threads run on ENGINE_CORE only; the hub, the benchmark and every thread
that the adapter starts (its link to the hub, copies, gRPC) on OTHER_CORE. `Room.placed` reads from
the kernel where they may really run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.demo import end_engine, scratch_directory
from kvclient import Client
from tests.support.engines import Engine, Generated, hub_config
from tests.support.server import SHM, ServerProcess, start_server
from tests.support.tiny_models import DEMO, prompt, write_model

ENGINE_CORE, OTHER_CORE = 0, 1
WAIT_SECONDS_MAX = 60.0
_PIN = f"import os, sys; os.sched_setaffinity(0, {{{OTHER_CORE}}}); " + (
    "os.execv(sys.argv[1], sys.argv[1:])"
)
_CORES = os.sched_getaffinity(0)
MODEL = replace(DEMO, positions=8448)


class RoomError(RuntimeError):
    """The benchmark cannot go on; the message says why."""


def _write(directory: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    write_model(directory, MODEL)


class Room:
    """Ends all that it started when `stack` is closed."""

    def __init__(self, stack: ExitStack, say: Callable[[str], None], model: Path | None) -> None:
        """`model`: a directory with the model, or one that it will be written to; None: scratch."""
        if not {ENGINE_CORE, OTHER_CORE} <= _CORES:
            raise RoomError("two cores are needed, one for the engine and one for the rest")
        os.sched_setaffinity(0, {OTHER_CORE})
        self._stack = stack
        self._say = say
        self.scratch = Path(stack.enter_context(scratch_directory(Path(tempfile.gettempdir()))))
        self.calls = self.scratch / "calls"
        self._model = model or self.scratch / "model"

    def _write_model(self) -> None:
        if (self._model / "config.json").exists():
            return
        self._say("writing a Llama of 136 million random parameters")
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=_write, args=(self._model,), daemon=True)
        writer.start()
        writer.join(WAIT_SECONDS_MAX)
        if writer.exitcode != 0:
            raise RoomError(f"writing the model failed with exit status {writer.exitcode}")

    def hub(self, **options: Any) -> ServerProcess:
        host_dir = self._stack.enter_context(scratch_directory(SHM))
        hub = start_server(
            self.scratch, host_dir=host_dir, runner=(sys.executable, "-c", _PIN), **options
        )
        self._stack.callback(hub.close)
        return hub

    def engine(
        self,
        hub: ServerProcess,
        *,
        address: str = "",
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Engine:
        """Started, connected to the hub (at `address` where that is not its own) and warm.
        `settings` are the adapter's; `options` those of `Engine.launch`."""
        self._write_model()
        self._say("starting an engine (20 to 60 s)")
        own = {"hits": "auto", "cores": str(OTHER_CORE), **dict(settings or {})}
        config = hub_config(address or hub.address, **own)
        config["kv_connector"] = "TimedConnector"
        config["kv_connector_module_path"] = "bench.timed_connector"
        engine = Engine.launch(
            self._model,
            config=config,
            log_path=self.scratch / "engine.log",
            multiprocess=True,
            environment={
                "TMPDIR": str(self.scratch),
                "VLLM_CPU_OMP_THREADS_BIND": str(ENGINE_CORE),
                "KVSERVER_BENCH_CALLS": str(self.calls),
                "TORCH_COMPILE_DISABLE": "0",  # what vLLM compiles is part of a step's time
            },
            **{"kv_bytes": 1 << 30, **dict(options or {})},
        )
        self._stack.callback(end_engine, engine)
        for task in Path(f"/proc/{engine.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {ENGINE_CORE})
        engine.wait_ready()
        with Client.connect(hub.address, name="bench") as client:
            until("the engine's namespace", lambda: bool(client.list_namespaces()))
        for seed in (1, 2):
            engine.generate(prompt(seed, 100, DEMO), tokens=4)  # less than a block
        return engine

    def placed(self, engine: Engine) -> dict[str, int]:
        """Threads of the engine's processes by the cores that they may run on."""
        counts: dict[str, int] = {}
        for pid in _tree(engine.pid):
            for status in Path(f"/proc/{pid}/task").glob("*/status"):
                for line in status.read_text().splitlines():
                    if line.startswith("Cpus_allowed_list:"):
                        cores = line.split()[1]
                        counts[cores] = counts.get(cores, 0) + 1
        return counts


def until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not true():
        if time.monotonic() > deadline:
            raise RoomError(f"{what} did not come within {WAIT_SECONDS_MAX:.0f} s")
        time.sleep(0.02)


def whole_blocks(hub: ServerProcess) -> int:
    stats = hub.stats()
    return int(stats.blocks - stats.blocks_filling - stats.blocks_announced)


def pushed(hub: ServerProcess, blocks: int) -> None:
    """Wait until the hub holds so many whole blocks."""
    until(f"{blocks} blocks at the hub", lambda: whole_blocks(hub) >= blocks)


def forget(engine: Engine) -> None:
    """Empty the engine's own cache, once no push pins its blocks any more."""
    until("a reset of the prefix cache", engine.reset_prefix_cache)


def seconds(answers: list[Generated]) -> float:
    """Until the last of a batch that was sent at once had its last token."""
    return max(answer.total_s for answer in answers)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _tree(int(child))
    return found
