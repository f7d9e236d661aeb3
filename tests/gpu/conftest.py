"""Tests that need a CUDA device; `make test` leaves them out."""

from __future__ import annotations

import contextlib
import warnings

import pytest

with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")  # vLLM's and torch's own are not ours to fail on
    import vllm.distributed.kv_transfer.kv_connector.v1.base  # noqa: F401


@pytest.fixture(autouse=True)
def _card() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
