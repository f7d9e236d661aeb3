"""vLLM's own OpenAI server as a process, with the connector.

    with VllmServer.launch(model, log_path=path, config=hub_config(address)) as engine:
        engine.wait_ready()
        ... engine.url ...

The model's directory needs a tokenizer (`tiny_models.write_tokenizer`). Each server is a fork of a
process that has imported vLLM, and its engine core a fork of the server; both end with the session.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import vllm_server_main
from tests.support.engine_main import Streams
from tests.support.engine_process import PRELOADED
from tests.support.engines import UNCOMPILED, EngineError
from tests.support.kv_oracle import wait_for
from tests.support.server import free_port

START_S = 240.0
END_S = 20.0
MODEL_NAME = "tiny"
SERVER = "vllm.entrypoints.launchers.api_server.entry"


class VllmServer:
    """One engine behind HTTP."""

    def __init__(self, process: ForkServerProcess, port: int, log_path: Path) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path

    @classmethod
    def launch(
        cls,
        model: Path,
        *,
        log_path: Path,
        config: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> Self:
        """Start without waiting. `config` is kv_transfer_config."""
        port = free_port()
        words = [
            f"--model={model}",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--served-model-name={MODEL_NAME}",
            "--enforce-eager",
            "--dtype=float32",
            "--block-size=32",
            "--max-model-len=1024",
            f"--kv-cache-memory-bytes={128 << 20}",
            "--no-enable-prefix-caching",
            "--enable-prompt-tokens-details",
            "--enable-log-requests",
            "--enable-auto-tool-choice",
            "--tool-call-parser=hermes",
            '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
            "--distributed-executor-backend=uni",
            *arguments,
        ]
        if config is not None:
            words.append(f"--kv-transfer-config={json.dumps(dict(config))}")
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **UNCOMPILED,
            # The worker lives within the engine core then, not beside it.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        variables.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule the cache's size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, SERVER])
        with log_path.open("a") as log, open(os.devnull) as nothing:
            streams = Streams(nothing.fileno(), log.fileno(), log.fileno())
            process = context.Process(
                target=vllm_server_main.forked, args=(words, variables, streams)
            )
            process.start()
        return cls(process, port, log_path)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._is_well():
                return
            status = self._process.exitcode
            if status is not None or time.monotonic() > deadline:
                what = f"exit status {status}" if status is not None else f"{timeout_s} s"
                end = self.log_path.read_bytes()[-6000:].decode(errors="replace")
                raise EngineError(f"{self.url} is not ready: {what}\n{end}")
            time.sleep(0.1)

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def wait_log(self, *words: str, timeout_s: float = 30.0) -> None:
        """Wait for a line of the log that has all these words."""

        def there() -> bool:
            lines = self.log_path.read_text(errors="replace").splitlines()
            return any(all(word in line for word in words) for line in lines)

        wait_for(f"a line with {words} in {self.log_path}", there, timeout_s)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Everything behind the HTTP server stands still: requests are taken and not answered."""
        behind = [pid for pid in _session(self.pid) if pid != self.pid]
        for pid in behind:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in behind:
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to all of it, and wait until its port is free: the engine core has inherited the
        listening socket, and as long as it dies, connections still come about."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.join(END_S)
        port = int(self.url.rpartition(":")[2])

        def is_free() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        wait_for(f"port {port} to be free", is_free)

    def close(self) -> None:
        """End the server and its engine core."""
        self._process.terminate()
        self._process.join(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join(END_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found.append(int(stat.parent.name))
    return found
