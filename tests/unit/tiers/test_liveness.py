"""Liveness locks: who may still write, judged by nothing but the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvserver.tiers.errors import TierError
from kvserver.tiers.liveness import CLIENT_ID_MAX, ID_BATCH, LIVE_NAME, Liveness

# Holds an inherited descriptor until it is told to fork a child that holds it too and to exit.
HOLDER = """
import os, sys, time
print("ready", flush=True)
sys.stdin.readline()
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def start_holder(fd: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(fd,),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_client_lives_as_long_as_a_copy_of_its_descriptor(tmp_path: Path) -> None:
    live = Liveness(tmp_path)
    client = live.new_client_id()
    assert live.is_dead(client)  # nothing was granted yet
    fd = live.grant(client)
    copy = os.dup(fd)
    os.close(fd)
    assert not live.is_dead(client)
    assert not live.is_dead(client)  # the test itself holds nothing
    os.close(copy)
    assert live.is_dead(client)
    live.forget(client)
    assert live.is_dead(client)
    assert live.known() == []


def test_the_lock_follows_a_fork_and_ends_with_sigkill(tmp_path: Path) -> None:
    live = Liveness(tmp_path)
    client = live.new_client_id()
    fd = live.grant(client)
    process = start_holder(fd)
    os.close(fd)
    assert not live.is_dead(client)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("fork\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    assert process.wait() == 0
    assert not live.is_dead(client)  # the forked child still holds it
    os.kill(child, signal.SIGKILL)
    assert process.stdout.read() == ""  # returns while the child goes: the lock may be its next
    for _ in range(1000):
        if live.is_dead(client):
            break
        time.sleep(0.01)
    assert live.is_dead(client)
    process.stdin.close()
    process.stdout.close()


def test_a_new_server_can_judge_the_clients_of_the_last(tmp_path: Path) -> None:
    first = Liveness(tmp_path)
    living, dead = first.new_client_id(), first.new_client_id()
    fd, other = first.grant(living), first.grant(dead)
    os.close(other)
    second = Liveness(tmp_path)
    assert (second.is_dead(living), second.is_dead(dead)) == (False, True)
    assert second.known() == [living]  # the dead one's file was removed
    os.close(fd)
    assert second.is_dead(living)


def test_ids_grow_across_restarts(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        live = Liveness(tmp_path)
        seen += [live.new_client_id() for _ in range(ID_BATCH + 3)]
    assert seen == sorted(set(seen))
    assert seen[0] == 1
    assert seen[-1] < 6 * ID_BATCH


def test_ids_grow_although_the_counter_was_lost(tmp_path: Path) -> None:
    live = Liveness(tmp_path)
    client = live.new_client_id()
    fd = live.grant(client)
    for damage in ("", "rubbish"):
        (tmp_path / LIVE_NAME / "next").write_text(damage)
        assert Liveness(tmp_path).new_client_id() > client
    os.close(fd)
    again = Liveness(tmp_path)
    again.raise_floor(1000)  # an id that a directory entry names
    assert again.new_client_id() == 1001
    assert Liveness(tmp_path).new_client_id() > 1001


def test_ids_end(tmp_path: Path) -> None:
    live = Liveness(tmp_path)
    live.raise_floor(CLIENT_ID_MAX)
    with pytest.raises(TierError, match="used up"):
        live.new_client_id()


def test_a_client_is_granted_once(tmp_path: Path) -> None:
    live = Liveness(tmp_path)
    fd = live.grant(5)
    with pytest.raises(FileExistsError, match="client 5"):
        live.grant(5)
    assert not live.is_dead(5)
    os.close(fd)


def test_a_file_left_half_made_is_removed(tmp_path: Path) -> None:
    Liveness(tmp_path)
    (tmp_path / LIVE_NAME / "7.new").write_bytes(b"")
    live = Liveness(tmp_path)
    assert live.known() == []
    os.close(live.grant(7))
