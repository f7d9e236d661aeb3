"""What the engine has only enqueued is told when the card has done it, in order."""

from __future__ import annotations

import queue
import time
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvserver_vllm.marks import Marks

pytestmark = pytest.mark.gpu
CYCLES = 50_000_000  # some 30 ms of a card


def test_marks_come_when_the_card_has_come_so_far() -> None:
    told: queue.Queue[tuple[int, bool]] = queue.Queue()
    marks = Marks(torch.device("cuda:0"), lambda function, *args: function(*args))
    value = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    began = time.monotonic()
    ends = []
    for number in range(6):
        torch.cuda._sleep(CYCLES)
        value += 1
        ends.append(torch.cuda.Event())
        ends[-1].record()

        def done(_: float, number: int = number, end: Any = ends[-1]) -> None:
            told.put((number, end.query()))

        marks.after(done)
    enqueued = time.monotonic() - began
    torch.cuda.synchronize()
    ran = time.monotonic() - began
    assert enqueued < ran / 2, "setting a mark waits for nothing"
    assert [told.get(timeout=5) for _ in range(6)] == [(number, True) for number in range(6)]
    marks.close()


def test_another_stream_is_not_waited_for() -> None:
    told: queue.Queue[float] = queue.Queue()
    marks = Marks(torch.device("cuda:0"), lambda function, *args: function(*args))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10 * CYCLES)
        busy = torch.cuda.Event()
        busy.record()
    marks.after(told.put)
    told.get(timeout=5)
    assert not busy.query()
    torch.cuda.synchronize()
    marks.close()
