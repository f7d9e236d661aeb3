"""The child process of `engines.Engine`: one vLLM engine that obeys JSON lines.

Forked from a process that has imported vLLM (`forked`), or started by path with the settings of
`vllm.LLM` as its argument. Commands come on standard input, answers leave on what was standard
output when the process began; everything that vLLM prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.reduction import DupFd
from typing import Any

PHASE_S = 60.0
RESET_S = 30.0
SETTLE_S = 1.0
YIELD_S = 1e-4


class Streams:
    """Standard input, output and error of a process to be; pickled while it is started."""

    def __init__(self, *fds: int) -> None:
        self._fds = fds

    def __getstate__(self) -> list[Any]:
        return [DupFd(fd) for fd in self._fds]

    def __setstate__(self, fds: list[Any]) -> None:
        self._fds = tuple(fd.detach() for fd in fds)

    def take(self) -> None:
        """Make them this process's own."""
        for stream, fd in enumerate(self._fds):
            os.dup2(fd, stream)
            os.close(fd)
        sys.stdin = os.fdopen(0, closefd=False)


def main() -> None:
    serve(json.loads(sys.argv[1]))


def forked(settings: dict[str, Any], environment: dict[str, str], streams: Streams) -> None:
    """Serve in a fork of a process that is not ours alone."""
    own_process(environment, streams)
    if settings["tensor_parallel_size"] * settings["pipeline_parallel_size"] > 1:
        fork_ranks()
    serve(settings)


def fork_ranks() -> None:
    """Engine core and ranks are forks of this process. For a CPU vLLM insists on spawning them, and
    each then imports all of vLLM once more; everywhere else its default is a fork.

    Waiting for their next step they sleep. vLLM's ranks yield instead, over and over, and Linux
    6.18 with autogroups then runs nothing else: hubs and engines stood still for five seconds."""
    for name in ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor"):
        vars(importlib.import_module(name))["get_mp_context"] = _fork_context
    broadcast = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    vars(broadcast)["sched_yield"] = lambda: time.sleep(YIELD_S)


def _fork_context() -> Any:
    return multiprocessing.get_context("fork")


