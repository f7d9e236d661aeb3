"""The process behind `kvserver.transfer.hashing`: answers with checksums until its socket ends.

    python -m kvserver.transfer.hasher FD

The first message is its setup, as JSON, with the arena's descriptor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

import numpy as np

from kvproto.frames import Place
from kvproto.grid import Region
from kvserver.transfer.hashing import HEAD, MAGIC, SETUP_BYTES
from kvserver.transfer.priority import step_back
from kvserver.transfer.tcp.slots import Slots

PLACE_BYTES = 16


def serve(end: socket.socket) -> None:
    raw, fds, _, _ = socket.recv_fds(end, SETUP_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not raw:
        return  # the server has changed its mind
    setup = json.loads(raw)
    slots = Slots(
        fds[0], setup["file_bytes"], arena_id=bytes.fromhex(setup["arena_id"]),
        epoch=setup["epoch"],
    )  # fmt: skip
    os.close(fds[0])
    step_back(setup["nice"])
    while head := _take(end, HEAD.size):
        magic, count, layers, heads, *rest = HEAD.unpack(head)
        assert magic == MAGIC, magic
        region = Region(*rest)
        told = np.frombuffer(_take(end, count * PLACE_BYTES), "<u8").reshape(count, 2)
        sums: list[int] = []
        for offset, cell_bytes in told.tolist():
            place = Place(0, offset, 0, cell_bytes, layers, heads, region)
            assert slots.within(place), place
            slots.map_in(place)
            rows = slots.rows(place, region)
            sums += rows.checksums(0, rows.cells)
        end.sendall(np.array(sums, "<u8").tobytes())


def _take(end: socket.socket, length: int) -> bytes:
    """Exactly so many bytes; none when the socket ends."""
    taken = bytearray(length)
    view = memoryview(taken)
    while view:
        count = end.recv_into(view)
        if not count:
            return b""
        view = view[count:]
    return bytes(taken)


def main() -> None:
    # A signal to the whole group is for the server, which still has transfers to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as end:
        end.set_inheritable(False)
        try:
            serve(end)
        except ConnectionError:  # the server is gone, or has hung up
            return


if __name__ == "__main__":
    main()
