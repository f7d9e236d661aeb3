"""The nixl worker: a process that maps the arena, owns the agent, and hashes what arrived.

    main thread      orders of the hub, and `NixlAgent.step`, in turns
    wiring thread    answers UCX while connections are made, and does not step back as the others do
    checking thread  hashes what was read into slots while the rest still moves, and answers
    watching thread  ends the process when the hub is gone

Rules:
 1. It writes into slots, by the agent, and nowhere else in the arena. It knows no permits and no
    sessions: the hub has looked at those, and at each slot, before it sends a Work; the worker
    looks at the slot's words again before each post and after the last.
 2. It holds the lock of the arena's directory, as the hub does: a later epoch is proof for clients
    that this process, too, can write no more (`kvclient.transfer.ring`).
 3. It ends at once with the hub, however that ends, even while it is stopped itself: nobody could
    tell it to let go.
 4. An ENDED is sent after the last access to the slots (`messages`), so after the last hash.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np

from kvproto.frames import Place
from kvproto.nixlib import Agent, NixlError
from kvserver.tiers import syscalls
from kvserver.transfer.nixl.agent import Job, Mover, NixlAgent, Stuck
from kvserver.transfer.nixl.messages import (
    SETUP_BYTES,
    Attach,
    Attached,
    End,
    Ended,
    Frames,
    Kind,
    frame,
    number_of,
)
from kvserver.transfer.nixl.work import Work
from kvserver.transfer.priority import step_back
from kvserver.transfer.slots import Slots

CLOSE_S = 5.0  # for what runs when the hub closes
_RECEIVE_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told once. Durations in seconds."""

    hub: int  # its pid
    name: str  # of the agent
    arena_id: str  # hexadecimal
    epoch: int
    file_bytes: int
    backend: str
    params: dict[str, str]
    stuck_s: float
    nice: int = 0

    def encode(self) -> bytes:
        raw = json.dumps(asdict(self)).encode()
        assert len(raw) <= SETUP_BYTES, len(raw)
        return raw.ljust(SETUP_BYTES)


def make_agent(setup: Setup) -> Mover:
    return Agent(setup.name, backend=setup.backend, params=setup.params, progress=False)


@dataclass(frozen=True, slots=True)
class _Checked:
    """A Work's items that arrived, or, without any, that the Work has ended."""

    work: Work
    job: Job
    items: list[int]
    wrong: list[int]  # shared by all of one Work


