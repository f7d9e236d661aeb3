"""Fixtures for tests of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.server import ServerProcess, start_server

# A machine that is busy for a moment is not a defect; pytest's timeout ends what hangs.
settings.register_profile("kvserver", deadline=None)
settings.load_profile("kvserver")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers (`serve(host_bytes="64MiB", ...)`) that end with the test."""
    servers: list[ServerProcess] = []

    def start(**options: Any) -> ServerProcess:
        servers.append(start_server(tmp_path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with 64 MiB of host memory and 256 MiB of disk."""
    return serve(disk_bytes="256MiB")
