"""What one call of Move asks for, and which bytes that is on both sides.

Rule 1: pure: nothing here looks at the arena's directory, a session or a clock.
Rule 2: an Order that stands here is consistent in itself (the service checked its fields); whether
it may be carried out is `runtime.moves`' to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvproto.frames import Op, Place
from kvproto.grid import Region
from kvproto.nixlib import Memory
from kvserver.runtime.extents import Extents
from kvserver.transfer.nixl.work import Work

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Order:
    """What one Move asks for: a region of granted slots.

    `addresses` [places, pieces]: where the client has the pieces of each region: one, one a layer,
    one a cell, or several a cell. `checksums` [places, cells of the region] of a WRITE.
    """

    number: int
    op: Op
    region: Region
    places: Sequence[Place]
    addresses: Numbers
    checksums: Numbers | None
    deadline_s: float

    @property
    def payload_bytes(self) -> int:
        return sum(self.region.cells * place.cell_bytes for place in self.places)

    def memory(self, extents: Extents) -> tuple[Memory, int]:
        """The kind of memory and the device that every piece lies in. FieldError where it is not
        all within the client's extents."""
        pieces = self.addresses.shape[1]
        sizes = [self.region.cells * place.cell_bytes // pieces for place in self.places]
        return extents.kind_of(self.addresses, np.array(sizes, np.uint64)[:, None])

    def work(
        self, number: int, client: int, chosen: Sequence[int], kind: tuple[Memory, int]
    ) -> Work:
        """These places of it, for the worker; `kind` is the client's memory and device."""
        places = [self.places[at] for at in chosen]
        rows = list(chosen)
        every = len(rows) == len(self.places)
        sums = self.checksums
        return Work(
            number=number,
            client=client,
            read=self.op is Op.WRITE,
            memory=kind[0],
            device=kind[1],
            layers=places[0].layers,  # as those of the whole call are
            heads=places[0].heads,
            region=self.region,
            offsets=np.array([place.offset for place in places], np.uint64),
            generations=np.array([place.generation for place in places], np.uint64),
            cell_bytes=np.array([place.cell_bytes for place in places], np.uint64),
            addresses=self.addresses if every else self.addresses[rows],
            checksums=sums if every or sums is None else sums[rows],
        )


@dataclass(frozen=True, slots=True)
class Moved:
    statuses: Bytes
    trailers: bytes
    terminal: bool
