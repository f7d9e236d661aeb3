"""Named places where a test may kill, delay or fail the server.

    KVSERVER_FAILPOINTS="spill.write=kill@3;promote.read=sleep:0.5;journal.put=errno:ENOSPC@3-5"

`name=action[@first[-last]]`, separated by semicolons. Actions: `kill` (SIGKILL to this process),
`sleep:SECONDS`, `errno:NAME` (raises OSError). Without a range every hit fires; `@3` fires at the
third hit only, `@3-5` at the third to the fifth.

Rule 1: names are those of NAMES, so that a test that names a place which is gone fails at once.
Rule 2: with nothing armed, a hit is one test of an empty dict.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass

ENVIRONMENT_VARIABLE = "KVSERVER_FAILPOINTS"

NAMES = frozenset(
    {
        "start.after_lock",  # the directory is ours, nothing was read yet
        "start.before_restore",  # arena and journal are open
        "start.before_ready",  # everything is restored, not yet served
        "commit.before_trailer",  # cells are in the arena, no checksum is
        "commit.before_valid",  # trailer written, entry still RESERVED
        "commit.after_valid",  # entry VALID, the client has no answer yet
        "reserve.after_entry",  # entry RESERVED, the client has no answer yet
        "spill.before_invalid",
        "spill.before_write",
        "spill.write",  # before each block's write
        "spill.before_sync",
        "spill.before_valid",  # bytes are synced, the journal does not know them
        "spill.before_wal_sync",
        "spill.after_valid",
        "promote.read",
        "promote.before_valid",  # bytes are in the arena and verified, entry not VALID
        "journal.put",
        "journal.sync",
        "disk.reopen",
        "device.upload",  # before the copy
        "device.download",
        "verify.read",
        "nixl.post",  # the slot is still what was granted, its bytes are to be moved now
    }
)


class FailpointError(ValueError):
    """A specification that cannot be right; says which part."""


@dataclass(slots=True)
class _Failpoint:
    action: str
    argument: str
    first: int
    last: int  # 0: no end
    hits: int = 0


_armed: dict[str, _Failpoint] = {}
_lock = threading.Lock()


def arm(specification: str) -> None:
    """Arm the failpoints of `specification`, in addition to those already armed."""
    for part in filter(None, (p.strip() for p in specification.split(";"))):
        name, failpoint = _parse(part)
        _armed[name] = failpoint


def disarm() -> None:
    _armed.clear()


def armed() -> list[str]:
    return sorted(_armed)


def hit(name: str) -> None:
    """Do what is armed at `name`. OSError for an `errno` action."""
    if _armed and name in _armed:
        _fire(name)


def _fire(name: str) -> None:
    failpoint = _armed[name]
    with _lock:
        failpoint.hits += 1
        count = failpoint.hits
    if count < failpoint.first or (failpoint.last and count > failpoint.last):
        return
    if failpoint.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal takes this thread before it goes on
    elif failpoint.action == "sleep":
        time.sleep(float(failpoint.argument))
    else:
        code: int = getattr(errno, failpoint.argument)
        raise OSError(code, f"{os.strerror(code)} (failpoint {name})")


def _parse(part: str) -> tuple[str, _Failpoint]:
    name, separator, rest = part.partition("=")
    if not separator or name not in NAMES:
        raise FailpointError(
            f"{part!r}: no failpoint of this name; known: {', '.join(sorted(NAMES))}"
        )
    rest, _, span = rest.partition("@")
    action, _, argument = rest.partition(":")
    first, last = _parse_span(part, span)
    if action == "kill" and not argument:
        return name, _Failpoint(action, "", first, last)
    if action == "sleep":
        try:
            seconds = float(argument)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= 3600:
            raise FailpointError(f"{part!r}: sleep takes 0 to 3600 seconds")
        return name, _Failpoint(action, argument, first, last)
    if action == "errno" and isinstance(getattr(errno, argument, None), int):
        return name, _Failpoint(action, argument, first, last)
    raise FailpointError(f"{part!r}: the action is kill, sleep:SECONDS or errno:NAME")


def _parse_span(part: str, span: str) -> tuple[int, int]:
    if not span:
        return 1, 0
    low, dash, high = span.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise FailpointError(f"{part!r}: the range is @first or @first-last, counted from 1")
    first = int(low)
    last = int(high) if dash else first
    if not 1 <= first <= last:
        raise FailpointError(f"{part!r}: the range is @first or @first-last, counted from 1")
    return first, last
