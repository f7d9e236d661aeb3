"""`make demo`: the main job for real, from prefill to decode, across a kill and a restart.

A kvserver, vLLM engines with the adapter in processes of their own, a Llama of 136 million random
parameters that is written on the spot. What an engine without a hub says is the measure: exit
status 0 means that every output equalled it (tokens, and log-probabilities within 1e-4), and that
every pull happened, as counted by vLLM, by the adapter's event log and by the hub.

    python -m bench.demo

Rule 1: engines run one after another, or two that start together and are then asked in turn; a
time to first token is never taken while another engine computes.
Rule 2: whatever happens, Ctrl-C included, no process and no directory is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from bench.oracle import BLOCK_TOKENS, Step, judge, table
from tests.support.engines import Engine, EngineError, Generated, hub_config, read_events
from tests.support.server import ServerProcess, start_server
from tests.support.tiny_models import DEMO, prompt, write_model

PROMPT_TOKENS = (320, 450, 577, 700, 812, 900)
OUTPUT_TOKENS = 16
WARM_UP_TOKENS = 40  # less than a block: neither pushed nor looked up
KV_BYTES = 1 << 30
HOST_BYTES = 512 << 20
DISK_BYTES = 1 << 30
# A busy or slow machine must not turn a pull into a miss: the demo shows that pulls work, not how
# an engine does without them.
PATIENCE: dict[str, Any] = {"lookup_ms": 2_000, "pin_ms": 5_000, "load_deadline_ms": 30_000}
SHM = Path("/dev/shm")
SHM_FREE_BYTES_MIN = 2 << 30
KNOWN_SECONDS_MAX = 30.0
PUSH_SECONDS_MAX = 60.0
_TICK_SECONDS = 10.0


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


class Clock:
    """Progress lines with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is waited for, and every ten seconds that it still is."""
        self.say(what)
        done = threading.Event()
        began = time.monotonic()

        def tick() -> None:
            while not done.wait(_TICK_SECONDS):
                self.say(f"  ... still at it, {time.monotonic() - began:.0f} s")

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()


class Demo:
    """The story, step by step. `steps` is what the table shows."""

    def __init__(self, clock: Clock, stack: ExitStack) -> None:
        self._clock = clock
        self._stack = stack
        self._scratch = Path(stack.enter_context(scratch_directory(Path(tempfile.gettempdir()))))
        self._model = self._scratch / "model"
        self._events = self._scratch / "events.jsonl"
        self._prompts = [prompt(100 + i, n, DEMO) for i, n in enumerate(PROMPT_TOKENS)]
        self._reference: list[Generated] = []
        self.steps: list[Step] = []

    def run(self) -> None:
        self._write_model()
        with self._engines("engine without a hub", 1) as (alone,):
            self._reference = self._serve("no hub", alone, hub=None)
        hub = self._start_hub()
        with self._engines("prefill engine", 1, hub, "kv_producer") as (prefill,):
            self._serve("prefill", prefill, hub=hub, tokens=1, pulls=False)
            self._wait_pushed(prefill, hub)
        with self._engines("two decode engines", 2, hub, "kv_consumer") as decoders:
            for number, decode in enumerate(decoders, 1):
                self._serve(f"decode {number}", decode, hub=hub)
        self._kill_and_restart(hub)
        with self._engines("fresh decode engine", 1, hub, "kv_consumer") as (fresh,):
            self._serve("after restart", fresh, hub=hub)

    # ---- the parts -----------------------------------------------------------------------------

    def _write_model(self) -> None:
        with self._clock.waiting("writing a Llama of 136 million random parameters"):
            writer = multiprocessing.get_context("spawn").Process(
                target=_write, args=(self._model,), daemon=True
            )
            writer.start()
            writer.join()
        if writer.exitcode != 0:
            raise DemoError(f"writing the model failed with exit status {writer.exitcode}")

    @contextmanager
    def _engines(
        self, what: str, count: int, hub: ServerProcess | None = None, role: str = ""
    ) -> Iterator[list[Engine]]:
        config = None
        if hub is not None:
            config = hub_config(hub.address, role=role, event_log=self._events, **PATIENCE)
        with ExitStack() as stack:
            with self._clock.waiting(f"starting {what} (15 to 60 s)"):
                engines = []
                for number in range(count):
                    log = self._scratch / f"{what.replace(' ', '-')}-{number}.log"
                    engine = Engine.launch(
                        self._model,
                        config=config,
                        kv_bytes=KV_BYTES,
                        log_path=log,
                        environment={"TMPDIR": str(self._scratch)},
                    )
                    stack.callback(end_engine, engine)
                    engines.append(engine)
                for engine in engines:
                    engine.wait_ready()
                for engine in engines:
                    engine.generate(prompt(7, WARM_UP_TOKENS, DEMO), tokens=2)
                    if hub is not None:
                        self._wait_known(engine)
            yield engines

    def _wait_known(self, engine: Engine) -> None:
        """An engine serves before its adapter has a namespace at the hub, and what it begins until
        then is not pushed: weights are digested first, a second for files that are new."""
        deadline = time.monotonic() + KNOWN_SECONDS_MAX
        while not any(
            event["event"] == "namespace" and event["pid"] == engine.pid
            for event in read_events(self._events)
        ):
            if time.monotonic() > deadline:
                raise DemoError(f"an engine has no namespace after {KNOWN_SECONDS_MAX} s")
            engine.idle(0.1)

    def _serve(
        self,
        name: str,
        engine: Engine,
        *,
        hub: ServerProcess | None,
        tokens: int = OUTPUT_TOKENS,
        pulls: bool = True,
    ) -> list[Generated]:
        """Send every prompt to an engine, one at a time, and judge what came back."""
        before = hub.stats() if hub else None
        outputs = []
        for number, tokens_in in enumerate(self._prompts, 1):
            output = engine.generate(tokens_in, tokens=tokens)
            self._clock.say(
                f"{name}: prompt {number}, {len(tokens_in)} tokens, {output.cached} from a cache, "
                f"first token after {output.ttft_s:.3f} s"
            )
            outputs.append(output)
        step = judge(
            name,
            prompts=self._prompts,
            outputs=outputs,
            reference=self._reference or outputs,
            tokens=tokens,
            events=self._events,
            pid=engine.pid,
            pulls=pulls and hub is not None,
            hub_before=before,
            hub_after=hub.stats() if hub else None,
        )
        for problem in step.problems:
            self._clock.say(f"{name}: WRONG: {problem}")
        self.steps.append(step)
        return outputs

    def _start_hub(self) -> ServerProcess:
        shm_free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
        parent = SHM if shm_free >= SHM_FREE_BYTES_MIN else Path(tempfile.gettempdir())
        host_dir = self._stack.enter_context(scratch_directory(parent))
        hub = start_server(
            self._scratch,
            host_dir=host_dir,
            host_bytes=HOST_BYTES,
            disk_path=self._scratch / "disk",
            disk_bytes=DISK_BYTES,
        )
        self._stack.callback(hub.close)
        self._clock.say(f"kvserver serves on {hub.address}: 512 MiB of memory, 1 GiB of disk")
        return hub

    def _wait_pushed(self, engine: Engine, hub: ServerProcess) -> None:
        expected = sum(n // BLOCK_TOKENS for n in PROMPT_TOKENS)
        deadline = time.monotonic() + PUSH_SECONDS_MAX
        while True:
            stats = hub.stats()
            whole = stats.blocks - stats.blocks_filling - stats.blocks_announced
            if whole >= expected:
                break
            if time.monotonic() > deadline:
                raise DemoError(f"the hub holds {whole} whole blocks, {expected} were to come")
            engine.idle(0.1)
        self._clock.say(f"the hub holds {whole} blocks of {BLOCK_TOKENS} tokens")

    def _kill_and_restart(self, hub: ServerProcess) -> None:
        hub.kill()
        self._clock.say("kvserver is killed (SIGKILL)")
        began = time.monotonic()
        hub.start()
        self._clock.say(
            f"kvserver serves again after {time.monotonic() - began:.2f} s, "
            f"with {hub.stats().blocks} blocks from before"
        )


def _write(directory: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    write_model(directory, DEMO)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="kvserver-demo-", dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def end_engine(engine: Engine) -> None:
    """End an engine at once: its work is done, or does not matter any more."""
    with suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _let_nothing_interrupt() -> None:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def main() -> int:
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    clock = Clock()
    failure = ""
    steps: list[Step] = []
    try:
        with ExitStack() as stack:
            stack.callback(_let_nothing_interrupt)
            demo = Demo(clock, stack)
            steps = demo.steps
            demo.run()
    except KeyboardInterrupt:
        clock.say("interrupted; everything that was started is ended and removed")
        return 130
    except (DemoError, EngineError, AssertionError, OSError) as error:
        failure = f"{type(error).__name__}: {error}"
    if steps:
        print(f"\n{table(steps)}\n")
    problems = [f"{step.name}: {problem}" for step in steps for problem in step.problems]
    if failure:
        problems.append(failure)
    for problem in problems:
        print(f"WRONG  {problem}")
    if problems:
        return 1
    print("Every output equals that of the engine without a hub, and every pull happened.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
