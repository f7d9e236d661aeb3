"""Pages that are gathered where they lie, against copies as they lie: the same bytes.

Here with tensors on the CPU; `tests/gpu/test_device_pages.py` has them on a card.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from kvproto.errors import FieldError
from kvserver_vllm import device
from kvserver_vllm.device import DevicePages
from kvserver_vllm.grouped import pages_of
from kvserver_vllm.layout import (
    CPU_ENCODING,
    LATENT_ENCODING,
    TOKEN_ENCODING,
    Bytes,
    HostPages,
)
from tests.support.kv_tensors import ORDERS, complaints, fill, kv_tensors


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("encoding", [CPU_ENCODING, TOKEN_ENCODING, LATENT_ENCODING, "other/1"])
@pytest.mark.parametrize("room_bytes", [1, 3000, 16 << 20])
def test_every_layout_and_encoding(order: str, encoding: str, room_bytes: int) -> None:
    if encoding == CPU_ENCODING and order.index("H") > order.index("N"):
        return  # refused by the encoding
    tensors = kv_tensors(order, 64, offset=24)
    fill(tensors)
    rng = np.random.default_rng(7)
    pages = partial(DevicePages, encoding, room_bytes=room_bytes)
    assert complaints(partial(HostPages, encoding), pages, tensors, rng) == []


@pytest.mark.parametrize("order", ORDERS)
def test_copies_that_several_threads_share(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever axis they are cut along."""
    threads: set[str] = set()

    def copyto(target: Bytes, source: Bytes) -> None:
        threads.add(threading.current_thread().name)
        target[...] = source

    monkeypatch.setattr(device, "SHARE_BYTES", 100)
    monkeypatch.setattr(device, "_lanes", {})
    monkeypatch.setattr(device, "sharing", lambda: 4)
    monkeypatch.setattr(device.np, "copyto", copyto)
    tensors = kv_tensors(order, 64)
    fill(tensors)
    rng = np.random.default_rng(10)
    read, write = partial(HostPages, TOKEN_ENCODING), partial(DevicePages, TOKEN_ENCODING)
    assert complaints(read, write, tensors, rng) == []
    assert 1 < len(threads) <= 4


def test_a_shared_copy_that_fails_is_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "sharing", lambda: 4)
    lane = device._Lane(torch.device("cpu"))
    source, target = np.ones((4, 1 << 20), np.uint8), np.zeros((4, 1 << 20), np.uint8)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        lane.copy(target, source)


@pytest.mark.parametrize(("offset", "content"), [(1, 8), (2, 7), (3, 5), (4, 6)])
def test_bytes_that_fit_no_wider_item(offset: int, content: int) -> None:
    tensors = kv_tensors("LBNHC", 32, dtype=torch.uint8, offset=offset, content=content, pad=offset)
    for tensor in tensors:
        tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))
    rng = np.random.default_rng(8)
    read, write = partial(HostPages, TOKEN_ENCODING), partial(DevicePages, TOKEN_ENCODING)
    assert complaints(read, write, tensors, rng) == []


def test_layers_in_storages_of_their_own() -> None:
    tensors = kv_tensors("LBHNC", 32)
    fill(tensors)
    apart = [tensors[0], tensors[1].clone(), tensors[2]]
    rng = np.random.default_rng(9)
    read, write = partial(HostPages, TOKEN_ENCODING), partial(DevicePages, TOKEN_ENCODING)
    assert complaints(read, write, apart, rng) == []


def test_where_pages_lie_is_told_alike() -> None:
    tensors = kv_tensors("LBHNC", 32, offset=8)
    host, card = HostPages(TOKEN_ENCODING, tensors), DevicePages(TOKEN_ENCODING, tensors)
    ids = [3, 2, 7]
    want, have = host.addresses(0, 3, ids), card.addresses(0, 3, ids)
    assert want is not None
    assert np.array_equal(want, have)
    (storage,) = card.memory
    assert storage.data_ptr() == host.memory[0].ctypes.data
    assert storage.numel() == host.memory[0].size


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    raw = torch.zeros(2 * 2 * 32 * 8)
    tensor = raw.as_strided((2, 2, 32, 8), (512, 256, 8, 1))
    raw.untyped_storage().resize_(4 * 512)
    with pytest.raises(FieldError, match=r"kv_cache\.stride"):
        DevicePages(TOKEN_ENCODING, [tensor])


def test_tensors_of_one_group_are_on_one_device() -> None:
    tensors = kv_tensors("LBHNC", 32)
    tensors[1] = torch.empty(tensors[1].shape, device="meta")
    with pytest.raises(FieldError, match="kv_caches"):
        pages_of(TOKEN_ENCODING, tensors)
