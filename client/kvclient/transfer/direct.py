"""Direct to the caller's memory: what the hub may read and write of it, and for how long.

    memory = await client.register(pages)        # once: an engine's KV cache, an array
    await ns.pull(keys, out)                     # what lies in it is moved without staging

The hub initiates every transfer, so a hub that was stopped in the middle may read or write these
bytes long after the call failed at its deadline. Staging can be withheld; this memory is the
caller's, so the caller is told:

    a move begins --> HELD --end--> over
                        \\--withhold--> PINNED --settled--> over

Rules:
 1. Only this module changes a hold's state, and no deadline ends one: what proves that a hub can
    write no more stands in `kvclient.transfer.ring`.
 2. A call that returns has no hold left. One that fails says in `error.pin` what it left behind;
    `pin(...)` of the client says it at any time, also after a cancellation.
 3. Memory under a hold is kept alive and cannot be unregistered.
 4. What is hashed of a push is hashed before the hub reads it, and the hub hashes what it read. So
    only bytes that stood still in between are committed: the Commit is the word that they did.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvclient.errors import Conflict, InvalidArgument
from kvclient.transfer.base import Bytes
from kvproto.nixlib import Memory

Addresses = npt.NDArray[np.uint64]
MEMORIES_MAX = 512  # the hub takes at most 1024 extents of a client


@dataclass(frozen=True, eq=False, slots=True)
class Registered:
    """Memory that the hub may be sent to. Comes from `register` of a client.

    `memory` says of which kind it is, `device` on which GPU; `owner` keeps it alive.
    """

    address: int
    nbytes: int
    memory: Memory
    device: int
    owner: object = field(repr=False)

    @property
    def stop(self) -> int:
        return self.address + self.nbytes

    @classmethod
    def of(cls, what: Any) -> Registered:
        """Of a contiguous, writable NumPy array, or of a torch tensor on the CPU or a CUDA device.

        InvalidArgument for anything else.
        """
        if isinstance(what, np.ndarray):
            if not what.flags.c_contiguous or not what.flags.writeable:
                raise InvalidArgument.of("memory", what.flags, "a contiguous, writable array")
            address, nbytes, device = int(what.ctypes.data), int(what.nbytes), "cpu"
            index = 0
        elif hasattr(what, "data_ptr") and hasattr(what, "device"):
            if not what.is_contiguous():
                raise InvalidArgument.of("memory", tuple(what.stride()), "a contiguous tensor")
            address, nbytes = int(what.data_ptr()), int(what.numel()) * int(what.element_size())
            device, index = str(what.device.type), int(what.device.index or 0)
        else:
            kind = type(what).__name__
            raise InvalidArgument.of("memory", kind, "a NumPy array or a torch tensor")
        if device not in _KINDS:
            raise InvalidArgument.of("memory", device, f"on one of {', '.join(_KINDS)}")
        if not nbytes:
            raise InvalidArgument.of("memory", 0, "at least one byte")
        return cls(address, nbytes, _KINDS[device], index, what)


_KINDS = {"cpu": Memory.DRAM, "cuda": Memory.VRAM}


@dataclass(frozen=True, eq=False, slots=True)
class Scattered:
    """The cells of one block in registered memory, in equal pieces: an engine's pages.

    addresses    uint64 [layers, heads, pieces]: where the pieces of each cell lie, in order
    piece_bytes  bytes of each
    read         (first layer, last layer + 1) -> uint8 [layers, heads, cell bytes]: those cells as
                 they stand now, for checksums; on the host, wherever the memory is
    """

    addresses: Addresses
    piece_bytes: int
    read: Callable[[int, int], Bytes]

    @classmethod
    def of(cls, cells: Any) -> Scattered:
        """Of the cells of one block in a torch tensor of bytes, uint8 [layers, heads, cell bytes],
        on the CPU or a CUDA device, each cell in one piece. What a device still writes there is
        the caller's to wait for. InvalidArgument for anything else.
        """
        shape = tuple(int(n) for n in cells.shape)
        if len(shape) != 3 or cells.element_size() != 1 or int(cells.stride(2)) != 1:
            raise InvalidArgument.of("cells", shape, "bytes [layers, heads, cell bytes], dense")
        layer, head = int(cells.stride(0)), int(cells.stride(1))
        steps = np.arange(shape[0])[:, None] * layer + np.arange(shape[1]) * head
        addresses = (steps + int(cells.data_ptr())).astype(np.uint64)

        def read(first: int, last: int) -> Bytes:
            host: Bytes = cells[first:last].cpu().numpy()
            return host

        return cls(addresses[:, :, None], shape[2], read)

    @property
    def shape(self) -> tuple[int, int, int]:
        layers, heads, pieces = self.addresses.shape
        return layers, heads, pieces * self.piece_bytes

    @property
    def extents(self) -> Addresses:
        """[n, 2]: first and last + 1 address of each piece."""
        flat = self.addresses.reshape(-1)
        return np.stack([flat, flat + np.uint64(self.piece_bytes)], axis=1)


Block = Bytes | Scattered


@dataclass(eq=False, slots=True)
class _Hold:
    """Some pieces of memory that a hub reads or writes. `over` is done when it does no more."""

    extents: Addresses  # [n, 2]
    owners: list[object]
    over: concurrent.futures.Future[None]

    def meets(self, extents: Addresses) -> bool:
        return _overlap(self.extents, extents)


class Pin:
    """What a hub may still read or write of some memory. From any thread.

    The memory is not to be written, and if a pull was to fill it not to be relied upon either,
    until it is `done`; for how long that is, only the hub knows.
    """

    def __init__(self, holds: Sequence[_Hold]) -> None:
        self._holds = [hold for hold in holds if not hold.over.done()]
        self.nbytes = sum(
            int((h.extents[:, 1] - h.extents[:, 0]).sum(dtype=np.uint64)) for h in self._holds
        )

    def __repr__(self) -> str:
        return f"Pin({self.nbytes} bytes, {'done' if self.done else 'held'})"

    @property
    def done(self) -> bool:
        return all(hold.over.done() for hold in self._holds)

    def wait(self, limit_s: float) -> bool:
        """Block until it is done, or for `limit_s`; whether it is. Not on the client's loop."""
        concurrent.futures.wait([hold.over for hold in self._holds], limit_s)
        return self.done

    async def settled(self, limit_s: float | None = None) -> bool:
        """The same on an event loop; None: however long it takes."""
        waiting = [asyncio.wrap_future(hold.over) for hold in self._holds]
        if waiting:
            await asyncio.wait(waiting, timeout=limit_s)
        return self.done


