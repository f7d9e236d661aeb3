"""Where the adapter's threads may run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from kvserver_vllm import cores
from kvserver_vllm.config import Settings
from kvserver_vllm.cores import cores_of, parse_cores, sharing
from kvserver_vllm.errors import ConfigError
from kvserver_vllm.events import EventLog
from kvserver_vllm.link import HubLink

MINE = sorted(os.sched_getaffinity(0))
two_cores = pytest.mark.skipif(len(MINE) < 2, reason="needs two cores")


@two_cores
def test_threads_of_a_bound_rank_get_what_its_parent_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread stands for the rank, and this process, whose own thread is free, for its parent."""
    parent = SimpleNamespace(pid=os.getpid())
    monkeypatch.setattr(cores.multiprocessing, "parent_process", lambda: parent)
    found: dict[str, frozenset[int] | None] = {}

    def rank() -> None:
        os.sched_setaffinity(0, {MINE[0]})
        found["bound"] = cores_of("auto", bound=True)
        found["free"] = cores_of("auto", bound=False)
        found["inherit"] = cores_of("inherit", bound=True)

    thread = threading.Thread(target=rank)
    thread.start()
    thread.join()
    near = cores._near({MINE[0]}) & set(MINE)
    assert found == {"bound": near, "free": None, "inherit": None}
    assert sorted(os.sched_getaffinity(0)) == MINE


def test_a_process_that_nobody_bound_is_left_alone() -> None:
    assert cores_of("auto", bound=True) is None


def test_no_core_of_another_numa_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, listed in enumerate(("0-3,8\n", "4-7\n", "\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(listed)
    monkeypatch.setattr(cores, "NODES", tmp_path)
    assert cores._near({1, 2}) == {0, 1, 2, 3, 8}
    assert cores._near({3, 4}) == set(range(9))
    assert cores._near({40}) == {40}


def test_a_list_names_cores_and_ranges() -> None:
    assert parse_cores("3") == {3}
    assert parse_cores("0,4-6,2") == {0, 2, 4, 5, 6}
    assert Settings.parse({"address": "hub:1", "cores": "0,4-6"}).cores == "0,4-6"


@pytest.mark.parametrize("cores", ["", "all", "3-1", "-1", "1,,2", "1-2-3"])
def test_other_lists_are_refused_by_name(cores: str) -> None:
    with pytest.raises(ConfigError, match="cores"):
        Settings.parse({"address": "hub:1", "cores": cores})


def test_cores_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="cores is '4000'"):
        cores_of("4000", bound=False)
    assert sorted(os.sched_getaffinity(0)) == MINE


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (128, 4)])
def test_one_of_four_cores_shares_a_copy(
    monkeypatch: pytest.MonkeyPatch, count: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    assert sharing() == threads
    assert sharing(range(16)) == 4


@two_cores
def test_the_links_thread_runs_where_it_is_told() -> None:
    found: list[set[int]] = []
    done = threading.Event()

    def look() -> None:
        found.append(os.sched_getaffinity(0))
        done.set()

    link = HubLink.shared(
        "127.0.0.1:9",
        tenant="",
        name="test",
        lookup_s=0.1,
        log=EventLog(""),
        cores=frozenset({MINE[1]}),
    )
    try:
        link.post(look)
        assert done.wait(20)
    finally:
        link.close()
    assert found == [{MINE[1]}]
    assert sorted(os.sched_getaffinity(0)) == MINE
