"""A real kvserver process for tests.

    server = start_server(tmp_path=tmp_path, host_bytes="64MiB", disk_bytes="256MiB")
    ... server.address ...
    server.kill(); server.restart()

Every process listens on 127.0.0.1 with ports of its own, keeps its host directory under /dev/shm
and its disk directory under `tmp_path`, and is gone after `close` (or the `server` fixture). Times
out rather than hangs: each wait has a deadline, and on failure the server's log is in the error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from kvproto.v1 import kvserver_pb2, kvserver_pb2_grpc

START_DEADLINE_S = 45.0
SHM = Path("/dev/shm")


# Below the range that the kernel takes ports of outgoing connections from (32768 and up), so that
# none of them sits on a port between this answer and the server's bind, or while it is restarted.
PORTS = range(20_000, 32_000)
START_TRIES = 3
_from_here = itertools.chain(range(random.SystemRandom().choice(PORTS), PORTS.stop), PORTS)
_ports_lock = threading.Lock()


def free_port() -> int:
    """A port that nobody listens on now; this process is given it once. Another process may still
    come to the same one: who starts a server tries again with the next (`start_server`)."""
    with _ports_lock:
        for port in _from_here:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise ServerError(f"no port of {PORTS} is free")


class ServerError(AssertionError):
    """The server did not do what the test asked of it; carries the end of its log."""


class ServerProcess:
    """One server over its restarts: same ports, same directories."""

    def __init__(
        self,
        tmp_path: Path,
        options: dict[str, object],
        failpoints: str,
        runner: Sequence[str] = (),
    ) -> None:
        self.tmp_path = tmp_path
        self._runner = runner
        self.options = {
            "listen": f"127.0.0.1:{free_port()}",
            "metrics_listen": f"127.0.0.1:{free_port()}",
            "tcp_listen": "",  # a test that wants one asks for 127.0.0.1:0, and reads `ready`
            "host_bytes": "64MiB",
            **options,
        }
        self._owns_host_dir = "host_dir" not in self.options
        if self._owns_host_dir:
            self.options["host_dir"] = tempfile.mkdtemp(prefix="kvserver-test-", dir=SHM)
        if self.options.get("disk_bytes"):
            self.options.setdefault("disk_path", str(tmp_path / "disk"))
        self.host_dir = Path(str(self.options["host_dir"]))
        self.address = str(self.options["listen"])
        self.metrics_address = str(self.options["metrics_listen"])
        self.log_path = tmp_path / f"server-{self.address.rpartition(':')[2]}.log"
        self.log_path.touch()
        self.failpoints = failpoints
        self.credentials: Any = None  # of a channel to a server with TLS
        self.certificates: Any = None
        self.ready: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None

    # ---- life ----------------------------------------------------------------------------

    def command(self) -> list[str]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        return [*self._runner, sys.executable, "-m", "kvserver", "serve", *flags]

    def start(self, *, wait: bool = True) -> Self:
        """Start the process and wait for its ready line."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSERVER_")}
        if self.failpoints:
            environment["KVSERVER_FAILPOINTS"] = self.failpoints
        seen = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        if wait:
            self.wait_ready(seen)
        return self

    def wait_ready(self, log_offset: int = 0, timeout: float = START_DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self.events(log_offset):
                if line.get("event") == "ready":
                    self.ready = line
                    return
            if self.exit_code() is not None:
                raise ServerError(f"exited with {self.exit_code()} before ready:\n{self.log()}")
            time.sleep(0.02)
        raise ServerError(f"not ready after {timeout} s:\n{self.log()}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def wait_exit(self, timeout: float = 20.0) -> int:
        """The exit status; minus the signal's number when one ended it."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerError(f"still running after {timeout} s:\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_exit()

    def terminate(self, timeout: float = 20.0) -> int:
        """SIGTERM; the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait_exit(timeout)

    @property
    def nixl_worker(self) -> int | None:
        """Its pid; None where there is none."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            for pid in map(int, (task / "children").read_text().split()):
                with contextlib.suppress(OSError):  # it has just ended
                    if b"kvserver.nixl_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return pid
        return None

    def stop_signal(self) -> None:
        """SIGSTOP to the server and its nixl worker: as a whole, it moves nothing from now on."""
        os.kill(self.pid, signal.SIGSTOP)
        if (worker := self.nixl_worker) is not None:
            os.kill(worker, signal.SIGSTOP)

    def cont(self) -> None:
        if (worker := self.nixl_worker) is not None:
            os.kill(worker, signal.SIGCONT)
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, failpoints: str = "", **options: object) -> Self:
        """Start again in the same place, after ending what still runs; options may change."""
        if self._process is not None and self.exit_code() is None:
            self.terminate()
        self.failpoints = failpoints
        self.options.update(options)
        return self.start()

    def close(self) -> None:
        if self._process is not None and self.exit_code() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)
        if self._owns_host_dir:
            shutil.rmtree(self.host_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what it says ----------------------------------------------------------------------

    def log(self, last_bytes: int = 8_000) -> str:
        return self.log_path.read_bytes()[-last_bytes:].decode(errors="replace")

    def events(self, offset: int = 0) -> list[dict[str, Any]]:
        """The log lines that are JSON, from byte `offset` of the log on."""
        raw = self.log_path.read_bytes()[offset:]
        whole = raw[: raw.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

    def wait_event(self, name: str, timeout: float = 10.0, **fields: object) -> dict[str, Any]:
        """The first log line of this name with these fields."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self.events():
                if line["event"] == name and all(line.get(k) == v for k, v in fields.items()):
                    return line
            time.sleep(0.02)
        raise ServerError(f"no event {name} {fields} within {timeout} s:\n{self.log()}")

    def _channel(self) -> Any:
        if self.credentials is None:
            return grpc.insecure_channel(self.address)
        return grpc.secure_channel(self.address, self.credentials)

    def stats(self) -> kvserver_pb2.StatsReply:
        with self._channel() as channel:
            admin = kvserver_pb2_grpc.AdminStub(channel)
            return admin.Stats(kvserver_pb2.StatsRequest(), timeout=10, wait_for_ready=True)


def start_server(
    tmp_path: Path,
    *,
    failpoints: str = "",
    wait: bool = True,
    runner: Sequence[str] = (),
    **options: object,
) -> ServerProcess:
    """A running server. `options` are those of `kvserver serve`, with underscores; `runner` stands
    before its command and runs it in its own process.

    Where a port that was chosen here is taken meanwhile, it is started on others.
    """
    for left in reversed(range(START_TRIES)):
        server = ServerProcess(tmp_path, options, failpoints, runner)
        try:
            return server.start(wait=wait)
        except BaseException as error:
            server.close()
            chosen = {"listen", "metrics_listen"} - set(options)
            if not left or not any(f"{name}: " in str(error) for name in chosen):
                raise
            if not isinstance(error, ServerError) or "in use" not in str(error):
                raise
    raise AssertionError("unreachable")
