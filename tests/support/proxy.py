"""A `kvserver pd-proxy` process for tests with real engines."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.kv_oracle import wait_for
from tests.support.server import free_port


class ProxyProcess:
    """Runs from its construction to `close`."""

    def __init__(
        self, prefill: Sequence[str], decode: Sequence[str], *options: str, log_path: Path
    ) -> None:
        port = free_port()
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        words = [f"--listen=127.0.0.1:{port}", "--log-level=debug", *options]
        words += ["--prefill", *prefill, "--decode", *decode]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvserver", "pd-proxy", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(f"the proxy ({log_path})", lambda: b'"ready"' in log_path.read_bytes())

    def metrics(self) -> dict[str, float]:
        """`name{labels}` -> value."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def legs(self, leg: str, outcome: str) -> int:
        """Legs to all engines that ended so."""
        wanted = (f'leg="{leg}"', f'outcome="{outcome}"')
        return int(
            sum(
                value
                for name, value in self.metrics().items()
                if name.startswith("kvserver_proxy_legs_total") and all(w in name for w in wanted)
            )
        )

    def close(self) -> int:
        """End it, and its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(45)
        finally:
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
