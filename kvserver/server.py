"""Wiring and lifecycle of one server process.

    start: port -> lock -> arena, journal -> recovery -> sockets -> ready
    stop:  drain -> calls end -> threads end -> files are closed and stay

Rule 1: the port and the directories' locks come first; a second server fails before it touches
anything.
Rule 2: SIGTERM and SIGINT drain within `drain_ms`; a second signal ends the wait. The arena and the
slot file stay: the next start is warm.
Rule 3: whatever fails while starting is taken down again, in reverse order. Files that this start
        was the first to make are removed: an arena that nobody will use is memory lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import kvserver
from kvproto import cells
from kvproto.errors import FieldError
from kvproto.rdma import rdma_devices
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver import offline
from kvserver.bounds import hub_config, limits_of
from kvserver.config import Settings
from kvserver.core.events import (
    Tier,
    TierDown,
)
from kvserver.journal.errors import JournalError
from kvserver.journal.record import DiskRecord
from kvserver.media import open_device, open_disk
from kvserver.moving import open_moves, start_agent
from kvserver.observe import logs
from kvserver.observe.metrics import Metrics
from kvserver.options import read_file
from kvserver.runtime import failpoints, recovery
from kvserver.runtime.copies import Copies
from kvserver.runtime.device import DeviceTier, Pinning
from kvserver.runtime.disk import DiskTier
from kvserver.runtime.driver import Driver
from kvserver.runtime.mover import Mover
from kvserver.runtime.namespaces import Namespaces
from kvserver.runtime.node import Node
from kvserver.runtime.prefault import Prefault
from kvserver.runtime.sessions import Session
from kvserver.runtime.watches import Watches
from kvserver.service.admin import AdminService
from kvserver.service.cache import CacheService
from kvserver.service.calls import Gate, Incidents
from kvserver.service.local import LocalCalls
from kvserver.service.port import open_port
from kvserver.service.stats import stats_reply
from kvserver.tiers.device import DeviceArena
from kvserver.tiers.disk import DiskFile
from kvserver.tiers.errors import TierError
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.tiers.names import NamespaceLog
from kvserver.transfer.base import TransferError
from kvserver.transfer.permits import Permits, new_secret
from kvserver.transfer.shm import ShmServer
from kvserver.transfer.tcp.endpoint import TcpEndpoint, Tls

if TYPE_CHECKING:
    from kvserver.journal.directory import Directory

SWITCH_INTERVAL_S = 1e-4  # lookups next to copying threads: DESIGN 5
SOCKET_NAME = "shm.sock"
SCRAPE_S = 2.0  # a scrape of /metrics waits this long for the loop
DRAIN_MS_MAX = 600_000  # of an Admin.Drain call
CLOSE_S = 15.0
EXIT_BUG = 70  # the status of a process that found its own books wrong; it may be started again
CALLS_GRACE_S = 0.5  # what calls have left to end after the drain
SERVICES = tuple(s.full_name for s in pb.DESCRIPTOR.services_by_name.values())
log = logs.get_logger("server")


class StartError(Exception):
    """The server cannot start; the message says what is in the way."""


async def run(settings: Settings) -> int:
    """Serve until a signal; the process's exit status. StartError when it cannot start."""
    logs.configure(level=settings.log_level, style=settings.log_format)
    failpoints.arm(os.environ.get(failpoints.ENVIRONMENT_VARIABLE, ""))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each engine takes a few
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(settings)
    gc.disable()  # recovery makes objects by the 100,000, none of them garbage: 1.6 times faster
    try:
        await server.start()
    except (FieldError, TierError, JournalError, TransferError, OSError) as error:
        await server.close()
        raise StartError(str(error)) from error
    except BaseException:
        await server.close()
        raise
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()  # what recovery built stays; collecting it again and again would cost pauses
    await stopping.wait()
    stopping.clear()
    logs.event(log, "stopping", drain_ms=settings.drain_ms)
    second = loop.create_task(stopping.wait())
    await server.drain(until=second)
    second.cancel()
    try:
        async with asyncio.timeout(CLOSE_S):
            await server.close()
    except TimeoutError:  # a thread hangs in a system call; a kill at any time is safe
        logs.event(log, "close_hangs", logging.ERROR, seconds=CLOSE_S)
        os._exit(1)
    logs.event(log, "stopped")
    return 0


