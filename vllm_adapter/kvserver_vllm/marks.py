"""When the engine's device has done what the engine has only enqueued.

vLLM calls the connector's hooks on the engine's thread, ahead of the device: a layer is in the
engine's pages once the device has come so far. A mark is an event in the engine's stream; a thread
waits for it, and then tells the link's.

Rules:
  1. Marks are told in the order in which they were set, on the link's thread.
  2. Setting one neither waits nor synchronizes. What waits holds no lock of the interpreter.
  3. Once closed, marks are dropped: nobody is left to be told.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger("vllm.kvserver")

Post = Callable[..., None]
Done = Callable[[float], object]
"""Called with the instant (time.monotonic) at which the device was done."""
_KEPT = 256
"""Events that are used again; so many layers and steps may be under way without making new ones."""


class Marks:
    """Of one device. `after` is called on the engine's thread."""

    def __init__(self, device: Any, post: Post) -> None:
        """`post(function, *args)` has the link's thread call it."""
        self._device = device
        self._post = post
        self._set: queue.SimpleQueue[tuple[Any, Done] | None] = queue.SimpleQueue()
        self._kept: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvserver-marks", daemon=True)
        self._thread.start()

    def after(self, done: Done) -> None:
        """Call it once the device has done all that is in the engine's stream now."""
        import torch

        try:
            event = self._kept.get_nowait()
        except queue.Empty:
            event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._set.put((event, done))

    def close(self) -> None:
        self._set.put(None)

    def _run(self) -> None:
        import torch

        torch.cuda.set_device(self._device)  # an event waited for on GPU 0 makes a context there
        while (mark := self._set.get()) is not None:
            event, done = mark
            try:
                event.synchronize()
            except Exception:  # the device is lost, and every copy will say so
                logger.exception("kvserver: the device failed")
            else:
                if self._kept.qsize() < _KEPT:
                    self._kept.put(event)
            self._post(done, time.monotonic())


class AtOnce:
    """Of an engine that computes on the host: when its thread calls a hook, it is done."""

    def __init__(self, post: Post) -> None:
        self._post = post

    def after(self, done: Done) -> None:
        self._post(done, time.monotonic())

    def close(self) -> None:
        """Nothing runs."""


def marks_of(devices: Iterable[Any], post: Post) -> Marks | AtOnce:
    """Of the device that an engine's KV tensors are on."""
    computing = [device for device in devices if device.type == "cuda"]
    return Marks(computing[0], post) if computing else AtOnce(post)
