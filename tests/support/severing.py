"""A relay in front of a TCP port that cuts single processes off."""

from __future__ import annotations

import contextlib

from tests.support.relay import Relay, Work, pump, shut


class SeveringRelay(Relay):
    """`sever(pid)` ends that process's connections and refuses its new ones, until `mend()`.
    `refused` says how many were.
    """

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._severed: set[int] = set()
        self.refused = 0

    def sever(self, pid: int) -> int:
        """How many connections the process had."""
        with self._changed:
            self._severed.add(pid)
            mine = [self._pairs[port] for port in _ports(pid) if port in self._pairs]
        for pair in mine:
            shut(*pair)
        return len(mine)

    def mend(self) -> None:
        with self._changed:
            self._severed.clear()

    def admit(self, port: int) -> Work | None:
        if any(port in _ports(pid) for pid in self._severed):
            self.refused += 1
            return None
        return pump


def _ports(pid: int) -> set[int]:
    """Local ports of a process's TCP connections."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return {one.laddr.port for one in psutil.Process(pid).net_connections("tcp")}
    return set()
