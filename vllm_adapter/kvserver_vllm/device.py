"""Pages of KV tensors on a device: CUDA's, and ROCm's, which torch calls so too.

    pages on the device --gather--> room on the device --copy engine--> room on the host --> cells

The device gathers (and scatters) whatever the strides are, so that its copy engine moves long runs
of bytes. Rooms on the host are pinned, and the processor copies between them and the cells while
the next part is under way. Where there are many cores, several threads share such a copy.

Rules:
  1. A call returns when its copies have ended, and gives up the interpreter's lock meanwhile. It
     may come from any thread; one at a time has the lane of a device.
  2. The lane's stream is its own and waits for no other: callers see to it that what they gather
     has been written, and that nobody uses what they scatter into (`kvserver_vllm.marks`).
  3. A lane has ROOMS rooms of ROOM_BYTES, on the device and pinned, made when it is first used;
     they grow only for a single layer's page that is larger. It has threads for the cores that its
     first caller may run on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvserver_vllm.cores import sharing
from kvserver_vllm.layout import (
    SKIP,
    Bytes,
    PlacedPages,
    Where,
    base_of,
    check_within,
    storage_of,
    stretches,
)

ROOMS = 2
ROOM_BYTES = 16 << 20
SHARE_BYTES = 1 << 20  # what a further thread is worth waking up for
DEVICES = ("cpu", "cuda")
"""Where KV may lie. With CPU tensors everything here works too; HostPages are faster."""


class DevicePages(PlacedPages):
    """Pages of KV tensors on one device, of one KV cache group."""

    def __init__(
        self, encoding: str, tensors: Sequence[Any], *, room_bytes: int = ROOM_BYTES
    ) -> None:
        """`tensors` are the rank's layers in order, torch tensors on that device."""
        raws = [storage_of(tensor) for tensor in tensors]
        super().__init__(encoding, tensors, [base_of(raw) for raw in raws])
        self.memory = list({base_of(raw): raw for raw in raws}.values())  # each storage once
        found = stretches(self._described, self._bases, self.format)
        form = self.format
        self._item = _item_bytes(
            [form.page_bytes, *(part.offset for part in form.parts)],
            [where for stretch in found for where in stretch.parts],
        )
        self._stretches = [
            (stretch, [_view(raws[stretch.start], where, self._item) for where in stretch.parts])
            for stretch in found
        ]
        self._device = tensors[0].device
        self._room_bytes = max(room_bytes, self.heads * form.page_bytes)

    def gather(self, layer: int, stop: int, page_ids: Sequence[int], out: Bytes) -> None:
        """As in `Pages`."""
        under_way: tuple[_Room, _Portion] | None = None

        def finish(room: _Room, portion: _Portion) -> None:
            room.wait()
            lane.copy(portion.of(out), room.array(self._shape(portion)))

        lane = _lane_of(self._device)
        with lane.turn(self._room_bytes) as rooms:
            for at, portion in enumerate(self._portions(layer, stop, page_ids)):
                room = rooms[at % ROOMS]
                cells = room.cells(self._shape(portion), self._item)
                for target, engine, index in self._pairs(portion, cells):
                    target.copy_(engine[index])
                room.fetch(self._shape(portion))
                if under_way is not None:
                    finish(*under_way)
                under_way = room, portion
            if under_way is not None:
                finish(*under_way)

    def scatter(self, layer: int, stop: int, page_ids: Sequence[int], cells: Bytes) -> None:
        """As in `Pages`."""
        lane = _lane_of(self._device)
        with lane.turn(self._room_bytes) as rooms:
            for at, portion in enumerate(self._portions(layer, stop, page_ids)):
                room = rooms[at % ROOMS]
                room.wait()
                lane.copy(room.array(self._shape(portion)), portion.of(cells))
                room.send(self._shape(portion))
                sent = room.cells(self._shape(portion), self._item)
                for source, engine, index in self._pairs(portion, sent):
                    engine[index] = source
                room.mark()
            for room in rooms:
                room.wait()

    def _portions(self, layer: int, stop: int, page_ids: Sequence[int]) -> Iterator[_Portion]:
        """What fits into a room each, all of it together."""
        row = self.heads * self.format.page_bytes
        layers = max(1, min(stop - layer, self._room_bytes // row))
        pages = max(1, self._room_bytes // (row * layers))
        for first in range(layer, stop, layers):
            last = min(first + layers, stop)
            cells = slice(first - layer, last - layer)
            for start, end in _wanted(page_ids, pages):
                yield _Portion(first, last, cells, slice(start, end), page_ids[start:end])

    def _shape(self, portion: _Portion) -> tuple[int, int, int, int]:
        count = len(portion.ids)
        return portion.stop - portion.start, self.heads, count, self.format.page_bytes

    def _pairs(self, portion: _Portion, cells: Any) -> Iterator[tuple[Any, Any, Any]]:
        """(part of `cells`, engine memory, index into it), of equal shape
        [layers, pages, heads, rows, items]."""
        import torch

        ids = torch.tensor(portion.ids, device=self._device)
        block = torch.div(ids, self.format.pages_per_block, rounding_mode="floor")
        index = (slice(None), block, ids - block * self.format.pages_per_block)
        for stretch, views in self._stretches:
            first, last = max(portion.start, stretch.start), min(portion.stop, stretch.stop)
            if first >= last:
                continue
            mine = cells[first - portion.start : last - portion.start]
            for part, view in zip(self.format.parts, views, strict=True):
                start, stop = part.offset // self._item, (part.offset + part.size_bytes)
                piece = mine[..., start : stop // self._item].unflatten(-1, (part.rows, -1))
                engine = view[first - stretch.start : last - stretch.start]
                yield piece.permute(0, 2, 1, 3, 4), engine, index


@dataclass(frozen=True, slots=True)
class _Portion:
    """Layers [start, stop) of some pages of a call."""

    start: int
    stop: int
    layers: slice
    pages: slice
    ids: Sequence[int]

    def of(self, cells: Bytes) -> Bytes:
        """Its part of the call's cells."""
        return cells[self.layers, :, self.pages]


def _wanted(page_ids: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most so many positions, without those of SKIP."""
    start = 0
    while start < len(page_ids):
        if page_ids[start] == SKIP:
            start += 1
            continue
        end = start + 1
        while end < len(page_ids) and end - start < most and page_ids[end] != SKIP:
            end += 1
        yield start, end
        start = end


class _Room:
    """Memory on the device and as much, pinned, on the host. Used within a turn of its lane."""

    def __init__(self, device: Any, size: int) -> None:
        import torch

        self._cuda = device.type == "cuda"
        self._on_device = torch.empty(size, dtype=torch.uint8, device=device)
        self._on_host = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        self._bytes: Bytes = self._on_host.numpy()
        self._event = torch.cuda.Event(blocking=True) if self._cuda else None
        self.size = size

    def cells(self, shape: tuple[int, int, int, int], item: int) -> Any:
        """On the device: [layers, heads, pages, items of a page]."""
        used = self._on_device[: math.prod(shape)].view(_dtype(item))
        return used.view(*shape[:-1], shape[-1] // item)

    def array(self, shape: tuple[int, int, int, int]) -> Bytes:
        """On the host."""
        return self._bytes[: math.prod(shape)].reshape(shape)

    def fetch(self, shape: tuple[int, int, int, int]) -> None:
        """Begin to copy to the host what `cells` of this shape hold."""
        self._copy(self._on_host, self._on_device, math.prod(shape))
        self.mark()

    def send(self, shape: tuple[int, int, int, int]) -> None:
        """Begin to copy to the device what `array` of this shape holds."""
        self._copy(self._on_device, self._on_host, math.prod(shape))

    def _copy(self, target: Any, source: Any, size: int) -> None:
        target[:size].copy_(source[:size], non_blocking=True)

    def mark(self) -> None:
        """`wait` is for what was begun so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until what was marked has ended."""
        if self._event is not None:
            self._event.synchronize()


class _Lane:
    """A device's stream and rooms, for one call at a time."""

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms: list[_Room] = []
        self._threads = sharing()
        self._others = ThreadPoolExecutor(
            max(1, self._threads - 1), thread_name_prefix="kvserver-pages"
        )

    def copy(self, target: Bytes, source: Bytes) -> None:
        """Of equal shapes, on the host. It has ended when this returns, however that is."""
        count = min(self._threads, target.nbytes // SHARE_BYTES)
        axis = next((axis for axis in range(3) if target.shape[axis] >= count), None)
        if count < 2 or axis is None:
            target[...] = source
            return
        shares = zip(
            *(np.array_split(cells, count, axis) for cells in (target, source)), strict=True
        )
        mine, *others = shares
        futures: list[Future[None]] = []
        try:
            futures += (self._others.submit(np.copyto, *share) for share in others)
            np.copyto(*mine)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    @contextmanager
    def turn(self, room_bytes: int) -> Iterator[list[_Room]]:
        """Rooms of at least that size; within, the lane's stream is the thread's current one.
        Nothing runs in them at the end, however it comes."""
        import torch

        with self._lock, torch.inference_mode(), ExitStack() as stack:
            if self._stream is not None:
                # Left so: a thread that goes back to GPU 0 makes a context there.
                torch.cuda.set_device(self._device)
                stack.enter_context(torch.cuda.stream(self._stream))
                stack.callback(self._stream.synchronize)
            if not self._rooms or self._rooms[0].size < room_bytes:
                self._rooms.clear()
                self._rooms = [_Room(self._device, room_bytes) for _ in range(ROOMS)]
            yield self._rooms


_lanes: dict[Any, _Lane] = {}
_lanes_lock = threading.Lock()


def _lane_of(device: Any) -> _Lane:
    """The one lane of a device in this process."""
    with _lanes_lock:
        lane = _lanes.get(device)
        if lane is None:
            lane = _lanes[device] = _Lane(device)
        return lane


def _item_bytes(lengths: Sequence[int], places: Sequence[Where]) -> int:
    """The widest item, in bytes, that all of this is a whole number of."""
    counts = [*lengths]
    for where in places:
        counts += [where.start, where.shape[-1], *where.strides[:-1]]
    return next(size for size in (8, 4, 2, 1) if not any(n % size for n in counts))


def _view(raw: Any, where: Where, item: int) -> Any:
    """[layers, blocks, pages per block, heads, rows, items] over the engine's memory."""
    check_within(where, raw.numel())
    words = raw[: raw.numel() // item * item].view(_dtype(item))
    shape = (*where.shape[:-1], where.shape[-1] // item)
    strides = (*(stride // item for stride in where.strides[:-1]), 1)
    return words.as_strided(shape, strides, where.start // item)


def _dtype(item: int) -> Any:
    import torch

    return {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[item]
