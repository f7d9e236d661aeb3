"""The device tier in a whole hub: hot blocks out and back, its failure, and what is refused.

In process memory, which every machine has; tests/gpu/test_device_tier.py does it on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvclient.results import Tier
from kvserver.runtime import failpoints
from tests.support import device_tier as tier
from tests.support.device_tier import ServerThread
from tests.support.server import ServerError, start_server


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with tier.server_thread(device="memory") as server:
        yield server
    failpoints.disarm()


def test_hot_blocks_come_back_from_the_device(server: ServerThread) -> None:
    tier.comes_back_whole(server.address)
    assert tier.tier_of(tier.stats(server.address)).medium == "memory"


def test_a_bit_that_flips_on_the_device_is_a_miss(server: ServerThread) -> None:
    tier.wrong_bytes_are_dropped(server)


def test_a_device_that_fails_ends_its_tier_and_nothing_else(server: ServerThread) -> None:
    address = server.address
    tier.on_the_device(address)
    failpoints.arm("device.download=errno:EIO@3")
    assert np.count_nonzero(tier.pull(address, tier.HOT).found) < len(tier.HOT)
    tier.until(lambda: not tier.tier_of(tier.stats(address)).up, "the tier does not go down")
    assert "failpoint device.download" in tier.tier_of(tier.stats(address)).note
    tier.until(lambda: not tier.tier_of(tier.stats(address)).bytes_used, "slots stay")
    tier.push(address, tier.HOT)
    result = tier.pull(address, tier.HOT)
    assert result.found.all()
    assert set(result.tiers.tolist()) == {Tier.HOST}
    assert not tier.stats(address).counters["incidents"]


def test_nobody_gets_a_gpu_tier_that_is_none(tmp_path: Path) -> None:
    """`device_bytes` without a GPU, or without CuPy, and nobody asked for process memory."""
    why = re.compile(r"exited with 1 before ready:.*(device cuda|device_bytes is)", re.DOTALL)
    with pytest.raises(ServerError, match=why):
        start_server(tmp_path, device_bytes="900TiB")
