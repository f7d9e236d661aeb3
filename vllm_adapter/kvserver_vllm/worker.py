"""The worker half: moves this rank's heads and layers between the engine's pages and the hub.

Rules:
  1. The engine's thread only enqueues: no call below waits for the hub or the device, or copies a
     page.
  2. All copies run on the link's thread (pushing.py, pulling.py).
  3. What the engine has only enqueued is done when its device has come so far (marks.py): layers
     are pushed after that, the step ends then, and loads begin when whatever may still use their
     pages is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.figures import Recorder
from kvserver_vllm.link import HubLink
from kvserver_vllm.marks import AtOnce, Marks
from kvserver_vllm.messages import LoadJob, RankReport, Section, StepMeta
from kvserver_vllm.pulling import Pulls
from kvserver_vllm.pushing import Pushes, Step
from kvserver_vllm.rank import Rank, RankSection


class WorkerHalf:
    """One per rank. Called on the engine's thread."""

    def __init__(
        self,
        settings: Settings,
        link: HubLink,
        log: EventLog,
        sections: Sequence[RankSection],
        *,
        stage: int,
        pushes: bool,
        group_tokens: Sequence[int],
        rank: int = 0,
        marks: Marks | AtOnce | None = None,
    ) -> None:
        """`pushes` is False on replicas; `group_tokens` are the tokens of a block of each of the
        engine's KV cache groups; `rank` is its number among all ranks of the engine; `marks` are
        those of its device (default: it computes on the host)."""
        self._marks = marks or AtOnce(link.post)
        self._rank = Rank(settings, link, log, sections, stage, tuple(group_tokens), rank)
        self._layer = {
            name: (at, layer)
            for at, section in enumerate(sections)
            for layer, name in enumerate(section.layers)
        }
        self._pushes = Pushes(self._rank, on=pushes)
        self._pulls = Pulls(self._rank)
        self._meta = StepMeta()
        self._greeted: tuple[Section, ...] = ()
        self._step: Step | None = None
        self._report_failed: dict[str, int] = {}
        self._invalid: set[int] = set()
        self._lost: set[str] = set()

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
        if meta.sections and meta.sections != self._greeted:
            self._greeted = meta.sections
            link.submit(link.greet([section.spec for section in meta.sections]))
        if not meta.saves:
            return
        step = self._step = Step([section.pages.layers for section in self._rank.sections])
        for job in meta.saves:
            if self._pushes.admit(job):
                link.submit(self._pushes.push(meta, job, step))

    def layer_saved(self, name: str) -> None:
        """vLLM's save_kv_layer: this layer of the step is in the engine's pages."""
        step, log = self._step, self._rank.log
        if step is None or not self._rank.settings.layerwise_push:
            return
        place = self._layer.get(name)
        if place is not None:
            section, layer = place
            self._marks.after(lambda _: step.layer_done(section, layer))
            if log.on:
                jobs = [job.job for job in self._meta.saves]
                log.write("save_layer", section=section, layer=layer, jobs=jobs)

    def step_saved(self) -> None:
        """vLLM's wait_for_save: whatever no layer hook took is ready now."""
        step, self._step = self._step, None
        if step is not None:
            pin_s = self._rank.settings.pin_ms / 1e3
            self._marks.after(lambda ended: step.finish(ended + pin_s))

    def start_loads(self) -> None:
        """vLLM's start_load_kv."""
        stagings = self._pulls.stagings
        for fetch in self._meta.fetches:
            self._rank.link.post(stagings.fetch, self._meta, fetch)
        meta = self._meta
        for job in meta.loads:
            self._pulls.expect(job)
            self._marks.after(partial(self._load, meta, job))
        for request in self._meta.drops:
            self._rank.link.post(stagings.drop, request)
        for request in self._meta.voids:
            self._rank.link.post(self._pulls.void, request)
        for request in self._meta.aborts:
            self._rank.link.post(self._pulls.abort, request)

    def _load(self, meta: StepMeta, job: LoadJob, _: float) -> None:
        """On the link's thread: nothing of the engine uses the job's pages any more."""
        self._rank.link.spawn(self._pulls.load(meta, job))

    def close(self) -> None:
        """No hook follows."""
        self._marks.close()

    def take_received(self) -> set[str]:
        """Requests whose load ended since the last call; fixes what the next two calls answer."""
        box = self._rank.outbox
        with box.lock:
            received, box.received = box.received, set()
            self._invalid, box.invalid = box.invalid, set()
            self._lost, box.lost = box.lost, set()
            self._report_failed, box.failed = box.failed, {}
        return received

    def take_lost(self) -> set[str]:
        """Those of them whose blocks vLLM must all do without."""
        lost, self._lost = self._lost, set()
        return lost

    def take_invalid(self) -> set[int]:
        """Engine blocks of those loads that did not arrive."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> RankReport | None:
        box = self._rank.outbox
        with box.lock:
            saved, box.saved = box.saved, {}
            given_up, box.given_up = box.given_up, []
            news, box.fetched = box.fetched, {}
        failed, self._report_failed = self._report_failed, {}
        fetched = {request: {self._rank.index: progress} for request, progress in news.items()}
        if not (saved or failed or fetched or given_up):
            return None
        return RankReport(saved, failed, fetched, given_up)
