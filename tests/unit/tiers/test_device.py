"""The device tier in process memory: real copies, and an end."""

from __future__ import annotations

import numpy as np
import pytest

from kvserver.tiers.device import DeviceArena, MemoryDevice
from kvserver.tiers.errors import TierError


def test_what_is_uploaded_is_downloaded() -> None:
    device: DeviceArena = MemoryDevice(1 << 20)
    assert (device.name, device.data_bytes) == ("memory", 1 << 20)
    source = np.arange(16384, dtype=np.uint32).view(np.uint8)
    device.upload(65536, source)
    expected = source.copy()
    source[:] = 0  # the copy has ended: the source is free
    target = np.zeros(65536, np.uint8)
    device.download(65536, target)
    assert np.array_equal(target, expected)
    target[:] = 0
    again = np.zeros(65536, np.uint8)
    device.download(65536, again)
    assert np.array_equal(again, expected)
    device.close()


def test_a_closed_device_fails_and_extents_are_checked() -> None:
    device = MemoryDevice(1 << 20)
    for offset in (-1, (1 << 20) - 4095):
        with pytest.raises(AssertionError):
            device.upload(offset, np.zeros(4096, np.uint8))
        with pytest.raises(AssertionError):
            device.download(offset, np.zeros(4096, np.uint8))
    device.close()
    with pytest.raises(TierError, match="closed"):
        device.download(0, np.zeros(4096, np.uint8))
