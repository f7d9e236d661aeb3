"""The steps of one job: copy a slot between tiers, or verify one. Runs on the mover's threads.

Rule 1: before a byte of a host slot changes, its entry is INVALID with the new generation.
Rule 2: what arrives in the host arena from another tier is verified, cell by cell and against the
root, before its entry is VALID.
Rule 3: wrong bytes are an answer (`corrupt`), not an exception; a medium that fails raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvproto.checksum import root_of, trailer_of
from kvproto.namespace import NamespaceSpec
from kvserver.core.events import (
    JobDone,
    Place,
    Tier,
)
from kvserver.core.instructions import (
    BlockInfo,
    Copy,
    JobKind,
    Verify,
)
from kvserver.runtime import failpoints
from kvserver.runtime.device import DeviceTier
from kvserver.runtime.disk import DiskTier
from kvserver.tiers.checksums import verify_slot
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.host import HostArena

ALIGN = 4096
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a block is: cells, bytes of a cell, bytes of payload and trailer."""

    cells: int
    cell_bytes: int
    used_bytes: int

    @classmethod
    def of(cls, spec: NamespaceSpec, info: BlockInfo) -> Shape:
        grid = spec.grid
        return cls(grid.cells, grid.cell_bytes(info.tokens), grid.slot_bytes(info.tokens))

    @property
    def io_bytes(self) -> int:
        """What direct I/O moves: whole sectors, within the slot."""
        return -(-self.used_bytes // ALIGN) * ALIGN


class Copies:
    """Carries out PROMOTE, UPLOAD, DOWNLOAD and Verify. SPILL is the disk tier's own."""

    def __init__(
        self, host: HostArena, *, disk: DiskTier | None, device: DeviceTier | None
    ) -> None:
        self._host = host
        self._disk = disk
        self._device = device

    def carry_out(self, job: Copy | Verify, spec: NamespaceSpec) -> JobDone:
        """The job's end. Raises what the medium raises."""
        shape = Shape.of(spec, job.info)
        if isinstance(job, Verify):
            return self._verify(job, spec, shape)
        if job.kind is JobKind.PROMOTE:
            return self._promote(job, spec, shape)
        if job.kind is JobKind.UPLOAD:
            return self._upload(job, shape)
        assert job.kind is JobKind.DOWNLOAD, job
        return self._download(job, spec, shape)

    def _view(self, place: Place, shape: Shape) -> Bytes:
        return self._host.slot(place.offset, shape.io_bytes)

    def _promote(self, job: Copy, spec: NamespaceSpec, shape: Shape) -> JobDone:
        assert self._disk is not None
        record = self._disk.record(job.source, job.info)
        if record is None:
            return JobDone(job.job, "the journal does not know this block", corrupt=True)
        view = self._view(job.target, shape)
        self._host.write_invalid(job.target.offset, job.target.generation)
        self._disk.read(job.source, view)
        if not verify_slot(view, shape.cells, shape.cell_bytes, record.root):
            return JobDone(job.job, "checksums differ on disk", corrupt=True)
        failpoints.hit("promote.before_valid")
        self._write_valid(job, spec, record.root)
        return JobDone(job.job)

    def _upload(self, job: Copy, shape: Shape) -> JobDone:
        assert self._device is not None
        self._device.upload(job.target, self._view(job.source, shape))
        return JobDone(job.job)

    def _download(self, job: Copy, spec: NamespaceSpec, shape: Shape) -> JobDone:
        assert self._device is not None
        view = self._view(job.target, shape)
        self._host.write_invalid(job.target.offset, job.target.generation)
        self._device.download(job.source, view)
        root = root_of(trailer_of(view, shape.cells, shape.cell_bytes))
        if not verify_slot(view, shape.cells, shape.cell_bytes, root):
            return JobDone(job.job, "checksums differ on the device", corrupt=True)
        self._write_valid(job, spec, root)
        return JobDone(job.job)

    def _write_valid(self, job: Copy, spec: NamespaceSpec, root: int) -> None:
        target, info = job.target, job.info
        self._host.write_valid(
            target.offset,
            target.slot_bytes,
            target.generation,
            spec.tag,
            info.key,
            info.parent,
            info.tokens,
            root,
        )

    def _verify(self, job: Verify, spec: NamespaceSpec, shape: Shape) -> JobDone:
        place = job.place
        if place.tier is Tier.HOST:
            entry = self._host.read_entry(place.offset)
            known = isinstance(entry, ValidEntry) and (
                (entry.generation, entry.key, entry.tag)
                == (place.generation, job.info.key, spec.tag)
            )
            if not known:
                return JobDone(job.job, "the arena does not know this block", corrupt=True)
            assert isinstance(entry, ValidEntry)
            view, root = self._view(place, shape), entry.root
        elif place.tier is Tier.DISK:
            assert self._disk is not None
            record = self._disk.record(place, job.info)
            if record is None:
                return JobDone(job.job, "the journal does not know this block", corrupt=True)
            view, root = aligned_buffer(shape.io_bytes), record.root
            self._disk.read(place, view)
        else:
            assert self._device is not None
            view = aligned_buffer(shape.io_bytes)
            self._device.download(place, view)
            root = root_of(trailer_of(view, shape.cells, shape.cell_bytes))
        failpoints.hit("verify.read")
        if not verify_slot(view, shape.cells, shape.cell_bytes, root):
            return JobDone(job.job, "checksums differ", corrupt=True)
        return JobDone(job.job)


def aligned_buffer(length: int) -> Bytes:
    """Memory that direct I/O accepts."""
    raw = np.empty(length + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + length]
