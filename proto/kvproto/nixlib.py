"""The NIXL library as both sides use it: one thin wrapper, loaded only where it is wanted.

NIXL is an optional part (extra `nixl`). Its wheels come per CUDA version and run without a GPU. We
load their bindings by name: the meta package would import torch to find out which one to take.

Rules:
 1. An Agent belongs to one thread at a time: nothing here locks.
 2. A handle whose state is not terminal is never released but by `close`: releasing does not stop
    the bytes (DESIGN 5, measured).
 3. Descriptors are arrays of (address, bytes, device); the library's own serialisation of them is
    pickle and is not reached from here. Metadata is parsed by its C++: hand over only what an
    authenticated peer sent.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

_MODULES = ("nixl_cu12", "nixl_cu13")  # the first that is there
PROGRESS_POLL_US = 100_000  # NIXL's progress thread: 0 would spin on a core of its own
METADATA_BYTES_MAX = 1 << 16

Descriptors = npt.NDArray[np.uint64]  # [n, 3]


class NixlError(Exception):
    """The library refused or failed; the text says what it was asked."""


class State(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Memory(Enum):
    """Kinds of memory; `code` is their number in an Attach."""

    DRAM = "DRAM"
    VRAM = "VRAM"

    @property
    def code(self) -> int:
        return _CODES.index(self)

    @classmethod
    def of(cls, code: int) -> Memory:
        """ValueError for a number that stands for none."""
        if not 0 <= code < len(_CODES):
            raise ValueError(f"memory of kind {code}")
        return _CODES[code]


_CODES = (Memory.DRAM, Memory.VRAM)


_bindings: Any = None


def load() -> Any:
    """The library's bindings. NixlError with the reason when they cannot be imported."""
    global _bindings
    if _bindings is not None:
        return _bindings
    reasons = []
    raising = logging.raiseExceptions
    for name in _MODULES:
        try:
            module = importlib.import_module(f"{name}._bindings")
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
            continue
        finally:
            logging.raiseExceptions = raising  # the package turns it off
        logger = logging.getLogger("nixl")  # prints to stdout unless told otherwise
        logger.handlers.clear()
        logger.propagate = True
        _bindings = module
        return module
    raise NixlError("NIXL cannot be imported (pip install nixl-cu12): " + "; ".join(reasons))


def available() -> bool:
    try:
        load()
    except NixlError:
        return False
    return True


def cards() -> bool:
    """Whether this host has GPUs, as the drivers of NVIDIA and AMD say."""
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))


class Agent:
    """One NIXL agent with one backend. NixlError from every call that fails."""

    def __init__(
        self, name: str, *, backend: str, params: Mapping[str, str], progress: bool
    ) -> None:
        """`progress` gives it a thread of its own, which a target of emulated transfers needs
        (UCX over tcp). It sleeps while nothing moves, and spins while a connection is half made."""
        self._nixl = nixl = load()
        kinds = (getattr(nixl, name) for name in dir(nixl) if name.endswith("Error"))
        self._failures = (*kinds, RuntimeError, ValueError)
        config = nixl.nixlAgentConfig()
        config.useProgThread = progress
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        config.pthrDelay = PROGRESS_POLL_US
        self.name = name
        try:
            self._agent = nixl.nixlAgent(name, config)
            plugins = self._agent.getAvailPlugins()
            if backend not in plugins:
                raise NixlError(f"NIXL has no backend {backend!r}, but {', '.join(plugins)}")
            self._backend = [self._agent.createBackend(backend, dict(params))]
        except self._failures as error:
            raise NixlError(f"NIXL backend {backend} cannot be made: {error!r}") from error
        self._segments = {Memory.DRAM: nixl.DRAM_SEG, Memory.VRAM: nixl.VRAM_SEG}

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        """Make memory known; it must live until `close`."""
        area = [(address, length, device, "")]
        try:
            descriptors = self._nixl.nixlRegDList(self._segments[memory], area)
            self._agent.registerMem(descriptors, self._backend)
        except self._failures as error:
            raise NixlError(
                f"cannot register {length} bytes of {memory.value}: {error!r}"
            ) from error

    def deregister(self, address: int, length: int, memory: Memory, device: int = 0) -> None:
        """Forget memory that was registered so; nothing may move it."""
        try:
            area = [(address, length, device, "")]
            descriptors = self._nixl.nixlRegDList(self._segments[memory], area)
            self._agent.deregisterMem(descriptors, self._backend)
        except self._failures as error:
            raise NixlError(f"cannot forget {length} bytes: {error!r}") from error

    def metadata(self) -> bytes:
        """What a peer needs in order to reach the registered memory."""
        try:
            told: bytes = self._agent.getLocalMD()
        except self._failures as error:
            raise NixlError(f"no metadata: {error!r}") from error
        return told

    def add_peer(self, metadata: bytes) -> str:
        """The peer's name."""
        try:
            name: bytes | str = self._agent.loadRemoteMD(metadata)
        except self._failures as error:
            raise NixlError(f"the peer's metadata is refused: {error!r}") from error
        return name.decode(errors="replace") if isinstance(name, bytes) else name

    def drop_peer(self, name: str) -> None:
        """Forget a peer. No fence: what runs, runs on."""
        try:
            self._agent.invalidateRemoteMD(name)
        except self._failures as error:
            raise NixlError(f"cannot drop {name}: {error!r}") from error

    def progress(self) -> None:
        """Let the backend do what it owes its peers, where no thread of its own does: about 1 us
        when it owes nothing."""
        try:
            self._agent.getNotifs({}, self._backend)
        except self._failures as error:
            raise NixlError(f"no progress: {error!r}") from error

    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]:
        """Begin one transfer between local DRAM and the peer's `memory`; its handle and state.

        Over CMA the whole copy happens in here, without the interpreter's lock.
        """
        nixl, agent = self._nixl, self._agent
        op = nixl.NIXL_READ if read else nixl.NIXL_WRITE
        try:
            handle: int = agent.createXferReq(
                op,
                nixl.nixlXferDList(nixl.DRAM_SEG, local),
                nixl.nixlXferDList(self._segments[memory], remote),
                peer,
                "",
                self._backend,
            )
        except self._failures as error:
            raise NixlError(f"cannot begin a transfer with {peer}: {error!r}") from error
        try:
            return handle, self._state(agent.postXferReq(handle))
        except self._failures:
            return handle, State.FAILED

    def state(self, handle: int) -> State:
        try:
            return self._state(self._agent.getXferStatus(handle))
        except self._failures:
            return State.FAILED

    def release(self, handle: int) -> None:
        """Of a transfer that is terminal."""
        try:
            self._agent.releaseXferReq(handle)
        except self._failures as error:
            raise NixlError(f"cannot release a transfer: {error!r}") from error

    def close(self) -> None:
        """Destroy the agent, and with it whatever it still moves. Nothing may follow."""
        self._agent = None

    def _state(self, status: Any) -> State:
        if status == self._nixl.NIXL_SUCCESS:
            return State.DONE
        return State.RUNNING if status == self._nixl.NIXL_IN_PROG else State.FAILED
