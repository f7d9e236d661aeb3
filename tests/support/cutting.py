"""A relay in front of a TCP port that cuts connections after a number of bytes."""

from __future__ import annotations

import socket
from functools import partial

from tests.support.relay import Relay, Work, pump


class CuttingRelay(Relay):
    """Relays `cuts[0]` bytes (both directions together) of the first connection and cuts it there,
    then the second after `cuts[1]`, and so on; later ones are whole. `cut` says how many it has
    cut.
    """

    def __init__(self, target: str, cuts: list[int]) -> None:
        super().__init__(target)
        self._cuts = list(cuts)
        self.cut = 0

    def admit(self, port: int) -> Work:
        return partial(self._relay, limit=self._cuts.pop(0) if self._cuts else None)

    def _relay(self, near: socket.socket, far: socket.socket, limit: int | None) -> None:
        if pump(near, far, limit):
            self.cut += 1
