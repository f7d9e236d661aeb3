"""Where the adapter's threads run.

vLLM's CPU build has OpenMP bind the threads of a rank's forward pass to cores
(VLLM_CPU_OMP_THREADS_BIND), and that binds the rank's own thread too. A thread may run where its
maker may: left alone, the adapter's copies would share the cores of the forward pass, and never
have those beside them that vLLM leaves free for a connector. Nothing of this is so on GPUs.

Rule: threads are given more room than their maker has only where vLLM has bound that, and then no
more than the process that started it has, of the NUMA nodes that it is bound to.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from kvserver_vllm.errors import ConfigError

CORES_A_THREAD, THREADS_MAX = 4, 4
NODES = Path("/sys/devices/system/node")
_KEY = "kv_connector_extra_config: cores"


def binds(config: Any) -> bool:
    """Whether vLLM binds the threads of this engine's forward passes to cores."""
    from vllm.platforms import current_platform

    by_itself = config.parallel_config.distributed_executor_backend == "mp"
    return bool(current_platform.is_cpu()) and by_itself


def cores_of(setting: str, *, bound: bool) -> frozenset[int] | None:
    """Cores for the adapter's threads, None: where their maker may run. To be called by that.
    `bound`: vLLM has bound it. ConfigError for a list that cannot be had."""
    if setting == "inherit":
        return None
    if setting != "auto":
        return _possible(setting)
    parent = multiprocessing.parent_process()
    if not bound or parent is None or parent.pid is None:
        return None
    mine = os.sched_getaffinity(0)
    try:
        wide = os.sched_getaffinity(parent.pid)
    except OSError:
        return None
    return frozenset(mine | (wide & _near(mine)))


def sharing(cores: Collection[int] | None = None) -> int:
    """Threads of this process that share a large copy or hash on these cores, by default those that
    the calling thread may run on: one for every four, and no more than four."""
    count = len(os.sched_getaffinity(0) if cores is None else cores)
    return min(max(1, count // CORES_A_THREAD), THREADS_MAX)


def parse_cores(text: str) -> frozenset[int]:
    """Numbers and ranges, as in `2,4-7`. ValueError for other text."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    if not found or min(found) < 0:
        raise ValueError(text)
    return frozenset(found)


def check_cores(setting: str) -> None:
    """ConfigError unless it has the form of a setting."""
    if setting not in ("auto", "inherit"):
        try:
            parse_cores(setting)
        except ValueError:
            raise ConfigError(
                f"{_KEY} is {setting!r}, must be auto, inherit or a list such as 2,4-7"
            ) from None


def _possible(setting: str) -> frozenset[int]:
    wanted, mine = parse_cores(setting), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        raise ConfigError(f"{_KEY} is {setting!r}: {error.strerror}") from error
    os.sched_setaffinity(0, mine)
    return wanted


def _near(cores: Iterable[int]) -> set[int]:
    """All cores of the NUMA nodes that these belong to; these alone where nothing is known."""
    wanted, found = set(cores), set(cores)
    for listed in NODES.glob("node[0-9]*/cpulist"):
        text = listed.read_text().strip()
        node = parse_cores(text) if text else frozenset()
        if wanted & node:
            found |= node
    return found
