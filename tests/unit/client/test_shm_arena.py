"""The client's mapping: what it may touch, how long it lives, and what a fork inherits."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from kvclient.errors import Gone, Unavailable, Unsupported
from kvclient.transfer.shm import ShmArena, open_arena
from tests.unit.client.conftest import SESSION, TOKEN, ServedArena

UNIT = 16 << 10


def python(served: ServedArena, code: str, **values: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in another process, where `opened(read_only=...)` maps the arena."""
    head = f"""
        import os, signal, sys, ctypes, time
        import numpy as np
        from kvclient.transfer.shm import open_arena
        def opened(client=9, read_only=False):
            return open_arena({served.path!r}, session={SESSION}, client=client, token={TOKEN!r},
                              read_only=read_only, deadline_s=5)
    """
    source = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False
    )


def dead(served: ServedArena, client: int) -> bool:
    """Whether the lock becomes free; the server's own copy goes a moment after it was passed."""
    for _ in range(1000):
        if served.liveness.is_dead(client):
            return True
        time.sleep(0.01)
    return False


def test_both_sides_see_the_same_bytes(served: ServedArena) -> None:
    arena = served.open()
    arena.writing(UNIT, 8)[:] = np.arange(8)
    assert served.arena.slot(UNIT, 8).tolist() == list(range(8))
    assert arena.reading(UNIT, 8).tolist() == list(range(8))
    assert (arena.arena_id, arena.epoch) == (served.arena.arena_id, served.arena.epoch)
    arena.close()


def test_views_for_readers_are_read_only(served: ServedArena) -> None:
    arena = served.open()
    view = arena.reading(0, 8)
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    arena.close()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_reading_map_cannot_be_written_behind_numpy(served: ServedArena, read_only: bool) -> None:
    """Isolation is the page table's, not NumPy's flag: the process that tries dies."""
    ended = python(
        served,
        f"""
        view = opened(read_only={read_only}).reading(0, 4096)
        ctypes.memset(view.ctypes.data, 255, 4096)
        """,
    )
    assert ended.returncode == -signal.SIGSEGV
    assert not served.arena.slot(0, 4096).any()


def test_a_reader_cannot_ask_for_a_writable_view(served: ServedArena) -> None:
    arena = served.open(read_only=True)
    with pytest.raises(Unsupported, match="opened for reading only"):
        arena.writing(0, 8)
    assert arena.drained
    arena.close()


@pytest.mark.parametrize(("offset", "length"), [(-UNIT, 8), (0, 1 << 40), (1 << 62, 8)])
def test_places_outside_the_arena_are_refused(
    served: ServedArena, offset: int, length: int
) -> None:
    arena = served.open()
    with pytest.raises(Unavailable, match="outside its arena"):
        arena.reading(offset, length)
    with pytest.raises(Unavailable, match="outside its arena"):
        arena.writing(offset, length)
    arena.close()


# ---- lifetime --------------------------------------------------------------------------------


def test_the_lock_goes_with_the_last_writable_view(served: ServedArena) -> None:
    arena = served.open()
    view = arena.writing(0, 64)[8:16]
    arena.close()
    assert not arena.drained
    assert not served.liveness.is_dead(1), "somebody may still write through the view"
    view[:] = 7
    assert served.arena.slot(8, 8).tolist() == [7] * 8
    del view
    gc.collect()
    assert arena.drained
    assert dead(served, 1)


def test_a_reading_view_holds_no_lock(served: ServedArena) -> None:
    arena = served.open()
    view = arena.reading(0, 64)
    arena.close()
    assert arena.drained
    assert dead(served, 1)
    assert view.sum() == 0, "still valid memory"


def test_a_closed_arena_gives_no_views(served: ServedArena) -> None:
    arena = served.open()
    arena.close()
    with pytest.raises(Gone):
        arena.reading(0, 8)
    with pytest.raises(Gone):
        arena.writing(0, 8)
    assert not arena.alive()
    assert not arena.current(0, 0)


