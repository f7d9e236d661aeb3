"""The nixl worker: a process that maps the arena, owns the agents, and hashes what arrived.

    main thread      orders of the hub: what there is to move goes into `Jobs`
    lanes            threads with an agent each, which move it, hash it and answer
    wiring thread    answers UCX while connections are made, and does not step back as the others do
    watching thread  ends the process when the hub is gone

Rules:
 1. It writes into slots, by its agents, and nowhere else in the arena. It knows no permits and no
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
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np

from kvproto.nixlib import Agent, NixlError
from kvserver.tiers import syscalls
from kvserver.transfer.nixl.agent import Mover, NixlAgent, Stuck
from kvserver.transfer.nixl.jobs import Job, Jobs
from kvserver.transfer.nixl.lane import Lane
from kvserver.transfer.nixl.messages import (
    SETUP_BYTES,
    Attach,
    Attached,
    End,
    Frames,
    Kind,
    Totals,
    frame,
    number_of,
)
from kvserver.transfer.nixl.work import Work
from kvserver.transfer.priority import step_back
from kvserver.transfer.slots import Slots

CLOSE_S = 5.0  # for what runs when the hub closes
SWITCH_S = 5e-4  # a lane that comes back from a post waits so long for Python at most
_RECEIVE_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told once. Durations in seconds."""

    hub: int  # its pid
    name: str  # of the first agent, and the beginning of the others'
    agents: int
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


def make_agent(setup: Setup, number: int) -> Mover:
    name = f"{setup.name}-{number}" if number else setup.name
    return Agent(name, backend=setup.backend, params=setup.params, progress=False)


class Worker:
    """`run` returns after a CLOSE, or when there is nothing to be run."""

    def __init__(
        self,
        end: socket.socket,
        *,
        before_post: Callable[[], None] = lambda: None,
        make: Callable[[Setup, int], Mover] = make_agent,
    ) -> None:
        self._end = end
        self._before_post = before_post
        self._make = make
        self._wiring = threading.Event()
        self._closing = False
        self._sending = threading.Lock()
        self._jobs = Jobs()
        self._begun: dict[int, Job] = {}  # by number of the Work
        self._lanes: list[Lane] = []

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
        self._data = np.frombuffer(self._slots.data, np.uint8)
        threading.Thread(target=self._watch, name="nixl-watch", daemon=True).start()
        try:
            movers = [self._make(setup, number) for number in range(setup.agents)]
            self._lanes = [self._lane(*one, setup.stuck_s) for one in enumerate(movers)]
        except NixlError as error:
            self._send(Kind.REFUSED, str(error).encode())
            return
        wirer = threading.Thread(target=self._wire, name="nixl-wire", daemon=True)
        wirer.start()
        step_back(setup.nice)  # from here on: nobody waits longer for a hub that starts
        sys.setswitchinterval(SWITCH_S)
        for lane in self._lanes:
            lane.start()
        self._send(Kind.READY)
        try:
            self._serve()
        except Exception as error:
            self._fail(error)
        self._closing = True
        self._jobs.close()
        self._wiring.set()
        limit = time.monotonic() + CLOSE_S
        wirer.join(CLOSE_S)
        ended = [lane.ended(max(0.0, limit - time.monotonic())) for lane in self._lanes]
        if wirer.is_alive() or not all(ended):
            os._exit(0)  # an interpreter that ends would unwind a thread through the library
        for mover in movers:
            mover.close()

    def _lane(self, number: int, mover: Mover, stuck_s: float) -> Lane:
        agent = NixlAgent(
            mover, self._data, self._jobs, number=number, stuck_s=stuck_s, note=self._note,
            before_post=self._before_post,
        )  # fmt: skip
        return Lane(number, agent, self._jobs, wiring=self._wiring, fail=self._fail)

    # ---- orders --------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Until the hub says CLOSE."""
        frames = Frames()
        while True:
            raw = self._end.recv(_RECEIVE_BYTES)
            if not raw:
                os._exit(0)  # the hub is gone
            for kind, payload in frames.feed(raw):
                if kind is Kind.CLOSE:
                    return
                self._obey(kind, payload)

    def _obey(self, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.MOVE:
                self._begin(Work.decode(payload))
            case Kind.STOP:
                if job := self._begun.get(number_of(payload)):
                    self._jobs.stop(job)
            case Kind.ATTACH:
                told = Attach.decode(payload)
                reason = ""
                try:
                    self._lanes[0].ask(lambda agent: agent.attach(told))
                    for number in self._jobs.admit(told):
                        self._lanes[number].ask(lambda agent: agent.join(told))
                except NixlError as error:
                    reason = str(error)
                self._send(Kind.ATTACHED, Attached(told.ask, reason).encode())
            case Kind.DETACH:
                try:
                    self._detach(number_of(payload))
                except NixlError as error:
                    self._note("nixl_detach", str(error))
            case Kind.PING:
                for lane in self._lanes:
                    lane.ask(lambda agent: None)
                self._send(Kind.PONG, payload)
            case _:
                raise AssertionError(kind)

    def _detach(self, client: int) -> None:
        self._jobs.forget(client)
        for lane in self._lanes:
            lane.ask(lambda agent: agent.detach(client))

    def _begin(self, work: Work) -> None:
        places = work.places()
        holds = self._slots.reserved if work.read else self._slots.current
        for place in places:
            assert self._slots.within(place), place
            self._slots.map_in(place)
        job = Job(
            client=work.client,
            read=work.read,
            memory=work.memory,
            posts=work.posts(int(self._data.ctypes.data)),
            outcomes=np.zeros(work.slots, np.uint8),
            current=lambda item: holds(places[item]),
            ended=lambda job: self._ended(work.number, job),
        )
        if work.read:
            job.wrong = lambda items: work.wrong(self._data, items)
        self._begun[work.number] = job
        self._jobs.submit(job)

    def _ended(self, number: int, job: Job) -> None:
        self._begun.pop(number, None)
        each = [lane.agent.totals for lane in self._lanes]
        totals = Totals(*map(sum, zip(*each, strict=True)))
        self._send(Kind.ENDED, End(number, totals, job.outcomes).encode())

    # ---- the wiring thread ---------------------------------------------------------------------

    def _wire(self) -> None:
        pause: float | None = None
        try:
            while not self._closing:
                self._wiring.wait(pause)
                self._wiring.clear()
                pauses = [lane.wire() for lane in self._lanes]
                pause = min((each for each in pauses if each is not None), default=None)
        except Exception as error:
            self._fail(error)

    # ---- the hub -------------------------------------------------------------------------------

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


def serve(fd: int, *, before_post: Callable[[], None], make: Callable[[Setup, int], Mover]) -> None:
    """All of a worker's process, over the socket that it inherited."""
    # A signal to the whole group is for the hub, which still has transfers to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=fd) as end:
        end.set_inheritable(False)
        Worker(end, before_post=before_post, make=make).run()