class Worker:
    """`run` returns after a CLOSE, or when there is nothing to be run."""

    def __init__(
        self,
        end: socket.socket,
        *,
        before_post: Callable[[], None] = lambda: None,
        make: Callable[[Setup], Mover] = make_agent,
    ) -> None:
        self._end = end
        self._before_post = before_post
        self._make = make
        self._agents = threading.Lock()  # held by who calls the agent
        self._wiring = threading.Event()
        self._sending = threading.Lock()
        self._checks: queue.SimpleQueue[_Checked | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._close_at: float | None = None

    def run(self) -> None:
        raw, fds, _, _ = socket.recv_fds(self._end, SETUP_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            return  # the hub has changed its mind
        setup = Setup(**json.loads(raw))
        arena_fd, _ = fds  # the other one is the lock: held until the process ends
        syscalls.end_with_parent(setup.hub)
        self._slots = Slots(
            arena_fd, setup.file_bytes, arena_id=bytes.fromhex(setup.arena_id), epoch=setup.epoch
        )
        os.close(arena_fd)
        threading.Thread(target=self._watch, name="nixl-watch", daemon=True).start()
        try:
            mover = self._make(setup)
            self._agent = NixlAgent(
                mover, np.frombuffer(self._slots.data, np.uint8), stuck_s=setup.stuck_s,
                note=self._note, before_post=self._before_post,
            )  # fmt: skip
        except NixlError as error:
            self._send(Kind.REFUSED, str(error).encode())
            return
        threading.Thread(target=self._wire, name="nixl-wire", daemon=True).start()
        step_back(setup.nice)  # from here on: nobody waits longer for a hub that starts
        checking = threading.Thread(target=self._check, name="nixl-check", daemon=True)
        checking.start()
        self._send(Kind.READY)
        try:
            self._serve()
        except Exception as error:
            self._fail(error)
        self._checks.put(None)
        checking.join()
        if not self._agent.in_flight:
            mover.close()

    # ---- the main thread -----------------------------------------------------------------------

    def _serve(self) -> None:
        frames, orders = Frames(), deque[tuple[Kind, bytes]]()
        moved = False
        while self._close_at is None or (
            self._agent.in_flight and time.monotonic() < self._close_at
        ):
            pause = 0.0 if moved or orders else self._agent.pause_s
            if select.select([self._end], [], [], pause)[0]:
                raw = self._end.recv(_RECEIVE_BYTES)
                if not raw:
                    os._exit(0)  # the hub is gone
                orders += frames.feed(raw)
            moved = bool(orders)
            with self._agents:
                if orders:  # one: the first Work is moved before the second is cut into posts
                    self._obey(*orders.popleft())
                moved |= self._agent.step()
                if self._agent.wiring is not None:
                    self._wiring.set()

    def _obey(self, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.MOVE:
                self._begin(Work.decode(payload))
            case Kind.STOP:
                if job := self._jobs.get(number_of(payload)):
                    job.stop()
            case Kind.ATTACH:
                told = Attach.decode(payload)
                reason = ""
                try:
                    self._agent.attach(told.client, told.metadata, told.prefix)
                except NixlError as error:
                    reason = str(error)
                self._send(Kind.ATTACHED, Attached(told.ask, reason).encode())
            case Kind.DETACH:
                try:
                    self._agent.detach(number_of(payload))
                except NixlError as error:
                    self._note("nixl_detach", str(error))
            case Kind.PING:
                self._send(Kind.PONG, payload)
            case Kind.CLOSE:
                self._close_at = time.monotonic() + CLOSE_S
                self._agent.close()
            case _:
                raise AssertionError(kind)

    def _begin(self, work: Work) -> None:
        places = work.places()
        wrong: list[int] = []

        def current(item: int) -> bool:
            return self._holds(work, places[item])

        def arrived(items: list[int]) -> None:
            if work.read:
                self._checks.put(_Checked(work, job, items, wrong))

        def ended(job: Job) -> None:
            self._jobs.pop(work.number, None)
            if work.read:
                self._checks.put(_Checked(work, job, [], wrong))
            else:
                self._answer(work, job)

        for place in places:
            assert self._slots.within(place), place
            self._slots.map_in(place)
        job = Job(
            client=work.client,
            read=work.read,
            memory=work.memory,
            posts=work.posts(self._agent.base),
            outcomes=np.zeros(work.slots, np.uint8),
            current=current,
            ended=ended,
            arrived=arrived,
        )
        self._jobs[work.number] = job
        self._agent.submit(job)

    def _holds(self, work: Work, place: Place) -> bool:
        slots = self._slots
        return slots.reserved(place) if work.read else slots.current(place)

    # ---- the wiring thread ---------------------------------------------------------------------

    def _wire(self) -> None:
        try:
            while self._wiring.wait():
                with self._agents:
                    self._agent.wire()
                    pause = self._agent.wiring
                if pause is None:
                    self._wiring.clear()
                else:
                    time.sleep(pause)
        except Exception as error:
            self._fail(error)

    # ---- the checking thread -------------------------------------------------------------------

    def _check(self) -> None:
        try:
            self._check_all()
        except Exception as error:
            self._fail(error)

    def _check_all(self) -> None:
        data = np.frombuffer(self._slots.data, np.uint8)
        while (checked := self._checks.get()) is not None:
            work, job = checked.work, checked.job
            if checked.items:
                checked.wrong.extend(work.wrong(data, checked.items))
                continue
            places = work.places() if checked.wrong else []
            for item in checked.wrong:
                if job.outcomes[item] == Ended.OK:
                    held = self._holds(work, places[item])
                    job.outcomes[item] = Ended.CORRUPT if held else Ended.STALE
            self._answer(work, job)

    # ---- the hub -------------------------------------------------------------------------------

    def _answer(self, work: Work, job: Job) -> None:
        self._send(Kind.ENDED, End(work.number, self._agent.totals, job.outcomes).encode())

    def _note(self, event: str, reason: str) -> None:
        self._send(Kind.NOTE, json.dumps([event, reason]).encode())

    def _fail(self, error: Exception) -> NoReturn:
        """The end of this process is the end of whatever it moves (agent's rule 5)."""
        if isinstance(error, Stuck):
            self._note("nixl_stuck", str(error))
        else:
            traceback.print_exc()
            self._note("nixl_worker", f"internal error: {error!r}")
        os._exit(1)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        """From any thread. It waits for a hub that stands still, as everything here may."""
        try:
            with self._sending:
                self._end.sendall(frame(kind, payload))
        except OSError:  # the hub is gone
            os._exit(0)

    def _watch(self) -> None:
        """The main thread may be in a post that does not return."""
        poller = select.poll()
        poller.register(self._end, select.POLLRDHUP)
        poller.poll()
        os._exit(0)


def serve(fd: int, *, before_post: Callable[[], None], make: Callable[[Setup], Mover]) -> None:
    """All of a worker's process, over the socket that it inherited."""
    # A signal to the whole group is for the hub, which still has transfers to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=fd) as end:
        end.set_inheritable(False)
        Worker(end, before_post=before_post, make=make).run()