class Server:
    """One server. `start` once, then `drain` and `close`; `close` alone is an abrupt end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.incidents = Incidents(log)
        self._parts = contextlib.AsyncExitStack()
        self._unmake: list[Callable[[], object]] = []  # what this start made, until it is ready
        self.gate = Gate(settings.rpcs_max)
        self._health = health.aio.HealthServicer()
        self._shm: ShmServer | None = None
        self._tcp: TcpEndpoint | None = None

    # ---- start -----------------------------------------------------------------------------

    async def start(self) -> None:
        started = time.monotonic()
        settings = self.settings
        grpc_server, self.address = self._open_port()
        self._parts.push_async_callback(grpc_server.stop, None)
        self._open_host()
        self._agent = start_agent(settings, self.host, self._parts, self.incidents.report)
        failpoints.hit("start.after_lock")
        disk = open_disk(settings, self._parts, self._unmake)
        self._build(disk, open_device(settings, self._parts))
        failpoints.hit("start.before_restore")
        self._recover(disk)
        failpoints.hit("start.before_ready")
        await self._start_node()
        metrics_listen = self._start_metrics()
        self._add_services(grpc_server)
        self.node.start()
        self._parts.push_async_callback(self.node.stop)
        await self._grow()
        await grpc_server.start()
        self._parts.push_async_callback(grpc_server.stop, CALLS_GRACE_S)
        self._parts.callback(self.node.watches.close)
        self._parts.push_async_callback(self._local.close, CALLS_GRACE_S)
        await self._set_health(serving=True)
        self._unmake.clear()
        logs.event(
            log,
            "ready",
            listen=self.address,
            metrics_listen=metrics_listen,
            tcp_listen=self._tcp.address if self._tcp else "",
            host_dir=settings.host_dir,
            pid=os.getpid(),
            epoch=self.host.epoch,
            version=kvserver.__version__,
            native=cells.NATIVE,
            warm=self.host.warm,
            seconds=round(time.monotonic() - started, 3),
        )

    def _open_port(self) -> tuple[Any, str]:
        settings, credentials = self.settings, None
        if settings.tls_cert:
            pair = tuple(
                read_file(name, getattr(settings, name)) for name in ("tls_key", "tls_cert")
            )
            clients = read_file("tls_client_ca", settings.tls_client_ca)
            credentials = grpc.ssl_server_credentials([pair], clients, clients is not None)
        standing = settings.sessions_max + settings.watchers_max + 64
        return open_port(
            settings.listen,
            message_bytes_max=settings.message_bytes_max,
            # The gate refuses by name; this stops a flood before it is read.
            calls_max=4 * settings.rpcs_max + standing,
            credentials=credentials,
        )

    def _open_host(self) -> None:
        settings = self.settings
        directory = Path(settings.host_dir)
        self.host = HostArena.open(
            directory,
            settings.host_bytes,
            hugepages=settings.hugepages,
            mlock=settings.mlock,
        )
        self._parts.callback(self.host.close)
        if self.host.made:
            self._unmake.append(partial(offline.purge_host_files, directory))
        for note in self.host.notes:
            logs.event(log, "host_note", logging.WARNING, note=note)
        if self.host.cold_reason:
            logs.event(log, "host_cold", reason=self.host.cold_reason)
        self.names = NamespaceLog.open(directory)
        self._parts.callback(self.names.close)
        self.liveness = Liveness(directory)

    def _build(self, disk: tuple[DiskFile, Directory] | None, device: DeviceArena | None) -> None:
        settings = self.settings
        self.config = hub_config(settings, host_bytes=self.host.data_bytes)
        self.driver = Driver(
            self.config,
            host=self.host,
            fatal=self._fatal,
            is_dead=self._is_dead,
            is_remote=lambda client: self.node.sessions.is_remote(client),
            log=logs.get_logger("driver"),
        )
        self.disk = None
        if disk is not None:
            self.disk = DiskTier(*disk, failed=self._disk_failed, log=logs.get_logger("disk"))
        self.device = self._pinning = None
        if device is not None:
            self.device = DeviceTier(device, failed=self._device_failed)
            self._pinning = Pinning(device, self.host, logs.get_logger("host"))
        self.mover = Mover(
            self.host,
            Copies(self.host, disk=self.disk, device=self.device),
            self.disk,
            threads=settings.data_threads,
            spec_of=self.driver.hub.spec_of,
            post=self.driver.post,
            report=self.incidents.report,
            log=logs.get_logger("mover"),
        )
        self._parts.push_async_callback(asyncio.to_thread, self.mover.close)
        self.driver.attach(self.mover)

    def _fatal(self, error: Exception) -> None:
        """The books cannot be trusted any more: stop at once rather than serve a wrong byte."""
        self.incidents.report("hub", error)
        logs.event(log, "fatal", logging.ERROR, status=EXIT_BUG)
        os._exit(EXIT_BUG)

    def _disk_failed(self, reason: str) -> None:
        logs.event(log, "disk_down", logging.ERROR, reason=reason)
        self.driver.post(TierDown(Tier.DISK, reason))

    def _device_failed(self, reason: str) -> None:
        logs.event(log, "device_down", logging.ERROR, reason=reason)
        self.driver.post(TierDown(Tier.DEVICE, reason))

    def _recover(self, disk: tuple[DiskFile, Directory] | None) -> None:
        started, found = time.monotonic(), recovery.Recovered()
        tell = self.driver.tell
        scan = self.host.scan()
        records: list[DiskRecord] = []
        journaled: dict[bytes, bytes] = {}
        if disk is not None:
            file, journal = disk
            records, damaged = journal.scan(file.data_bytes)
            journaled = journal.namespaces()
            found.drop("damaged disk record", damaged)
            found.drop("record of another slot file", journal.foreign)
        used = {entry.tag for entry in scan[0]} | {record.tag for record in records}
        canonicals = [*self.names.canonicals, *journaled.values()]
        specs = recovery.restore_namespaces(canonicals, used, tell, found)
        recovery.restore_host(self.host, scan, self.liveness, tell, found)
        if self.disk is not None:
            self.disk.restored((record.offset for record in records), journaled)
            recovery.restore_disk(records, tell, found)
        self.namespaces = Namespaces(
            self.names,
            self.mover,
            lives=lambda identity: self.driver.hub.namespace_of(identity) is not None,
            live_max=self.settings.namespaces_max,
        )
        self.namespaces.restored(specs, journaled)
        found.drop("unreadable arena", int(self.host.unreadable))
        found.seconds = round(time.monotonic() - started, 3)
        self._dropped = found.counters()
        level = logging.WARNING if found.dropped else logging.INFO
        logs.event(log, "recovered", level, **dataclasses.asdict(found))

    async def _start_node(self) -> None:
        shm = ShmServer(
            Path(self.settings.host_dir) / SOCKET_NAME,
            arena=self.host,
            liveness=self.liveness,
            authorise=self._authorise_shm,
            log=logs.get_logger("shm"),
        )
        await shm.start()
        self._parts.push_async_callback(shm.close)
        self._shm = shm
        secret = new_secret()
        if self.settings.tcp_listen:
            self._tcp = await self._start_tcp(secret)
        self.node = Node(
            self.driver,
            host=self.host,
            disk=self.disk,
            device=self.device,
            shm=shm,
            permits=Permits(secret),
            tcp=self._tcp,
            liveness=self.liveness,
            namespaces=self.namespaces,
            dropped=self._dropped,
            watches=Watches(
                self.driver.hub,
                self.driver.tell,
                watchers_max=self.settings.watchers_max,
                changes_max=self.settings.watch_changes_max,
            ),
            report=self.incidents.report,
            log=logs.get_logger("node"),
        )
        if self._agent is not None:
            # Closed after the calls have ended, and before the arena's lock goes.
            self.node.moves = await open_moves(
                self._agent,
                settings=self.settings,
                node=self.node,
                host=self.host,
                liveness=self.liveness,
                parts=self._parts,
            )

    async def _start_tcp(self, secret: bytes) -> TcpEndpoint:
        settings = self.settings
        tls = None
        if settings.tls_cert:
            cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
            tls = Tls(cert=cert, key=key, client_ca=client_ca)
        tcp = TcpEndpoint(
            settings.tcp_listen,
            arena=self.host,
            liveness=self.liveness,
            authorise=self._authorise_tcp,
            alive=lambda session, client: self.node.knows(session, client),
            secret=secret,
            workers=settings.tcp_workers,
            nice=settings.tcp_worker_nice,
            connections_max=settings.tcp_connections_max,
            stall_s=settings.tcp_stall_ms / 1000,
            tls=tls,
            log=logs.get_logger("tcp"),
        )
        self._parts.push_async_callback(tcp.close)
        await tcp.start()
        return tcp

    def _is_dead(self, client: int) -> bool:
        """Whether nothing can write for a client; our own hands let go of it when asked."""
        moves = self.node.moves
        idle = moves.idle(client) if moves is not None else None
        if idle is not None:
            return idle
        if self._tcp is not None:
            self._tcp.drop(client)
        return self.liveness.is_dead(client)

    def _authorise_tcp(self, session: int, client: int, token: bytes) -> bool:
        if not self.node.sessions.authorise(session, client, token):
            return False
        found = self.node.sessions.get(session)
        found.transports.add("tcp")
        found.remote.add(client)
        return True

    def _authorise_shm(self, session: int, client: int, token: bytes) -> bool:
        if not self.node.sessions.authorise(session, client, token):
            return False
        found = self.node.sessions.get(session)
        if not self.settings.shm_allowed(found.tenant):
            return False
        found.transports.add("shm")
        return True

    def _offers(self, session: Session) -> list[pb.TransportOffer]:
        assert self._shm is not None
        offers = []
        if self.settings.shm_allowed(session.tenant):
            address, told = self._shm.offer
            offers.append(pb.TransportOffer(name=self._shm.name, address=address, options=told))
        if self.node.moves is not None:
            told = {"backend": self.settings.nixl_backend, "rdma": ",".join(rdma_devices())}
            offers.append(pb.TransportOffer(name="nixl", options=told))
        if self._tcp is not None:
            address, options = self._tcp.offer
            offers.append(pb.TransportOffer(name=self._tcp.name, address=address, options=options))
        return offers

    def _start_metrics(self) -> str:
        loop = asyncio.get_running_loop()

        def scrape() -> pb.StatsReply:
            return asyncio.run_coroutine_threadsafe(self._stats(), loop).result(SCRAPE_S)

        self.metrics = Metrics(scrape)
        if not self.settings.metrics_listen:
            return ""
        try:
            listen = self.metrics.listen(self.settings.metrics_listen)
        except OSError as error:
            raise StartError(f"metrics_listen: {self.settings.metrics_listen}: {error}") from error
        self._parts.push_async_callback(asyncio.to_thread, self.metrics.close)
        return listen

    async def _stats(self) -> pb.StatsReply:
        return stats_reply(self.node, self.incidents.count)

    def _add_services(self, server: Any) -> None:
        settings = self.settings
        base = {
            "meter": self.metrics,
            "incidents": self.incidents,
            "gate": self.gate,
        }
        limits = limits_of(settings, self.config, slot_bytes_max=self.node.slot_bytes_max)
        cache = CacheService(self.node, limits=limits, offers=self._offers, **base)
        admin = AdminService(
            self.node,
            keys_max=settings.keys_per_call_max,
            drain_ms_max=DRAIN_MS_MAX,
            **base,
        )
        kvserver_pb2_grpc.add_CacheServicer_to_server(cache, server)
        report, own_log = self.incidents.report, logs.get_logger("local")
        self._local = LocalCalls(cache, knows=self.node.knows, report=report, log=own_log)
        assert self._shm is not None
        self._shm.serve_calls(self._local)
        kvserver_pb2_grpc.add_AdminServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME), server)

    async def _grow(self) -> None:
        prefault = Prefault(
            self.host,
            post=self.driver.post,
            grew=self._pinning.grew if self._pinning else None,
            log=logs.get_logger("host"),
        )
        await asyncio.to_thread(prefault.first)
        prefault.start()
        self._parts.push_async_callback(asyncio.to_thread, prefault.stop)

    # ---- stop --------------------------------------------------------------------------------

    async def drain(self, *, until: asyncio.Task[Any]) -> None:
        """Refuse new reservations and empty the write-behind, within drain_ms or `until`."""
        await self._set_health(serving=False)
        draining = asyncio.create_task(self.node.drain(self.settings.drain_ms / 1000))
        await asyncio.wait({draining, until}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        drained = not draining.cancelled() and draining.result()
        logs.event(log, "drained" if drained else "drain_ended_early")

    async def close(self) -> None:
        await self._parts.aclose()
        for unmake in self._unmake:
            with contextlib.suppress(offline.OfflineError):  # another server has it now
                unmake()

    async def _set_health(self, *, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, state)
