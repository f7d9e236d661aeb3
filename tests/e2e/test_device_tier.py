"""The device tier in a whole hub: hot blocks out and back, its failure, and what is refused.

In process memory, which every machine has; tests/gpu/test_device_tier.py does it on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support import device_tier as tier
from tests.support.server import ServerError, ServerProcess, start_server

Serve = Callable[..., ServerProcess]


def test_hot_blocks_come_back_from_the_device(serve: Serve) -> None:
    server = serve(**tier.OPTIONS, device="memory")
    tier.comes_back_whole(server.address)
    assert tier.tier_of(server.stats()).medium == "memory"
    assert server.wait_event("device_tier_ready")["device"] == "memory"


def test_a_bit_that_flips_on_the_device_is_a_miss() -> None:
    with tier.server_thread(device="memory") as server:
        tier.wrong_bytes_are_dropped(server)


def test_a_device_that_fails_ends_its_tier_and_nothing_else(serve: Serve) -> None:
    server = serve(**tier.OPTIONS, device="memory", failpoints="device.download=errno:EIO@3")
    tier.on_the_device(server.address)
    assert np.count_nonzero(tier.pull(server.address, tier.HOT).found) < len(tier.HOT)
    reason = server.wait_event("device_down")["reason"]
    assert "failpoint device.download" in reason
    tier.until(lambda: tier.tier_of(server.stats()).note == reason, "the tier does not go down")
    tier.until(lambda: tier.tier_of(server.stats()).bytes_used == 0, "slots stay")
    assert not tier.tier_of(server.stats()).up
    tier.push(server.address, tier.HOT)
    result = tier.pull(server.address, tier.HOT)
    assert result.found.all()
    assert set(result.tiers.tolist()) == {2}
    assert not server.stats().counters["incidents"]


def test_nobody_gets_a_gpu_tier_that_is_none(tmp_path: Path) -> None:
    """`device_bytes` without a GPU, or without CuPy, and nobody asked for process memory."""
    why = re.compile(r"exited with 1 before ready:.*(device cuda|device_bytes is)", re.DOTALL)
    with pytest.raises(ServerError, match=why):
        start_server(tmp_path, device_bytes="900TiB")