class Memories:
    """What a client has registered, and every hold on it. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: list[Registered] = []
        self._holds: set[_Hold] = set()

    @property
    def registered(self) -> list[Registered]:
        with self._lock:
            return list(self._registered)

    def add(self, memory: Registered) -> None:
        with self._lock:
            if len(self._registered) >= MEMORIES_MAX:
                limit = f"at most {MEMORIES_MAX} memories"
                raise InvalidArgument.of("memory", len(self._registered) + 1, limit)
            for other in self._registered:
                if memory.address < other.stop and other.address < memory.stop:
                    raise Conflict(f"it overlaps with {other}", field="memory")
            self._registered.append(memory)

    def remove(self, memory: Registered) -> None:
        """Conflict while a hub may still touch it."""
        with self._lock:
            if memory not in self._registered:
                raise Conflict(f"{memory} is not registered", field="memory")
            extents = np.array([[memory.address, memory.stop]], np.uint64)
            if any(hold.meets(extents) for hold in self._holds):
                raise Conflict(f"a hub may still read or write {memory}", field="memory")
            self._registered.remove(memory)

    def scattered(self, block: Block) -> Scattered | None:
        """The block as pieces of registered memory; None when some of it lies elsewhere.

        InvalidArgument for pieces that were given as such and lie elsewhere.
        """
        if isinstance(block, Scattered):
            if self._owners(block.extents) is None:
                raise InvalidArgument.of("addresses", "some", "within memory that was registered")
            return block
        layer, head, byte = block.strides
        if min(layer, head) < 0 or (byte != 1 and block.shape[2] > 1) or not block.size:
            return None
        start, count = block.__array_interface__["data"][0], block.shape
        stop = start + (count[0] - 1) * layer + (count[1] - 1) * head + count[2]
        if not any(m.address <= start and stop <= m.stop for m in self.registered):
            return None
        steps = np.arange(count[0])[:, None] * layer + np.arange(count[1]) * head
        addresses = (steps + start).astype(np.uint64)
        return Scattered(addresses[:, :, None], block.shape[2], lambda a, b: block[a:b])

    def _owners(self, extents: Addresses) -> list[object] | None:
        """What must live as long as these [n, 2] are held; None if some are not registered."""
        known = self.registered
        owners, inside = [], np.zeros(len(extents), np.bool_)
        for memory in known:
            here = (extents[:, 0] >= memory.address) & (extents[:, 1] <= memory.stop)
            if here.any():
                owners.append(memory.owner)
                inside |= here
        return owners if inside.all() else None

    def hold(self, extents: Addresses) -> _Hold:
        over: concurrent.futures.Future[None] = concurrent.futures.Future()
        over.set_running_or_notify_cancel()  # who waits may be cancelled, the hold is not
        hold = _Hold(extents, self._owners(extents) or [], over)
        with self._lock:
            self._holds.add(hold)
        return hold

    def let_go(self, hold: _Hold) -> None:
        with self._lock:
            self._holds.discard(hold)
        if not hold.over.done():
            hold.over.set_result(None)

    def pin(self, blocks: Iterable[Any]) -> Pin:
        """Of arrays, tensors, Scattered blocks or Registered memory."""
        extents = [_extents_of(block) for block in blocks]
        with self._lock:
            holds = list(self._holds)
        if not extents or not holds:
            return Pin([])
        asked = np.concatenate(extents)
        return Pin([hold for hold in holds if hold.meets(asked)])


class Holds:
    """The moves of one session that touch registered memory, by their numbers."""

    own_bytes = 0  # the memory is the caller's

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self._running: dict[int, _Hold] = {}
        self._withheld: dict[int, _Hold] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._withheld)

    @property
    def withheld(self) -> list[int]:
        return list(self._withheld)

    def begin(self, number: int, extents: Addresses) -> None:
        """A move of this number is about to be asked for."""
        self._running[number] = self._memories.hold(extents)

    def end(self, number: int) -> None:
        """It is terminal, or never began."""
        hold = self._running.pop(number, None)
        if hold is not None:
            self._memories.let_go(hold)

    def withhold(self, number: int) -> asyncio.Future[None]:
        """It may still run. The future is done when it does not."""
        hold = self._running.pop(number, None)
        if hold is None:  # proven to be over
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            over.set_result(None)
            return over
        self._withheld[number] = hold
        return asyncio.wrap_future(hold.over)

    def settled(self, number: int) -> None:
        """Nothing of this move runs, for certain."""
        hold = self._withheld.pop(number, None)
        if hold is not None:
            self._memories.let_go(hold)

    def proven(self) -> None:
        """The hub process is gone, and every move with it."""
        for moves in (self._running, self._withheld):
            while moves:
                self._memories.let_go(moves.popitem()[1])


def _extents_of(block: Any) -> Addresses:
    if isinstance(block, Scattered):
        return block.extents
    if isinstance(block, Registered):
        return np.array([[block.address, block.stop]], np.uint64)
    if isinstance(block, np.ndarray):
        return _span(block)
    memory = Registered.of(block)
    return np.array([[memory.address, memory.stop]], np.uint64)


def _span(array: Bytes) -> Addresses:
    """[1, 2]: first and last + 1 address of an array."""
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if n]
    start = int(array.ctypes.data) + sum(r for r in reach if r < 0)
    stop = int(array.ctypes.data) + sum(r for r in reach if r > 0) + array.itemsize
    return np.array([[start, stop if array.size else start]], np.uint64)


def _overlap(some: Addresses, others: Addresses) -> bool:
    """Whether any of [n, 2] and any of [m, 2] have a byte in common."""
    if len(some) > len(others):
        some, others = others, some
    order = np.argsort(others[:, 0], kind="stable")
    starts, stops = others[order, 0], np.maximum.accumulate(others[order, 1])
    at = np.searchsorted(starts, some[:, 1], side="left")  # others that begin before its end
    reach = np.where(at > 0, stops[np.maximum(at, 1) - 1], 0)
    return bool((reach > some[:, 0]).any())
