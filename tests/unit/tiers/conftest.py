"""Fixtures for tests of the tiers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A directory in shared memory, or on disk where the machine has none: the arena takes both."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="kvserver-test-", dir=root))
    yield path
    shutil.rmtree(path)
