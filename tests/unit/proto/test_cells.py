"""Native code and Python do the same to every row, and nothing to what lies between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

import hatch_build
from kvproto import cells
from kvproto.cells import INTERFACE, ROW_BYTES_MIN, STREAM_BYTES_MIN, Library, copy_rows, hash_rows

ROOT = Path(__file__).resolve().parents[3]
COMPILER = os.environ.get("CC") or next(filter(shutil.which, hatch_build.COMPILERS), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


SETS = {  # of instructions, with what leaves the better ones out
    "best": [],
    "sse2": ["-D__builtin_cpu_supports(name)=0"],
    "portable": ["-U__SSE2__"],
}


@pytest.fixture(scope="module", params=SETS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    path = tmp_path_factory.mktemp("native") / "cells.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hatch_build, "FLAGS", [*hatch_build.FLAGS, *SETS[request.param]])
        hatch_build.build(ROOT, path)
    return Library(path)


@pytest.fixture(params=["native", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "native" and not cells.NATIVE:
        pytest.skip("no C compiler on this machine")
    if request.param == "python":
        monkeypatch.setattr(cells, "_library", None)
    return


def spread(count: int, length: int, gap: int, shift: int) -> np.ndarray:
    """Zeroed rows [count, length], `gap` bytes apart, `shift` bytes into their memory."""
    memory = np.zeros(shift + count * (length + gap), np.uint8)
    return memory[shift:].reshape(count, length + gap)[:, :length]


LENGTHS = st.one_of(
    st.integers(1, 2 * ROW_BYTES_MIN),
    st.integers(ROW_BYTES_MIN, 5000),
    st.sampled_from([1023, 1024, 1025, 1087, 1088, 1089, 2048, 32768, 65536, 65537]),
)


@needs_compiler
@settings(max_examples=100)
@given(
    length=LENGTHS, count=st.integers(0, 4), gaps=st.tuples(*[st.integers(0, 70)] * 2),
    shifts=st.tuples(*[st.integers(0, 33)] * 2), stream=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_arrive_with_the_checksums_of_the_library(
    library: Library, length: int, count: int, gaps: tuple[int, int], shifts: tuple[int, int],
    stream: bool, seed: int,
) -> None:  # fmt: skip
    source = spread(count, length, gaps[0], shifts[0])
    source[:] = np.random.default_rng(seed).integers(0, 256, source.shape, np.uint8)
    wanted = [xxh3_64_intdigest(row.tobytes()) for row in source]
    whole = np.full(shifts[1] + count * (length + gaps[1]), 0xA5, np.uint8)
    target = whole[shifts[1] :].reshape(count, length + gaps[1])[:, :length]
    sums = np.zeros(count, np.uint64)
    if length >= ROW_BYTES_MIN:
        library.hash(source, sums)
        assert sums.tolist() == wanted
        sums[:] = 0
        library.copy(target, source, sums, stream)
        assert sums.tolist() == wanted
        assert np.array_equal(target, source)
        target[:] = 0xA5
        assert (whole == 0xA5).all(), "bytes between the rows"


@pytest.mark.parametrize("length", [1, ROW_BYTES_MIN - 1, ROW_BYTES_MIN, 4096, STREAM_BYTES_MIN])
@pytest.mark.usefixtures("way")
def test_each_way_gives_the_same(length: int) -> None:
    source = np.random.default_rng(length).integers(0, 256, (3, length), np.uint8)
    wanted = [xxh3_64_intdigest(row.tobytes()) for row in source]
    sums, target = np.zeros(3, np.uint64), np.zeros((3, length), np.uint8)
    hash_rows(source, sums)
    assert sums.tolist() == wanted
    for stream in (False, True):
        target[:], sums[:] = 0, 0
        copy_rows(target, source, sums, stream=stream)
        assert np.array_equal(target, source)
        assert sums.tolist() == wanted
    copy_rows(target[:0], source[:0], sums[:0])
    hash_rows(source[:0], sums[:0])


@pytest.mark.parametrize("length", [ROW_BYTES_MIN - 1, 4096])
@pytest.mark.usefixtures("way")
def test_nothing_is_copied_behind_the_portion_that_was_refused(length: int) -> None:
    count, portion = 7, 3
    source = np.random.default_rng(1).integers(1, 256, (count, length), np.uint8)
    wanted = [xxh3_64_intdigest(row.tobytes()) for row in source]
    for portions in range(4):
        sums, target = np.zeros(count, np.uint64), np.zeros_like(source)
        answers = iter([True] * portions + [False])
        done = copy_rows(target, source, sums, portion=portion, go_on=answers.__next__)
        copied = min(portions * portion, count)
        assert done == (copied == count)
        assert np.array_equal(target[:copied], source[:copied])
        assert not target[copied:].any()
        assert sums.tolist() == wanted[:copied] + [0] * (count - copied)


def readonly(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


ROWS, SUMS = np.zeros((2, 512), np.uint8), np.zeros(2, np.uint64)


@pytest.mark.parametrize(
    ("target", "source", "sums", "told"),
    [
        (ROWS[:1], ROWS, SUMS, "target"),
        (ROWS[:, :-1], ROWS, SUMS, "target"),
        (ROWS[:, ::2], ROWS[:, :256], SUMS, "target: its rows are not contiguous"),
        (ROWS[:, :256], ROWS[:, ::2], SUMS, "source: its rows are not contiguous"),
        (ROWS.reshape(-1), ROWS.reshape(-1), SUMS, "source"),
        (ROWS.view(np.int8), ROWS, SUMS, "target"),
        (readonly(ROWS), ROWS, SUMS, "target: it is read-only"),
        (ROWS.copy(), ROWS, SUMS[:1], "sums"),
        (ROWS.copy(), ROWS, np.zeros(4, np.uint64)[::2], "sums"),
        (ROWS.copy(), ROWS, SUMS.view(np.int64), "sums"),
        (ROWS.copy(), ROWS, readonly(SUMS), "sums: it is read-only"),
    ],
)
@pytest.mark.usefixtures("way")
def test_arrays_of_another_kind_are_refused(
    target: np.ndarray, source: np.ndarray, sums: np.ndarray, told: str
) -> None:
    """Before anything is read or written: native code would take any address."""
    with pytest.raises(ValueError, match=told):
        copy_rows(target, source, sums)
    if not told.startswith("target"):
        with pytest.raises(ValueError, match=told.replace("source", "rows")):
            hash_rows(source, sums)


@needs_compiler
def test_this_installation_has_it() -> None:
    assert cells.NATIVE, f"{cells.LIBRARY} was not built with this installation"


def test_it_can_be_left_aside() -> None:
    code = "from kvproto import cells; print(cells.NATIVE)"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KVSERVER_NATIVE": "0"},
        check=True, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert told.stdout == "False\n"


@needs_compiler
@pytest.mark.parametrize(
    "source",
    [
        f"int kv_cells_interface(void) {{ return {INTERFACE + 1}; }}",
        "int other(void) { return 1; }",
    ],
)
def test_what_belongs_to_another_version_is_not_used(tmp_path: Path, source: str) -> None:
    (tmp_path / "other.c").write_text(source)
    path = tmp_path / "other.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-o", str(path), str(tmp_path / "other.c")]
    subprocess.run(command, check=True, timeout=50)
    with pytest.raises(OSError, match="interface"):
        Library(path)


def test_garbage_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "garbage.so"
    path.write_bytes(b"garbage")
    with pytest.raises(OSError, match="garbage"):
        Library(path)


def test_without_a_compiler_the_build_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hatch_build.BuildError, match="no C compiler"):
        hatch_build.build(ROOT, tmp_path / "cells.so")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(hatch_build.BuildError, match="false"):
        hatch_build.build(ROOT, tmp_path / "cells.so")
    assert list(tmp_path.iterdir()) == []
