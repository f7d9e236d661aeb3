"""Pages on a card, against copies as they lie of the same bytes in host memory."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from kvserver_vllm.device import DevicePages
from kvserver_vllm.layout import LATENT_ENCODING, TOKEN_ENCODING, HostPages
from tests.support.kv_tensors import ORDERS, complaints, fill, kv_tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("encoding", [TOKEN_ENCODING, LATENT_ENCODING, "other/1"])
@pytest.mark.parametrize("room_bytes", [3000, 16 << 20])
def test_every_layout_and_encoding(order: str, encoding: str, room_bytes: int) -> None:
    tensors = kv_tensors(order, 64, dtype=torch.bfloat16, offset=24, device="cuda")
    fill(tensors)
    torch.cuda.synchronize()
    rng = np.random.default_rng(7)
    pages = partial(DevicePages, encoding, room_bytes=room_bytes)
    assert complaints(partial(HostPages, encoding), pages, tensors, rng) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float16, torch.float32])
def test_whatever_the_numbers_are(dtype: torch.dtype) -> None:
    tensors = kv_tensors("LBNHC", 32, dtype=dtype, offset=2, content=7, device="cuda")
    fill(tensors)
    torch.cuda.synchronize()
    rng = np.random.default_rng(8)
    read, write = partial(HostPages, TOKEN_ENCODING), partial(DevicePages, TOKEN_ENCODING)
    assert complaints(read, write, tensors, rng) == []


def test_many_threads_take_turns() -> None:
    """Blocks larger than a room, from eight threads, some of which write."""
    tensors = kv_tensors("LBHNC", 64, blocks=64, content=512, device="cuda")
    fill(tensors)
    torch.cuda.synchronize()
    pages = DevicePages(TOKEN_ENCODING, tensors, room_bytes=1 << 16)
    shape = (3, pages.heads, 4 * 8, pages.format.page_bytes)
    failed: list[int] = []

    def work(number: int) -> None:
        ids = list(range(32 * number, 32 * number + 32))
        rng = np.random.default_rng(number)
        for _ in range(20):
            want, have = rng.integers(0, 256, shape, np.uint8), np.zeros(shape, np.uint8)
            pages.scatter(0, 3, ids, want)
            pages.gather(0, 3, ids, have)
            if not np.array_equal(want, have):
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert failed == []