def test_a_killed_process_is_dead_for_the_lock(served: ServedArena) -> None:
    ended = python(served, "arena = opened(); os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.returncode == -signal.SIGKILL
    assert dead(served, 9)


def test_opening_and_closing_leaks_nothing(served: ServedArena) -> None:
    def state() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(str(served.directory))
        return len(os.listdir("/proc/self/fd")), maps

    served.open(1).close()
    before = state()
    for client in range(2, 30):
        served.open(client, read_only=client % 2 == 0).close()
    for _ in range(1000):  # the server's thread closes its own copies a moment later
        fds, maps = state()
        if fds <= before[0]:
            break
        time.sleep(0.01)
    assert fds <= before[0]
    assert maps == before[1]


# ---- currency --------------------------------------------------------------------------------


def test_another_generation_is_not_current(served: ServedArena) -> None:
    arena = served.open()
    served.arena.write_reserved(UNIT, UNIT, 5, (1,))
    assert arena.current(UNIT, 5)
    assert not arena.current(UNIT, 4)
    assert not arena.current(0, 5)
    served.arena.write_invalid(UNIT, 6)
    assert not arena.current(UNIT, 5)
    arena.close()


def test_a_restarted_server_is_noticed_in_the_mapping(served: ServedArena) -> None:
    arena = served.open()
    served.arena.write_reserved(UNIT, UNIT, 5, (1,))
    assert arena.alive()
    served.arena._header.step(0, 2, served.arena.epoch + 1, seed=0)  # what opening it again does
    assert not arena.alive()
    assert not arena.current(UNIT, 5)
    arena.close()


# ---- forks -----------------------------------------------------------------------------------


def test_a_forked_child_has_neither_map_nor_lock(served: ServedArena) -> None:
    ended = python(
        served,
        """
        arena = opened()
        view = arena.writing(0, 4096)
        child = os.fork()
        if child == 0:
            try:
                arena.reading(0, 8)
            except Exception as error:
                os.write(1, (type(error).__name__ + "\\n").encode())
            ctypes.memset(view.ctypes.data, 255, 4096)  # not mapped here: a fault
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status))
        view[:3] = 9
        """,
    )
    assert ended.stdout.split() == ["Unsupported", str(int(signal.SIGSEGV))]
    assert served.arena.slot(0, 4).tolist() == [9, 9, 9, 0]


def test_a_child_that_lives_on_does_not_hold_the_parents_lock(served: ServedArena) -> None:
    """The child inherits the descriptor, but can write nothing: its copy must go."""
    ended = python(
        served,
        """
        arena = opened()
        if os.fork() == 0:
            os.setsid()
            devnull = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(devnull, fd)
            time.sleep(2)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert ended.returncode == -signal.SIGKILL
    assert dead(served, 9)


def test_a_child_does_not_unmap_what_took_the_maps_place(served: ServedArena) -> None:
    """The child drops its objects while something else stands at the arena's address."""
    ended = python(
        served,
        """
        import gc, mmap
        arena = opened()
        address = arena.reading(0, 1).ctypes.data
        size = arena.data_bytes
        child = os.fork()
        if child == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [
                ctypes.c_long]
            fixed = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            page = address & ~4095
            assert libc.mmap(page, size & ~4095, 3, fixed, -1, 0) == page
            arena.close()
            del arena
            gc.collect()
            ctypes.memset(page, 1, 4096)  # a fault, had the child unmapped it
            os._exit(5)
        _, status = os.waitpid(child, 0)
        print(os.WIFEXITED(status) and os.WEXITSTATUS(status))
        """,
    )
    assert ended.stdout.split() == ["5"], ended.stderr


# ---- refusals --------------------------------------------------------------------------------


def test_no_socket_is_unsupported_and_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with pytest.raises(Unsupported, match=r"none\.sock cannot be mapped"):
        open_arena(path, session=1, client=1, token=TOKEN, read_only=False, deadline_s=1)


def test_a_refusal_says_why(served: ServedArena) -> None:
    with pytest.raises(Unavailable, match="unknown session, client or token"):
        open_arena(served.path, session=1, client=1, token=TOKEN, read_only=False, deadline_s=1)


def test_a_second_writable_mapping_is_refused(served: ServedArena) -> None:
    first = served.open(4)
    with pytest.raises(Unavailable, match="already holds a writable mapping"):
        served.open(4)
    assert isinstance(first, ShmArena)
    first.close()
