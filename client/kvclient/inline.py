"""Small pushes and pulls over shm, done by the thread that asks for them.

A synchronous client posts to its loop's thread and waits. For a block or two those two wake-ups,
and what an event loop does in between, take as long as the copy. Here the same coroutines
(`kvclient.pushing`, `kvclient.reading`) are driven by hand, over a socket for calls
(`kvproto.calls`) that blocks: nothing that they await ever waits, so they end in one step.

Rules:
 1. For speed only. Who finds this in use by another thread, is larger than BYTES_MAX, or finds no
    mapped arena and no socket, goes by the loop, which can do all of it.
 2. What a session is told, only the loop decides. So a call that is refused is made once more
    there: refused, it has changed nothing, and is refused again.
 3. A call that gets no answer is cancelled, and its socket closed. Another one is opened after
    RETRY_S at the earliest.
 4. Work that outlives its caller (an abort after a failure) is the loop's.
 5. `close` returns when nothing is copied here any more.
 6. Who waits here does so awake for a moment (`kvclient.lookout`), where cores are free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kvclient import single
from kvclient.copying import HERE_BYTES_MAX, Copier, Piece
from kvclient.errors import KVError, Unavailable
from kvclient.leases import Leases
from kvclient.line import Line
from kvclient.namespace import AsyncNamespace
from kvclient.runner import Runner
from kvclient.session import Link, Make, Message, Session
from kvclient.spares import Spares
from kvclient.streams import Stream
from kvclient.timing import Deadline
from kvclient.transfer.direct import Pin
from kvproto import calls
from kvproto.namespace import NamespaceSpec

if TYPE_CHECKING:
    from kvclient.aio import AsyncClient
    from kvclient.checks import Arrays
    from kvclient.results import PullResult, PushResult

BYTES_MAX = HERE_BYTES_MAX
RETRY_S = 1.0
Result = TypeVar("Result")


class Inline:
    """What a synchronous client does on its callers' threads. Stands in for the AsyncClient where
    its namespaces ask for session, copy threads and leases.
    """

    def __init__(self, client: AsyncClient, runner: Runner) -> None:
        self._client = client
        self._runner = runner
        self._using = threading.Lock()
        self._closed = False
        self._line: Line | None = None
        self._again_at = 0.0  # on the monotonic clock: no line is opened before
        self.session = _Session(self, client.session)
        self.copier = _Copies(client.copier)
        self.leases = _Leases(self, client.leases)
        self.buffers = client.buffers
        self.log = client.log
        self._spares = Spares(self)

    def namespace(self, spec: NamespaceSpec) -> Namespace:
        """The namespace as it is driven here."""
        return Namespace(self, spec)

    def run(
        self,
        namespace: AsyncNamespace,
        blocks: int,
        start: Callable[[AsyncNamespace], Coroutine[Any, Any, Result]],
    ) -> tuple[Result] | None:
        """What `start` gives, done here; None where rule 1 leaves it to the loop."""
        if blocks * namespace.grid.payload_bytes() > BYTES_MAX:
            return None
        return self._here(namespace, lambda line: (_drive(start(namespace)),))

    def push_ahead(
        self,
        namespace: Namespace,
        hashes: Sequence[bytes],
        arrays: Arrays,
        parents: Sequence[bytes] | None,
        deadline_s: float | None,
    ) -> PushResult | None:
        """A whole block, pushed into a slot that was reserved ahead; None where there is none."""
        push = self._spares.push
        return self._here(
            namespace, lambda line: push(namespace, line, hashes, arrays, parents, deadline_s)
        )

    def pull_one(
        self, namespace: Namespace, hashes: Sequence[bytes], out: Arrays, deadline_s: float | None
    ) -> PullResult | None:
        """A whole block, pulled; None where `kvclient.single` leaves it to an ordinary pull."""
        return self._here(
            namespace, lambda line: single.pull(self, namespace, line, hashes, out, deadline_s)
        )

    def close(self, seconds: float) -> None:
        """Calls under way raise Unavailable."""
        self._closed = True
        line = self._line
        if line is not None:
            line.hang_up()
        if self._using.acquire(timeout=seconds):
            self._drop()
            self._using.release()

    # ---- what a namespace asks its client for ----------------------------------------------

    def deadline(self, deadline_s: float | None, wait_s: float = 0.0) -> Deadline:
        return self._client.deadline(deadline_s, wait_s)

    def pin(self, blocks: Iterable[Any]) -> Pin:
        return self._client.pin(blocks)

    # ---- what runs of small pushes ask for (`kvclient.spares`) -----------------------------

    def look(self) -> None:
        """Have the session see whether its hub is still there."""
        self.post(self._client.session.look)

    @contextmanager
    def using(self) -> Iterator[bool]:
        """To be the one thread in here, if none is."""
        mine = self._using.acquire(blocking=False)
        try:
            yield mine and not self._closed
        finally:
            if mine:
                self._using.release()

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        """Have the loop do something, after a while."""
        self.post(self._runner.loop.call_later, seconds, act)

    # ---- inside ----------------------------------------------------------------------------

    def _here(self, namespace: AsyncNamespace, act: Callable[[Line], Result]) -> Result | None:
        """What `act` gives, done by this thread; None where another one is in here, or there is
        nothing to work with."""
        self._runner.check()
        if not self._using.acquire(blocking=False):
            return None
        try:
            if not self._ready(namespace) or self._line is None:
                return None
            return act(self._line)
        finally:
            self.session.leave()
            self._using.release()

    def _ready(self, namespace: AsyncNamespace) -> bool:
        """Whether there is a session, a namespace and a line to work with."""
        link = self._client.session.current
        if self._closed or link is None or namespace.id not in link.handles:
            return False
        line = self._line
        if line is None or line.link is not link or not line.usable:
            line = self._open(link)
        if line is None:
            return False
        self.session.enter(line)
        return True

    def _open(self, link: Link) -> Line | None:
        self._drop()
        if link.local is None or not link.transfer.mapped or time.monotonic() < self._again_at:
            return None
        self._again_at = time.monotonic() + RETRY_S
        with suppress(OSError, ValueError):  # also HandshakeError
            self._line = Line(link, link.local.path, self._client.session.options)
        if self._closed:  # it may not have seen this one
            self._drop()
        return self._line

    def _drop(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def bridge(self, work: Coroutine[Any, Any, Result], deadline: Deadline, what: str) -> Result:
        """`work` on the loop, and its result."""
        return self._runner.run(work, deadline.left(), what)

    def post(self, act: Callable[..., object], *arguments: object) -> None:
        """Have the loop do something that nobody here waits for."""
        with suppress(RuntimeError):  # the loop was closed: so is the client
            self._runner.loop.call_soon_threadsafe(act, *arguments)


def _drive(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that never has to wait."""
    try:
        work.send(None)
    except StopIteration as ended:
        return cast("Result", ended.value)
    work.close()
    raise AssertionError("a coroutine waited for a loop that it does not have")


