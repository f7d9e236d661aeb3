"""The adapter with a stopwatch around each call; lives in the engine, for `bench.engine_cost`.

KVSERVER_BENCH_CALLS names the directory that gets the records.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.calls import CALLS, CallLog
from kvserver_vllm.connector import KVServerConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig

_log: CallLog | None = None


def _the_log() -> CallLog:
    """Of this process."""
    global _log
    if _log is None:
        _log = CallLog(Path(os.environ["KVSERVER_BENCH_CALLS"]))
    return _log


class TimedConnector(KVServerConnector):
    """See the module."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _the_log()


def _timed(number: int, name: str) -> Callable[..., Any]:
    inner: Callable[..., Any] = getattr(KVServerConnector, name)
    wall, cpu = time.monotonic_ns, time.thread_time_ns

    def call(self: TimedConnector, *args: Any, **options: Any) -> Any:
        before, start = cpu(), wall()
        result = inner(self, *args, **options)
        stop = wall()
        _the_log().add(number, start, stop - start, cpu() - before)
        return result

    return call


for _number, _name in enumerate(CALLS):
    setattr(TimedConnector, _name, _timed(_number, _name))