def own_process(environment: dict[str, str], streams: Streams) -> None:
    """Make a fork a process of its own: its session, environment and streams."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it was worked out for the environment of before
    streams.take()
    # What a killed engine leaves is its own tracker's to clear away, not the fork server's.
    resource_tracker._resource_tracker._fd = None
    # vLLM collects garbage several times while it starts; what the fork server imported is none.
    gc.freeze()
    if environment.get("TORCH_COMPILE_DISABLE") == "1":  # which torch read when it was imported
        importlib.import_module("torch._dynamo.config").disable = True
    # vLLM looks at a model's class in a process of its own, lest CUDA begin in this one: that
    # imports all of vLLM again, once for each kind of model that its cache does not know.
    registry = importlib.import_module("vllm.model_executor.models.registry")
    vars(registry)["_run_in_subprocess"] = lambda look: look()


def serve(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")

    threads = settings.pop("torch_threads", 0)
    if threads:
        import torch

        torch.set_num_threads(threads)
    from vllm import LLM

    try:
        engine = LLM(**settings, disable_log_stats=False)
    except Exception as error:
        answer(id=-1, error=f"{type(error).__name__}: {error}")
        raise
    answer(id=-1, ready=True)
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    Driver(engine).run(commands, answer)
    engine.llm_engine.engine_core.shutdown()


def _listen(commands: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put({"id": 0, "do": "quit"})


class Driver:
    """Runs calls one after another; each is stepped until it is done."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine.llm_engine
        self._count = 0
        self._preempted: set[str] = set()
        self._originals: dict[str, Any] = {}

    def run(self, commands: queue.Queue[dict[str, Any]], answer: Any) -> None:
        while True:
            command = commands.get()
            if command["do"] == "quit":
                return
            try:
                answer(id=command["id"], **getattr(self, f"_{command['do']}")(command))
            except Exception as error:
                answer(id=command["id"], error=f"{type(error).__name__}: {error}")
                raise

    def _add(
        self,
        prompt: list[int] | dict[str, Any],
        tokens: int,
        logprobs: int,
        transfer: dict[str, Any] | None = None,
        *,
        salt: str | None = None,
        priority: int = 0,
        lora: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> str:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        name = f"r{self._count}"
        if transfer is not None:
            sampling["extra_args"] = {"kv_transfer_params": transfer}
        chosen = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, **sampling}
        if chosen.get("n", 1) > 1:
            chosen["output_kind"] = RequestOutputKind.FINAL_ONLY
        params = SamplingParams(max_tokens=tokens, logprobs=logprobs, **chosen)
        whole: dict[str, Any] = {"prompt_token_ids": prompt}
        if isinstance(prompt, dict) and "image" in prompt:
            image = _image(prompt["image"], prompt["pixels"])
            whole = {"prompt_token_ids": prompt["ids"], "multi_modal_data": {"image": image}}
        elif isinstance(prompt, dict):
            whole = {"prompt_embeds": _embeds(**prompt)}
        if salt is not None:
            whole["cache_salt"] = salt
        adapter = LoRARequest(**lora) if lora is not None else None
        self._engine.add_request(name, whole, params, lora_request=adapter, priority=priority)
        return name

    def _generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Each prompt is added at its delay; its times count from there."""
        prompts = command["prompts"]
        began = time.monotonic()
        waiting = list(enumerate(command["delays"] or [0.0] * len(prompts)))
        added: dict[str, tuple[int, float]] = {}
        done: dict[str, Any] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        while len(done) < len(prompts):
            now = time.monotonic()
            for at, delay in [item for item in waiting if item[1] <= now - began]:
                waiting.remove((at, delay))
                name = self._add(
                    prompts[at], command["tokens"], command["logprobs"], **command["sampling"]
                )
                added[name] = (at, now)
            for output in self._step():
                name = output.request_id
                passed = time.monotonic() - added[name][1]
                first.setdefault(name, passed)
                if output.finished:
                    done[name], last[name] = output, passed
        names = sorted(added, key=lambda name: added[name][0])
        return {"outputs": [_shown(done[n], first[n], last[n]) for n in names]}

    def _free_blocks(self, command: dict[str, Any]) -> dict[str, Any]:
        """Of the engine's KV cache, in this process."""
        return {"blocks": self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()}

    def _abort(self, command: dict[str, Any]) -> dict[str, Any]:
        name = self._add(command["prompt"], command["tokens"], 0)
        end = time.monotonic() + command["after_s"]
        while time.monotonic() < end:
            self._step()
        self._engine.abort_request([name])
        while self._engine.has_unfinished_requests():
            self._step()
        return {"done": True}

    def _abort_in(self, command: dict[str, Any]) -> dict[str, Any]:
        """Step until the request is in a phase of its life, and abort it there."""
        name = self._add(command["prompt"], command["tokens"], 0)
        self._step_until(name, command["phase"])
        self._engine.abort_request([name])
        self._drain()
        return {"free": self._free()}

    def _cut(self, command: dict[str, Any]) -> dict[str, Any]:
        """Generate, and cut the first prompt once `computed` tokens of it are, or are about to be:
        it is aborted between two steps, or this process gets a signal when `layer` is done."""
        names = [
            self._add(prompt, command["tokens"], 0, **command["sampling"])
            for prompt in command["prompts"]
        ]
        victim, at, signal_number = names[0], 0.0, command["signal"]
        if signal_number:
            self._signal_in(victim, command)
        while self._engine.has_unfinished_requests():
            if not (signal_number or at) and self._computed(victim) >= command["computed"]:
                self._stand_still(command["hold_s"])
                at = time.monotonic()
                self._engine.abort_request([victim])
            self._step()
        self._drain()
        return {"at": at, "free": self._free()}

    def _stand_still(self, hold_s: float, pushes: int = 0) -> None:
        """The engine's own thread does, until no more than so many pushes are under way, and for
        `hold_s` from there."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        rank, deadline = get_kv_transfer_group()._worker._rank, time.monotonic() + PHASE_S
        while rank.queued > pushes:
            assert time.monotonic() < deadline, "pushes do not end"
            time.sleep(0.001)
        time.sleep(hold_s)

    def _hamper(self, command: dict[str, Any]) -> dict[str, Any]:
        """Hold each call of a push to the hub back by the next of `delays`, over and over; with
        `unpinned`, let go of the pages that pushes read, for a control."""
        from kvclient import AsyncNamespace, Reservation

        delays = itertools.cycle(command["delays"])

        def late(call: Any) -> Any:
            async def delayed(*args: Any, **kwargs: Any) -> Any:
                await asyncio.sleep(next(delays))
                return await call(*args, **kwargs)

            return delayed

        for owner, name in ((AsyncNamespace, "reserve"), (Reservation, "commit")):
            original = self._originals.setdefault(name, getattr(owner, name))
            setattr(owner, name, late(original))
        if command["unpinned"]:
            self._scheduler.connector._scheduler._saves._pins.bind(None)
        return {"done": True}

    def _computed(self, name: str) -> int:
        """Tokens of a request that are computed, while a step runs with those that it computes."""
        requests = self._scheduler.requests.values()
        found = [one for one in requests if one.request_id.startswith(f"{name}-")]
        return int(found[0].num_computed_tokens) if found else 0

    def _signal_in(self, name: str, command: dict[str, Any]) -> None:
        """In the step that has computed that many tokens of a request, after that layer's hook."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector, layer = get_kv_transfer_group(), command["layer"]
        hook = connector.save_kv_layer

        def save_kv_layer(layer_name: str, *args: Any, **kwargs: Any) -> None:
            hook(layer_name, *args, **kwargs)
            if f".{layer}." in layer_name and self._computed(name) >= command["computed"]:
                connector.save_kv_layer = hook
                self._stand_still(command["hold_s"], len(connector._worker._meta.saves))
                os.kill(os.getpid(), command["signal"])

        connector.save_kv_layer = save_kv_layer

    def _reload_in(self, command: dict[str, Any]) -> dict[str, Any]:
        """Step until the request is in that phase, reset every cache as a weight update does,
        load the weights of another checkpoint, and finish the request."""
        name = self._add(command["prompt"], command["tokens"], command["logprobs"])
        began = time.monotonic()
        self._step_until(name, command["phase"])
        refused = self._forget()
        (request,) = self._scheduler.requests.values()
        told = {"refused": refused, "old_tokens": request.num_output_tokens}
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": command["path"]})
        self._core.resume_scheduler()
        while True:
            for output in self._step():
                if output.finished:
                    now = time.monotonic() - began
                    return {"outputs": [_shown(output, now, now)], **told}

    def _sleep(self, command: dict[str, Any]) -> dict[str, Any]:
        """Sleep and wake up, with the weights of another checkpoint if one is named."""
        deadline = time.monotonic() + RESET_S
        refused = 0
        while True:
            try:
                self._engine.sleep(level=1)
                break
            except RuntimeError:  # pushes still pin pages
                refused += 1
                assert time.monotonic() < deadline, "pages stay pinned"
                self._engine.wake_up()
                self._step()
        self._engine.wake_up()
        if command["path"]:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": command["path"]})
        return {"refused": refused}

    def _forget(self) -> int:
        """Pause and reset all caches, requests that run are preempted; how often vLLM refused
        because a request was being loaded. The engine stays paused."""
        deadline = time.monotonic() + RESET_S
        refused = 0
        while True:
            self._core.pause_scheduler("keep", clear_cache=False)
            while self._scheduler.has_requests():  # pushes that pin pages
                assert time.monotonic() < deadline, "pages stay pinned"
                self._step()
            try:
                assert self._engine.reset_prefix_cache(True, reset_connector=True)
                return refused
            except RuntimeError:
                refused += 1
                assert time.monotonic() < deadline, "the load never ended"
                self._core.resume_scheduler()
                finished = [output for output in self._step() if output.finished]
                assert not finished, "the request ended before the reset"

    @property
    def _core(self) -> Any:
        """Of an engine that lives in this process."""
        return self._engine.engine_core.engine_core

    @property
    def _scheduler(self) -> Any:
        return self._core.scheduler

    def _step_until(self, name: str, phase: str) -> None:
        """`waiting`: for a lookup's answer; `loading`, `prefill` (a chunk is done), `decode`."""
        deadline = time.monotonic() + PHASE_S
        steps = 0
        while True:
            assert time.monotonic() < deadline, f"the request never was in {phase}"
            for request in self._scheduler.requests.values():
                status = request.status.name
                computed = request.num_computed_tokens
                if (
                    request.request_id.startswith(name)
                    and {
                        "waiting": status == "WAITING" and steps >= 3,
                        "loading": status == "WAITING_FOR_REMOTE_KVS",
                        "prefill": status == "RUNNING" and 0 < computed < request.num_prompt_tokens,
                        "decode": status == "RUNNING" and request.num_output_tokens >= 3,
                    }[phase]
                ):
                    return
            self._step()
            steps += 1

    def _drain(self) -> None:
        """Step until nothing is left to do or to report."""
        deadline = time.monotonic() + PHASE_S
        while self._engine.has_unfinished_requests() or self._scheduler.has_requests():
            assert time.monotonic() < deadline, "the engine never came to rest"
            self._step()

    def _free(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def _facts(self, command: dict[str, Any]) -> dict[str, Any]:
        """At rest: free blocks of the pool, and how many requests were ever preempted."""
        self._drain()
        return {"free": self._free(), "preempted": len(self._preempted)}

    def _reset(self, command: dict[str, Any]) -> dict[str, Any]:
        """An engine that lives in this process is stepped while it has work, as a server's is:
        without, pages of pushes that have ended stay pinned."""
        end, connector = time.monotonic() + SETTLE_S, command["connector"]
        here = hasattr(self._engine.engine_core, "engine_core")
        while here and self._scheduler.has_requests() and time.monotonic() < end:
            self._step()
        return {"done": self._engine.reset_prefix_cache(reset_connector=connector)}

    def _idle(self, command: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + command["seconds"]
        while time.monotonic() < end:
            self._step()
        return {"done": True}

    def _metrics(self, command: dict[str, Any]) -> dict[str, Any]:
        """vLLM's own registry: a counter's or gauge's value, a histogram's count, a vector's sum"""

        def shown(metric: Any) -> float:
            if hasattr(metric, "value"):
                return float(metric.value)
            return float(metric.count if hasattr(metric, "count") else sum(metric.values))

        values = {}
        for metric in self._engine.get_metrics():
            labels = {k: v for k, v in metric.labels.items() if k not in ("engine", "model_name")}
            name = ".".join([metric.name, *labels.values()])
            values[name] = shown(metric)
        return {"values": values}

    def _step(self) -> list[Any]:
        """One step; like a server's loop, a step without results yields to other threads."""
        outputs: list[Any] = self._engine.step()
        core = getattr(self._engine.engine_core, "engine_core", None)
        if core is not None:
            self._preempted.update(
                name for name, one in core.scheduler.requests.items() if one.num_preemptions
            )
        if not outputs:
            time.sleep(0.001)
        return outputs


def _embeds(seed: int, tokens: int, hidden: int) -> Any:
    """Prompt embeddings of random rows; equal seeds share their prefix."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden, generator=generator) * 0.1


def _image(seed: int, pixels: int) -> Any:
    """A square image of four fields of random colours."""
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(colours).resize((pixels, pixels), Image.Resampling.NEAREST)


def _shown(output: Any, first_s: float, last_s: float) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "others": [list(other.token_ids) for other in output.outputs[1:]],
        "logprobs": [
            {str(token): value.logprob for token, value in step.items()}
            for step in completion.logprobs or []
        ],
        "cached": output.num_cached_tokens or 0,
        "params": output.kv_transfer_params,
        "ttft_s": first_s,
        "total_s": last_s,
        "finish": str(completion.finish_reason),
    }


if __name__ == "__main__":
    main()
