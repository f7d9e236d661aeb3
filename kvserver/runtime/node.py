"""One running hub, as the service sees it: what needs the core and something of the shell together.

Rule 1: a namespace is written down (arena, journal) before its handle is given out.
Rule 2: a session lives here exactly as long as the core knows it (`sweep`).
Rule 3: a session opens namespaces of its own tenant only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from kvproto.namespace import NamespaceSpec
from kvserver.core import events, instructions
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.device import DeviceTier
from kvserver.runtime.disk import DiskTier
from kvserver.runtime.driver import Driver
from kvserver.runtime.moves import Moves
from kvserver.runtime.namespaces import Namespaces
from kvserver.runtime.sessions import Session, Sessions
from kvserver.runtime.watches import Watches
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.permits import Permits
from kvserver.transfer.shm import ShmServer
from kvserver.transfer.tcp.endpoint import TcpEndpoint

SWEEP_S = 2.0
NEAR_MISSES_MAX = 16  # told of one namespace


class Node:
    """See the module's rules. All methods run on the loop's thread."""

    def __init__(
        self,
        driver: Driver,
        *,
        host: HostArena,
        disk: DiskTier | None,
        device: DeviceTier | None,
        shm: ShmServer,
        permits: Permits,
        tcp: TcpEndpoint | None,
        liveness: Liveness,
        namespaces: Namespaces,
        dropped: Mapping[str, int],
        watches: Watches,
        report: Callable[[str, BaseException], object],
        log: logging.Logger,
    ) -> None:
        self.driver = driver
        self.sessions = Sessions()
        self.moves: Moves | None = None  # where nixl is on offer
        self.watches = watches
        driver.attach_watches(watches)
        self.epoch = host.epoch
        self.arena_id = host.arena_id
        self.draining = False
        self._warned: set[int] = set()  # handles whose near misses were logged
        self.bytes_granted = 0  # bytes of leased regions
        self.started = time.monotonic()
        self._liveness = liveness
        self._namespaces = namespaces
        self._dropped = dropped  # counters of what the start could not restore
        self._disk = disk
        self._device = device
        self._shm = shm
        self._tcp = tcp
        self.permits = permits  # what clients of a remote transport show for their grants
        self._report = report
        self._log = log
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.driver.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="sweep")

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self.driver.stop()

    def medium(self, tier: int) -> str:
        """What a tier is made of, where that is not one and the same everywhere."""
        return self._device.name if self._device and tier == events.Tier.DEVICE else ""

    def counters(self) -> dict[str, int]:
        """What the shell counts beside the core."""
        disk, device = self._disk, self._device
        return {
            "bytes_host_in": self.driver.entries.bytes_committed,
            "bytes_host_out": self.bytes_granted,
            "bytes_disk_in": disk.bytes_written if disk else 0,
            "bytes_disk_out": disk.bytes_read if disk else 0,
            "bytes_device_in": device.bytes_written if device else 0,
            "bytes_device_out": device.bytes_read if device else 0,
            "stalls": self.driver.stalls,
            "commit_mismatches": self.driver.commit_mismatches,
            "shm_granted": self._shm.granted,
            "shm_refused": self._shm.refused,
            "watchers": self.watches.open,
            "watch_blocks": self.watches.told,
            "watch_overflows": self.watches.overflows,
            **(self._tcp.counters() if self._tcp else {}),
            **self._dropped,
            **(self.moves.counters() if self.moves else {}),
        }

    async def _sweep(self) -> None:
        """Forget ended sessions, and tell of clients that died without a word."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                alive = {session.session for session in self.driver.stats().sessions}
                for session in self.sessions.keep_only(alive):
                    self._log.info("session_ended", extra={"fields": {"session": session}})
                self.watches.keep_only(alive)
                self._bury_the_dead()
            except Exception as error:
                self._report("sweep", error)

    def _bury_the_dead(self) -> None:
        clients = {c: s for s in self.sessions.all() for c in s.clients}
        for client in filter(self._liveness.is_dead, self._liveness.known()):
            session = clients.get(client)
            if session is not None:
                session.clients.discard(client)
                self._log.info("client_died", extra={"fields": {"client": client}})
            # Also the core's word for one that left earlier: its quarantine is lifted.
            self.driver.tell(events.ClientDead(client))
            self._liveness.forget(client)

    def knows(self, session: int, client: int) -> bool:
        """Whether the session lives and the client is one of it."""
        found = self.sessions.find(session)
        return found is not None and client in found.clients

    # ---- sessions --------------------------------------------------------------------------

    async def open_session(self, *, tenant: str, name: str, version: str) -> Session:
        session = self.sessions.create(tenant=tenant, name=name, version=version)
        event = events.OpenSession(self.driver.ticket(), session.id, tenant)
        await self.driver.ask(event, type(None))
        self.sessions.add(session)
        return session

    async def join_session(self, session: Session) -> int:
        """A new client (writer) of the session; its id."""
        client = self._liveness.new_client_id()
        event = events.JoinSession(self.driver.ticket(), session.id, client)
        await self.driver.ask(event, type(None))
        session.clients.add(client)
        return client

    async def leave_session(self, session: Session, client: int, *, drained: bool) -> None:
        """One client leaves; with the last one the session ends."""
        ticket = self.driver.ticket()
        left = events.CloseClient(ticket, session.id, client, drained=drained)
        await self.driver.ask(left, type(None))
        session.clients.discard(client)
        session.remote.discard(client)
        if not session.clients:
            ended = events.CloseSession(self.driver.ticket(), session.id, drained=drained)
            await self.driver.ask(ended, type(None))
            self.sessions.remove(session.id)
            self.watches.keep_only({one.id for one in self.sessions.all()})

    # ---- namespaces --------------------------------------------------------------------------

    async def open_namespace(self, session: Session, spec: NamespaceSpec) -> tuple[int, list[str]]:
        """The handle, and the namespaces that differ in one field, as texts."""
        if spec.tenant != session.tenant:
            raise CoreError(
                ErrorKind.INVALID,
                f"spec.tenant is {spec.tenant!r}, the session's tenant is {session.tenant!r}",
                field="spec.tenant",
                limit=session.tenant,
            )
        event = events.OpenNamespace(self.driver.ticket(), session.id, spec)
        handle = await self.driver.ask(event, int)
        self._namespaces.add(spec)
        session.namespaces[handle] = spec
        near = self.driver.hub.near_misses(handle)
        if near and handle not in self._warned:
            self._warned.add(handle)
            fields = {"namespace": spec.id.hex()[:16], "model": spec.model, "near": near[:4]}
            self._log.warning("near_miss_namespace", extra={"fields": fields})
        return handle, near[:NEAR_MISSES_MAX]

    @property
    def slot_bytes_max(self) -> int:
        """The largest slot of the host tier."""
        return self.driver.hub.slot_bytes_max

    def slot_bytes(self, spec: NamespaceSpec) -> int:
        """The size class that a full block of a namespace takes."""
        return self.driver.hub.slot_class_bytes(spec.grid.slot_bytes())

    async def drop_namespace(self, namespace_id: bytes) -> instructions.Evicted:
        event = events.DropNamespace(self.driver.ticket(), namespace_id)
        evicted = await self.driver.ask(event, instructions.Evicted)
        self._namespaces.drop([namespace_id])
        return evicted

    # ---- draining ----------------------------------------------------------------------------

    async def drain(self, deadline_s: float) -> bool:
        """Take no new reservations; True when the write-behind is empty within the deadline."""
        self.draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self.driver.ask(events.Drain(self.driver.ticket()), type(None))
        except TimeoutError:
            return False
        return True
