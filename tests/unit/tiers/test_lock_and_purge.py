"""The directory lock, and the removal of a directory that nobody holds."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kvproto.errors import FieldError
from kvserver.tiers import lock as locks
from kvserver.tiers.errors import DirectoryBusy
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.tiers.lock import LOCK_NAME, DirectoryLock
from kvserver.tiers.names import NamespaceLog
from kvserver.tiers.purge import purge_host

BUDGET = 2 << 20
HOLDER = """
import sys
from pathlib import Path
from kvserver.tiers.lock import DirectoryLock
lock = DirectoryLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_of_another_process_is_respected_and_ends_with_sigkill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DirectoryBusy, match=f"pid {process.pid}"):
            DirectoryLock.acquire(tmp_path)
        process.kill()
        process.wait()
    with DirectoryLock.acquire(tmp_path):
        pass


@pytest.mark.parametrize("lingers_s", [0.5, 30.0])
def test_a_copy_of_the_lock_is_waited_for_when_its_server_is_gone(
    tmp_path: Path, lingers_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of the server's own that is about to end: it is not another server."""
    monkeypatch.setattr(locks, "ENDING_S", 5.0 if lingers_s < 1 else 0.3)
    code = "lock = DirectoryLock.acquire(Path(sys.argv[1]))"
    lingering = HOLDER.replace("sys.stdin.read()", "import os, time; time.sleep(60)").replace(
        code, f"{code}\nimport os\nif os.fork() == 0:\n    import time; time.sleep({lingers_s})\n"
        "    os._exit(0)"
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", lingering, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            process.kill()
            process.wait()
            if lingers_s < 1:
                DirectoryLock.acquire(tmp_path).release()
            else:
                with pytest.raises(DirectoryBusy, match=f"pid {process.pid}"):
                    DirectoryLock.acquire(tmp_path)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_is_free_after_release_and_release_may_repeat(tmp_path: Path) -> None:
    lock = DirectoryLock.acquire(tmp_path)
    lock.release()
    lock.release()
    with DirectoryLock.acquire(tmp_path), pytest.raises(DirectoryBusy):
        DirectoryLock.acquire(tmp_path)


def test_a_lock_file_removed_between_open_and_flock_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, []

    def remove_then_lock(fd: int, operation: int) -> None:
        if not removed:
            (tmp_path / LOCK_NAME).unlink()
            removed.append(True)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with DirectoryLock.acquire(tmp_path) as lock:
        assert os.fstat(lock._fd).st_ino == (tmp_path / LOCK_NAME).stat().st_ino


def test_purge_removes_what_a_server_left(shm_dir: Path) -> None:
    host = shm_dir / "host"
    arena = HostArena.open(host, BUDGET)
    arena.prefault(0, arena.data_bytes)
    log = NamespaceLog.open(host)
    log.add(b"namespace")
    os.close(Liveness(host).grant(1))
    with pytest.raises(DirectoryBusy):
        purge_host(host)
    assert arena.path.exists()
    log.close()
    arena.close()
    assert purge_host(host) > BUDGET - (1 << 16)
    assert not host.exists()


def test_purge_leaves_what_is_not_the_servers(shm_dir: Path) -> None:
    host = shm_dir / "host"
    HostArena.open(host, BUDGET).close()
    (host / "notes.txt").write_text("mine")
    purge_host(host)
    assert [path.name for path in host.iterdir()] == ["notes.txt"]
    with pytest.raises(FieldError, match="host_dir"):
        purge_host(host)
    assert [path.name for path in host.iterdir()] == ["notes.txt"]
