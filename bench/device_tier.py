"""The device tier's copies: GB/s up and down, with the host memory pinned and not.

    python -m bench.device_tier [--device cuda:N] [--seconds N] [--out FILE]

Method. One arena on the GPU, one area of host memory as large, one thread. A sample copies pieces
of one size, back to back, from or to changing places, 64 MiB in all. A round takes one sample of
each kind in turn: the arena's upload and download, and beside them `cudaMemcpyAsync` as CuPy has
it, on one stream that is waited for after each piece; what the arena adds is its bounds, its parts
and its Python. Rounds go on for the time given, half of it before the host memory is pinned and
half after, so that drift of the machine meets all kinds of a state alike. The figure is the median
of a kind's samples but the first, with the smallest and the largest beside it. Before, between and
after, everything that comes down is compared with what went up.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import machine
from kvproto.errors import FieldError
from kvserver.tiers.cuda import CudaDevice
from kvserver.tiers.errors import TierError

Bytes = npt.NDArray[np.uint8]
Copy = Callable[[int, Bytes], None]
MIB = 1 << 20
AREA = 256 * MIB
SAMPLE = 64 * MIB
PIECES = {"64 KiB": 64 << 10, "1 MiB": MIB, "16 MiB": 16 * MIB}


class Bare:
    """The same copies by CuPy alone."""

    def __init__(self, index: int) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._runtime.setDevice(index)
        self._memory = cupy.cuda.Memory(AREA)
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def upload(self, offset: int, source: Bytes) -> None:
        self._copy(self._memory.ptr + offset, source.ctypes.data, source.nbytes, 1)

    def download(self, offset: int, target: Bytes) -> None:
        self._copy(target.ctypes.data, self._memory.ptr + offset, target.nbytes, 2)

    def _copy(self, target: int, source: int, length: int, kind: int) -> None:
        self._runtime.memcpyAsync(target, source, length, kind, self._stream.ptr)
        self._stream.synchronize()


def sample(copy: Copy, host: Bytes, piece: int, begin: int) -> float:
    """GB/s of one sample; `begin` turns the places that are used."""
    places = AREA // piece
    began = time.perf_counter()
    for number in range(SAMPLE // piece):
        offset = (begin + number) % places * piece
        copy(offset, host[offset : offset + piece])
    return SAMPLE / (time.perf_counter() - began) / 1e9


def measure(
    kinds: dict[str, Copy], host: Bytes, *, state: str, seconds: float
) -> list[dict[str, Any]]:
    taken: dict[tuple[str, str], list[float]] = {}
    deadline, turn = time.monotonic() + seconds, 0
    while turn < 3 or time.monotonic() < deadline:
        for name, piece in PIECES.items():
            for kind, copy in kinds.items():
                rate = sample(copy, host, piece, turn * (SAMPLE // piece))
                taken.setdefault((name, kind), []).append(rate)
        turn += 1
    return [
        {
            "host": state,
            "piece": piece,
            "copy": kind,
            "gb_s": round(statistics.median(rates[1:]), 2),
            "least": round(min(rates[1:]), 2),
            "most": round(max(rates[1:]), 2),
            "samples": len(rates) - 1,
        }
        for (piece, kind), rates in taken.items()
    ]


def verify(device: CudaDevice, host: Bytes, seed: int) -> None:
    """What goes up comes down again."""
    wanted = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(AREA), np.uint8)
    host[:] = wanted
    device.upload(0, host)
    host[:] = 0
    device.download(0, host)
    if not np.array_equal(host, wanted):
        raise SystemExit("the bytes that came down are not those that went up")


def run(index: int, seconds: float) -> dict[str, Any]:
    device = CudaDevice.open(index, AREA)
    try:
        bare = Bare(index)
        host: Bytes = np.frombuffer(mmap.mmap(-1, AREA), np.uint8)
        host[:] = 1
        kinds = {
            "upload": device.upload,
            "memcpy up": bare.upload,
            "download": device.download,
            "memcpy down": bare.download,
        }
        verify(device, host, 1)
        rows = measure(kinds, host, state="pageable", seconds=seconds / 2)
        began = time.monotonic()
        pinned = device.pin(host, 0, AREA)
        pin_s = time.monotonic() - began
        if pinned != AREA:
            raise SystemExit(f"only {pinned} of {AREA} bytes are pinned")
        verify(device, host, 2)
        rows += measure(kinds, host, state="pinned", seconds=seconds / 2)
        verify(device, host, 3)
        began = time.monotonic()
    finally:
        device.close()
    return {
        "machine": {**machine.facts(), "gpu": device.name},
        "pin_gb_s": round(AREA / pin_s / 1e9, 2),
        "close_ms": round((time.monotonic() - began) * 1e3, 2),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="the GPU, default cuda:0")
    parser.add_argument("--seconds", type=float, default=20.0, help="in all, default 20")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args(arguments)
    try:
        result = run(int(options.device.partition(":")[2] or 0), options.seconds)
    except (TierError, FieldError) as error:
        print(f"device_tier: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
