"""The transports that the tests with real engines run over.

They take minutes each, so by default they run over shm alone, and `make test` goes the other ways
with `test_vllm_transports.py`. `make test-all` sets KVSERVER_TEST_WAYS=shm,tcp,nixl, and each
module whose tests take `way` runs once per name.
"""

from __future__ import annotations

import os

import pytest

from tests.support.ways import WAYS, Way

VARIABLE = "KVSERVER_TEST_WAYS"


def _chosen() -> list[str]:
    names = [name.strip() for name in os.environ.get(VARIABLE, "shm").split(",")]
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise pytest.UsageError(f"{VARIABLE}: {unknown[0]!r} is none of {', '.join(WAYS)}")
    return names


@pytest.fixture(scope="module", params=_chosen())
def way(request: pytest.FixtureRequest) -> Way:
    """Each chosen transport in turn."""
    way = WAYS[request.param]
    if way.missing:
        pytest.skip(way.missing)
    return way