class _Session:
    """What `Session` is to a push or a pull, while a thread is in here; the Session itself for
    what the loop does of them afterwards.
    """

    def __init__(self, inline: Inline, session: Session) -> None:
        self._inline = inline
        self._session = session
        self._thread = 0  # that is in here
        self._line: Line | None = None
        self.options = session.options
        self.address = session.address

    def enter(self, line: Line) -> None:
        self._line, self._thread = line, threading.get_ident()

    def leave(self) -> None:
        self._line, self._thread = None, 0

    @property
    def link(self) -> Link:
        return self._session.link

    async def ready(self, deadline: Deadline) -> Link:
        if (link := self._session.current) is not None:
            return link
        return self._inline.bridge(self._session.ready(deadline), deadline, "session")

    async def call(
        self, name: str, make: Make, deadline: Deadline, *, link: Link | None = None
    ) -> tuple[Link, Message]:
        if threading.get_ident() != self._thread:
            return await self._session.call(name, make, deadline, link=link)
        line = self._line
        if line is not None and line.link.lost is None and (link is None or link is line.link):
            request = await make(line.link)
            if line.takes(name, request) and line.send(name, request, deadline):
                reply = self._reply(line, name, deadline)
                if reply.status == calls.OK:
                    return line.link, line.message(name, reply)
        again = self._session.call(name, make, deadline, link=link)
        return self._inline.bridge(again, deadline, name)

    async def rpc(self, name: str, request: Message, deadline: Deadline) -> Message:
        asked = self._session.rpc(name, request, deadline)
        if threading.get_ident() != self._thread:
            return await asked
        return self._inline.bridge(asked, deadline, name)

    def _reply(self, line: Line, name: str, deadline: Deadline) -> calls.Reply:
        try:
            return line.receive(name, deadline)
        except Unavailable:
            self._inline.look()
            raise

    def stream(self, link: Link, name: str, request: Message) -> Stream:
        return _Stream(self._inline, self._session, self._line, link, name, request)

    def stream_failed(self, link: Link, error: KVError) -> KVError:
        async def told() -> KVError:
            return self._session.stream_failed(link, error)

        return self._inline.bridge(told(), Deadline(self.options.deadline_s), "session")

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        self._inline.post(self._session.background, work)


