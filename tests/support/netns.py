"""Hosts of a network of their own: network namespaces on one bridge, each with its own address.

    with Network("hub", "p", "d") as network:
        hub = start_server(path, runner=network.runner("hub"), listen=network.address("hub") + ...)
        engine = Engine.start(model, runner=network.runner("p"), config=...)

The bridge stands in a namespace of its own, so this machine's own network has no part in it: hosts
reach each other and nothing else, and nothing else reaches them. At the end of the block,
after a failure too, whatever still runs in the namespaces is killed and they are removed; those of
a test that was killed itself are removed by the next one.

Needs root and `ip` of iproute2: `missing` says what this machine lacks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PREFIX = "kvtest"
DEVICE = "kv0"  # every host's interface; no host may be the bridge, which UCX leaves aside
SUBNET = "198.18.0"  # of the range for tests of networks (RFC 2544)
CALL_S = 10.0
_numbers = itertools.count()


class NetworkError(Exception):
    """`ip` refused; the text is what it said."""


def missing() -> str:
    """Why this machine cannot do it; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network("one"):
            return ""
    except NetworkError as error:
        return f"no network namespaces here: {error}"


class Network:
    """Hosts by name; host i (from 1) has the address 198.18.0.i."""

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts
        self._switch = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"

    def address(self, host: str) -> str:
        return f"{SUBNET}.{1 + self._hosts.index(host)}"

    def runner(self, host: str, **environment: str) -> list[str]:
        """What stands before a command that this host shall run, in its process."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        return ["ip", "netns", "exec", self._name(host), "env", *variables]

    def moved(self, host: str) -> tuple[int, int]:
        """(bytes that a host has sent to the others, bytes that it has received)."""
        told = _ip("-n", self._switch, "-s", "-j", "link", "show", "dev", f"to-{host}")
        (link,) = json.loads(told)
        counters: dict[str, Any] = link["stats64"]
        return int(counters["rx"]["bytes"]), int(counters["tx"]["bytes"])

    @property
    def exists(self) -> bool:
        """Whether any namespace of it is there."""
        return not {*map(self._name, self._hosts), self._switch}.isdisjoint(_existing())

    def _name(self, host: str) -> str:
        return f"{self._switch}-{host}"

    def __enter__(self) -> Self:
        _sweep()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._remove()

    def _build(self) -> None:
        switch = self._switch
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in self._hosts:
            name, port = self._name(host), f"to-{host}"
            _ip("netns", "add", name)
            veth = ("link", "add", port, "netns", switch, "type", "veth")
            _ip(*veth, "peer", "name", DEVICE, "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                _ip("-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for name in (*map(self._name, self._hosts), self._switch):
            _remove(name)


def _existing() -> list[str]:
    """Names of this machine's network namespaces."""
    return [line.split()[0] for line in _ip("netns", "list").splitlines()]


def _sweep() -> None:
    """Remove namespaces whose test process is gone."""
    for name in _existing():
        prefix, _, rest = name.partition("-")
        owner = rest.partition("-")[0]
        if prefix == PREFIX and owner.isdigit() and not Path("/proc", owner).exists():
            _remove(name)


def _remove(name: str) -> None:
    with contextlib.suppress(NetworkError):  # it was never made
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(NetworkError):
        _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    try:
        done = subprocess.run(
            ["ip", *words], capture_output=True, text=True, timeout=CALL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(str(error)) from error
    if done.returncode:
        raise NetworkError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
