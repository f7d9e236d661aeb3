"""The worker half: moves this rank's heads and layers between the engine's pages and the hub.

Rules:
  1. The engine's thread only enqueues: no call below waits for the hub or copies a page.
  2. All copies run on the link's thread (pushing.py, pulling.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.figures import Recorder
from kvserver_vllm.layout import Pages
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import RankReport, StepMeta
from kvserver_vllm.pulling import Pulls
from kvserver_vllm.pushing import Pushes, Step
from kvserver_vllm.rank import Rank

logger = logging.getLogger("vllm.kvserver")


class WorkerHalf:
    """One per rank. Called on the engine's thread."""

    def __init__(
        self,
        settings: Settings,
        link: HubLink,
        log: EventLog,
        pages: Pages,
        layers: Sequence[str],
        *,
        stage: int,
        head_start: int,
        pushes: bool,
        rank: int = 0,
    ) -> None:
        """`layers` are this rank's layer names in order; `pushes` is False on replicas; `rank` is
        its number among all ranks of the engine."""
        self._rank = Rank(settings, link, log, pages, stage, head_start, rank)
        self._layer = {name: index for index, name in enumerate(layers)}
        self._pushes = Pushes(self._rank, on=pushes)
        self._pulls = Pulls(self._rank)
        self._meta = StepMeta()
        self._greeted = b""
        self._step: Step | None = None
        self._report_failed: dict[str, int] = {}
        self._invalid: set[int] = set()

    @property
    def counters(self) -> dict[str, int]:
        return self._rank.counters

    @property
    def figures(self) -> Recorder:
        return self._rank.figures

    def bind(self, meta: StepMeta) -> None:
        """A step begins: its pushes may reserve while the forward pass runs."""
        link = self._rank.link
        self._meta = meta
        self._step = None
        if meta.spec and meta.spec != self._greeted:
            self._greeted = meta.spec
            link.submit(link.greet(meta.spec))
        if not meta.saves:
            return
        step = self._step = Step(self._rank.pages.layers)
        for job in meta.saves:
            if self._pushes.admit(job):
                link.submit(self._pushes.push(meta, job, step))

    def layer_saved(self, name: str) -> None:
        """vLLM's save_kv_layer: this layer of the step is in the engine's pages."""
        step, log = self._step, self._rank.log
        if step is None or not self._rank.settings.layerwise_push:
            return
        layer = self._layer.get(name)
        if layer is not None:
            self._call_soon(step.layer_done, layer)
            if log.on:
                log.write("save_layer", layer=layer, jobs=[j.job for j in self._meta.saves])

    def step_saved(self) -> None:
        """vLLM's wait_for_save: whatever no layer hook took is ready now."""
        if self._step is not None:
            deadline = time.monotonic() + self._rank.settings.pin_ms / 1e3
            self._call_soon(self._step.finish, deadline)
            self._step = None

    def start_loads(self) -> None:
        """vLLM's start_load_kv."""
        stagings = self._pulls.stagings
        for fetch in self._meta.fetches:
            self._call_soon(stagings.fetch, self._meta, fetch)
        for job in self._meta.loads:
            self._pulls.expect(job)
            self._rank.link.submit(self._pulls.load(self._meta, job))
        for request in self._meta.drops:
            self._call_soon(stagings.drop, request)
        for request in self._meta.voids:
            self._call_soon(self._pulls.void, request)
        for request in self._meta.aborts:
            self._call_soon(self._pulls.abort, request)

    def take_received(self) -> set[str]:
        """Requests whose load ended since the last call; fixes what the next two calls answer."""
        box = self._rank.outbox
        with box.lock:
            received, box.received = box.received, set()
            self._invalid, box.invalid = box.invalid, set()
            self._report_failed, box.failed = box.failed, {}
        return received

    def take_invalid(self) -> set[int]:
        """Engine blocks of those loads that did not arrive."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> RankReport | None:
        box = self._rank.outbox
        with box.lock:
            saved, box.saved = box.saved, {}
            news, box.fetched = box.fetched, {}
        failed, self._report_failed = self._report_failed, {}
        fetched = {request: {self._rank.index: progress} for request, progress in news.items()}
        return RankReport(saved, failed, fetched) if saved or failed or fetched else None

    def _call_soon(self, function: Any, *args: Any) -> None:
        try:
            self._rank.link.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("kvserver: the link is closed")