class _Stream:
    """A call with many replies: over the line, or read by the loop where that does not take it."""

    def __init__(
        self, inline: Inline, session: Session, line: Line | None, link: Link, name: str,
        request: Message,
    ) -> None:  # fmt: skip
        self._inline = inline
        self._name = name
        self._line: Line | None = None
        self._loops: Stream | None = None
        self._done = False
        within = Deadline(session.options.deadline_s)
        if line is not None and line.link is link and line.takes(name, request):
            self._line = line if line.send(name, request, within) else None
        if self._line is None:

            async def begin() -> Stream:
                return session.stream(link, name, request)

            self._loops = inline.bridge(begin(), within, name)

    def done(self) -> bool:
        return self._done if self._loops is None else self._loops.done()

    def cancel(self) -> None:
        if self._loops is not None:
            self._inline.post(self._loops.cancel)
        elif self._line is not None and not self._done:
            self._done = True
            self._line.give_up()

    async def read(self, deadline: Deadline | None = None) -> Message | None:
        assert deadline is not None, "every wait here has one"
        if self._loops is not None:
            return self._inline.bridge(self._loops.read(deadline), deadline, self._name)
        if self._done or self._line is None:
            return None
        try:
            reply = self._line.receive(self._name, deadline)
        except KVError:
            self._done = True
            raise
        self._done = reply.last
        return self._line.message(self._name, reply)


class _Copies:
    """This thread in the place of copy threads: so little it copies before they have woken."""

    def __init__(self, copier: Copier) -> None:
        self.split = copier.split

    async def run(
        self, task: Callable[[Piece], None], pieces: Sequence[list[Piece]], *, here: bool = False
    ) -> None:
        for part in pieces:
            for piece in part:
                task(piece)


class _Leases:
    """Leases go back with the next Acquire, or by the loop."""

    def __init__(self, inline: Inline, leases: Leases) -> None:
        self._inline = inline
        self._leases = leases
        self.take = leases.take

    def give_back(self, link: Link, lease: int, *, soon: bool = True) -> None:
        self._leases.leave(link, lease, self._inline.post)


class Namespace(AsyncNamespace):
    """Deadlines are those of each call: between them it copies at most BYTES_MAX."""

    overlaps = False

    def __init__(self, inline: Inline, spec: NamespaceSpec) -> None:
        super().__init__(cast("AsyncClient", inline), spec)
        self._inline = inline

    @asynccontextmanager
    async def within(self, deadline: Deadline, what: str) -> AsyncIterator[None]:
        yield
