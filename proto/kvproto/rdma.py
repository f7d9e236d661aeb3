"""Whether this machine has RDMA devices: InfiniBand, RoCE and EFA adapters show in one place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

DEVICES = Path("/sys/class/infiniband")


def rdma_devices(devices: Path = DEVICES) -> list[str]:
    """Names such as mlx5_0, ascending; empty where there is none or they cannot be seen."""
    with suppress(OSError):
        return sorted(path.name for path in devices.iterdir())
    return []
