"""Failpoints: what they accept, when they fire, and that they are where their names say."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvserver
from kvserver.runtime import failpoints


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def test_nothing_fires_unless_armed() -> None:
    for name in failpoints.NAMES:
        failpoints.hit(name)


def test_an_errno_is_raised_in_its_range_only() -> None:
    failpoints.arm("journal.put=errno:ENOSPC@2-3")
    outcomes = []
    for _ in range(5):
        try:
            failpoints.hit("journal.put")
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno or -1)
    assert outcomes == [0, errno.ENOSPC, errno.ENOSPC, 0, 0]
    failpoints.hit("journal.sync")  # not armed


def test_sleep_sleeps() -> None:
    failpoints.arm("promote.read=sleep:0.1; spill.write=errno:EIO")
    assert failpoints.armed() == ["promote.read", "spill.write"]
    started = time.monotonic()
    failpoints.hit("promote.read")
    assert time.monotonic() - started >= 0.1


def test_kill_kills_at_the_given_hit() -> None:
    script = (
        "from kvserver.runtime import failpoints as f\n"
        "f.arm('spill.write=kill@3')\n"
        "for i in range(9): print(i, flush=True); f.hit('spill.write')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=20)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        "spill.write",
        "spill.write=explode",
        "spill.write=kill:9",
        "spill.write=sleep:x",
        "spill.write=sleep:-1",
        "spill.write=sleep:nan",
        "spill.write=errno:ENOTHING",
        "spill.write=kill@0",
        "spill.write=kill@x",
        "spill.write=kill@5-4",
    ],
)
def test_a_wrong_specification_is_refused(text: str) -> None:
    with pytest.raises(failpoints.FailpointError, match=re.escape(text)):
        failpoints.arm(text)


def test_every_name_is_hit_somewhere_and_every_hit_has_a_name() -> None:
    source = "".join(p.read_text() for p in Path(kvserver.__file__).parent.rglob("*.py"))
    hit = set(re.findall(r'failpoints\.hit\("([a-z_.]+)"\)', source))
    assert hit == failpoints.NAMES
