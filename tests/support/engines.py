"""Real vLLM engines as processes, driven over a pipe of JSON lines.

    with Engine.start(model, config=hub_config(address, role="kv_producer")) as engine:
        answer = engine.generate([5, 6, 7], tokens=8)

The child (`engine_main.py`) runs one `vllm.LLM`; it speaks on its standard output and logs to
`log_path`. Every wait has a deadline, and an engine that fails brings the end of its log along.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import engine_process
from tests.support.engine_process import EngineProcess

START_S = 150.0
CALL_S = 120.0

# Adapter settings for tests that are about bytes, not about time: engines and hub share two cores.
PATIENT: dict[str, Any] = {"lookup_ms": 10_000, "load_deadline_ms": 60_000, "pin_ms": 10_000}

# Eager on a CPU, vLLM leaves its warm-up out, in which a pipeline's later stages make the buffers
# that they take activations into (gpu_model_runner.py: `sync_and_gather_intermediate_tensors`
# asserts that they are there). Traced once and run as traced is next to eager.
TRACED: dict[str, Any] = {"compilation_config": {"mode": 2, "backend": "eager"}}

# An eager engine compiles all the same: the few lines that rank a token among the log-probabilities
# of its step, for two seconds in each engine's first request.
UNCOMPILED = {"TORCH_COMPILE_DISABLE": "1"}


# Token ids; or the seed, tokens and hidden size of random embeddings; or token ids (`ids`), and the
# seed (`image`) and width (`pixels`) of a random image before them.
Prompt = Sequence[int] | Mapping[str, Any]


class EngineError(AssertionError):
    """An engine did not do what it was asked; carries the end of its log."""


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt. `logprobs[i]` maps the likeliest tokens of step i."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int
    ttft_s: float
    total_s: float
    finish: str
    params: dict[str, Any] | None = None
    others: list[list[int]] = field(default_factory=list)
    """Tokens of the further samples where n > 1."""


def hub_config(
    address: str,
    *,
    role: str = "kv_both",
    policy: str = "recompute",
    event_log: Path | None = None,
    **extra: object,
) -> dict[str, Any]:
    """A kv_transfer_config for the hub at `address`; `extra` are adapter settings."""
    # Tiny models compute faster than they load: tests want the hit all the same.
    settings: dict[str, object] = {"address": address, "hits": "always", **extra}
    if event_log is not None:
        settings["event_log"] = str(event_log)
    return {
        "kv_connector": "KVServerConnector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": settings,
    }


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an event log."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]


@functools.cache
def _log_directory() -> str:
    """For the logs of this process's engines, until it ends."""
    made = tempfile.mkdtemp(prefix="kvserver-engines-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _binding(ranks: int) -> str:
    """Cores of the ranks, one of the machine's left out: idle ranks spin, and where the kernel
    does not preempt them, a hub without a core of its own stands still for seconds."""
    cores = max(1, (os.cpu_count() or 1) - 1)
    return "|".join(str(rank % cores) for rank in range(ranks))


class Engine:
    """One engine process."""

    def __init__(self, process: EngineProcess, log_path: Path) -> None:
        self.log_path = log_path
        self._process = process
        self._next = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def launch(
        cls,
        model: Path,
        *,
        config: Mapping[str, Any] | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        block_size: int = 32,
        kv_bytes: int = 128 << 20,
        max_model_len: int = 1024,
        environment: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        multiprocess: bool = False,
        runner: Sequence[str] = (),
        torch_threads: int = 0,
        **options: object,
    ) -> Engine:
        """Start the process without waiting; `wait_ready` does. `config` is kv_transfer_config,
        `options` go to `vllm.LLM`; `runner` stands before its command. `torch_threads` compute,
        default one a core, and one in each of several ranks, which are bound to a core each:
        engines that are to run side by side get in each other's way with more."""
        if log_path is None:
            handle, name = tempfile.mkstemp(prefix="engine-", suffix=".log", dir=_log_directory())
            os.close(handle)
            log_path = Path(name)
        ranks = tensor_parallel * pipeline_parallel
        settings = {
            "model": str(model),
            "skip_tokenizer_init": True,
            **(TRACED if pipeline_parallel > 1 else {"enforce_eager": True}),
            "dtype": "float32",
            "block_size": block_size,
            "max_model_len": max_model_len,
            "kv_cache_memory_bytes": kv_bytes,
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "kv_transfer_config": dict(config) if config else None,
            "torch_threads": torch_threads or int(ranks > 1),
            **options,
        }
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess or ranks > 1 else "0",
            **(UNCOMPILED if pipeline_parallel == 1 else {}),
            **(environment or {}),
        }
        variables.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule `kv_bytes`
        if ranks > 1:
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", _binding(ranks))
        process = engine_process.launch(
            settings, environment=variables, log_path=log_path, runner=runner
        )
        return cls(process, log_path)

    @classmethod
    def start(cls, model: Path, **options: Any) -> Engine:
        """Start and wait until it serves."""
        engine = cls.launch(model, **options)
        try:
            engine.wait_ready()
        except BaseException:
            engine.close()
            raise
        return engine

    def wait_ready(self, timeout_s: float = START_S) -> None:
        self._wait(-1, timeout_s)

    # ---- calls -----------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, tokens: int = 8, logprobs: int = 5, **sampling: object
    ) -> Generated:
        """Greedy decoding of `tokens` tokens. `transfer` are the request's kv_transfer_params,
        `salt` and `priority` its own, `lora` the fields of its LoRARequest; what else stands in
        `sampling` goes to SamplingParams."""
        return self.generate_many([prompt], tokens=tokens, logprobs=logprobs, **sampling)[0]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens: int = 8,
        logprobs: int = 5,
        timeout_s: float = CALL_S,
        **sampling: object,
    ) -> list[Generated]:
        """All prompts at once, in one batch."""
        call = self.begin(prompts, tokens=tokens, logprobs=logprobs, **sampling)
        return self.finish(call, timeout_s)

    def begin(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens: int = 8,
        logprobs: int = 5,
        delays: Sequence[float] = (),
        **sampling: object,
    ) -> int:
        """Start generating and return at once; `finish` collects. `delays` are seconds after which
        each prompt is added, default at once; its times count from there."""
        return self._send(
            "generate",
            prompts=[p if isinstance(p, dict) else list(p) for p in prompts],
            tokens=tokens,
            logprobs=logprobs,
            delays=list(delays),
            sampling=sampling,
        )

    def finish(self, call: int, timeout_s: float = CALL_S) -> list[Generated]:
        return [_generated(item) for item in self._wait(call, timeout_s)["outputs"]]

    def abort_during(self, prompt: Sequence[int], *, tokens: int, after_s: float) -> None:
        """Start a request and abort it `after_s` seconds later."""
        call = self._send("abort", prompt=list(prompt), tokens=tokens, after_s=after_s)
        self._wait(call, CALL_S)

    def abort_in(self, phase: str, prompt: Sequence[int], *, tokens: int = 50) -> int:
        """Abort a request in a phase of its life: waiting (for its lookup), loading, prefill or
        decode. The blocks that are free once the engine has come to rest."""
        call = self._send("abort_in", phase=phase, prompt=list(prompt), tokens=tokens)
        return int(self._wait(call, CALL_S)["free"])

    def begin_cut(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        computed: int,
        signal_number: int = 0,
        layer: int = 0,
        hold_s: float = 0.0,
        tokens: int = 1,
        **sampling: object,
    ) -> int:
        """Start generating; abort the first prompt once `computed` tokens of it are computed. With
        `signal_number`, the engine gets that signal instead, in the step that computes the last of
        them, when `layer` is done. Its own thread stands still before, until what earlier steps
        computed is pushed and for `hold_s` from there. `finish_cut` collects."""
        return self._send(
            "cut",
            prompts=[list(prompt) for prompt in prompts],
            computed=computed,
            signal=signal_number,
            layer=layer,
            hold_s=hold_s,
            tokens=tokens,
            sampling=sampling,
        )

    def finish_cut(self, call: int) -> tuple[float, int]:
        """When the request was aborted (monotonic; 0: it was not), and the engine's free blocks
        once it has come to rest."""
        answer = self._wait(call, CALL_S)
        return float(answer["at"]), int(answer["free"])

    def hamper(self, delays: Sequence[float], *, unpinned: bool = False) -> None:
        """From now on, hold each call of a push to the hub back by the next of `delays` (seconds),
        over and over. `unpinned`: pushes do not pin their pages any more."""
        self._wait(self._send("hamper", delays=list(delays), unpinned=unpinned), CALL_S)

    def reload_in(
        self, phase: str, prompt: Sequence[int], path: Path, *, tokens: int
    ) -> tuple[Generated, int, int]:
        """Reset all caches and load other weights while a request is in that phase; its answer,
        how many tokens of it are of the old weights, and how often vLLM refused the reset."""
        call = self._send(
            "reload_in",
            phase=phase,
            prompt=list(prompt),
            path=str(path),
            tokens=tokens,
            logprobs=5,
        )
        answer = self._wait(call, CALL_S)
        return _generated(answer["outputs"][0]), answer["old_tokens"], answer["refused"]

    def sleep(self, path: Path | None = None) -> int:
        """Sleep and wake up (with other weights); how often vLLM refused before."""
        call = self._send("sleep", path=str(path or ""))
        return int(self._wait(call, CALL_S)["refused"])

    def facts(self) -> dict[str, int]:
        """At rest: `free` blocks of the pool; requests that ever were `preempted`."""
        return dict(self._wait(self._send("facts"), CALL_S))

    def reset_prefix_cache(self, *, connector: bool = False) -> bool:
        """Forget what the engine itself has cached (and, with `connector`, the adapter)."""
        call = self._send("reset", connector=connector)
        return bool(self._wait(call, CALL_S)["done"])

    def free_blocks(self) -> int:
        """Free blocks of the engine's KV cache; needs an engine in one process."""
        return int(self._wait(self._send("free_blocks"), CALL_S)["blocks"])

    def idle(self, seconds: float) -> None:
        """Keep stepping an engine that has no requests, as a server does."""
        self._wait(self._send("idle", seconds=seconds), seconds + CALL_S)

    def metrics(self) -> dict[str, float]:
        """What vLLM's Prometheus registry shows of this engine, by name and further labels."""
        values: dict[str, float] = self._wait(self._send("metrics"), CALL_S)["values"]
        return values

    @property
    def pid(self) -> int:
        return self._process.pid

    # ---- plumbing --------------------------------------------------------------------------

    def _send(self, command: str, **fields: object) -> int:
        self._next += 1
        try:
            self._process.stdin.write(
                json.dumps({"id": self._next, "do": command, **fields}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"the engine is gone:\n{self.log()}") from None
        return self._next

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def _wait(self, call: int, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while call not in self._answers:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise EngineError(f"no answer within {timeout_s} s:\n{self.log()}") from None
            if line is None:
                self._lines.put(None)
                raise EngineError(f"the engine ended:\n{self.log()}")
            self._answers[line["id"]] = line
        answer = self._answers.pop(call)
        if "error" in answer:
            raise EngineError(f"{answer['error']}\n{self.log()}")
        return answer

    def log(self, last_bytes: int = 6_000) -> str:
        return self.log_path.read_bytes()[-last_bytes:].decode(errors="replace")

    def stop(self, timeout_s: float = 30.0) -> int:
        """Ask it to end; the exit status."""
        status = self._process.poll()
        if status is None:
            self._send("quit")
            try:
                status = self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise EngineError(f"still running after {timeout_s} s:\n{self.log()}") from None
        return status

    def close(self) -> None:
        """End the process and its children at once, whatever they do."""
        self._kill_group()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was never read
                stream.close()

    def end(self) -> None:
        """Ask it to end, so that it clears up after itself, and see to it."""
        with contextlib.suppress(EngineError):
            self.stop()
        self.close()

    def wait_gone(self, timeout_s: float = 10.0) -> None:
        """Wait until the process has ended by itself, or by a signal."""
        self._process.wait(timeout_s)

    def wait_stopped(self, timeout_s: float = 60.0) -> None:
        """Wait until a signal has stopped the process (SIGSTOP)."""
        deadline = time.monotonic() + timeout_s
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"not stopped within {timeout_s} s:\n{self.log()}"
            time.sleep(0.01)

    def proceed(self) -> None:
        """Let a stopped process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Ask it to end, unless something went wrong; then see to it."""
        if error is None:
            self.end()
        self.close()


def _generated(item: dict[str, Any]) -> Generated:
    return Generated(
        tokens=item["tokens"],
        logprobs=[{int(k): v for k, v in step.items()} for step in item["logprobs"]],
        cached=item["cached"],
        params=item["params"],
        ttft_s=item["ttft_s"],
        total_s=item["total_s"],
        finish=item["finish"],
        others=item["others"],
    )
