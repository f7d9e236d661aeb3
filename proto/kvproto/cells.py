"""Rows of bytes hashed, and copied and hashed in one pass: what cells.c does, when it was built.

A row is a cell; its checksum is xxh3-64 (seed 0). Arrays of rows are uint8 [count, bytes], whose
rows are contiguous and may lie apart.

Rules:
 1. With or without native code the results are the same, bit for bit; NATIVE says which it is.
    It is built with the distribution where a C compiler is at hand; `KVSERVER_NATIVE=0` leaves it
    aside.
 2. A checksum is of the bytes that arrived: native code hashes what it holds in registers and
    stores, Python what stands in the target.
 3. Native calls run without the interpreter's lock, for as long as they take. Callers cut large
    work into calls, and hold the arrays.
 4. `stream` stores around the caches. It is for targets that nobody reads soon, and that are
    larger than the caches: those that are small are left to the caches, whatever was asked for.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

Bytes = npt.NDArray[np.uint8]
Checksums = npt.NDArray[np.uint64]

LIBRARY = Path(__file__).with_name("_cells.so")
INTERFACE = 4  # kv_cells_interface(): what stands beside older Python code is not used
ROW_BYTES_MIN = 241  # xxh3 has other ways for shorter inputs, which native code lacks
STREAM_BYTES_MIN = 512 << 10

GoOn = Callable[[], bool]


def _always() -> bool:
    return True


_digest = cast("Callable[[object], int]", xxh3_64_intdigest)  # takes any contiguous buffer


class Library:
    """The native functions. OSError when `path` is none for this machine, or another version's."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        interface = getattr(loaded, "kv_cells_interface", None)
        found = None if interface is None else interface()
        if found != INTERFACE:
            raise OSError(f"{path} has interface {found}, not {INTERFACE}")
        pointer, size, step = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ssize_t
        self._hash = loaded.kv_hash_rows
        self._hash.argtypes = [pointer, step, size, size, pointer]
        self._hash.restype = None
        self._copy = loaded.kv_copy_rows
        self._copy.argtypes = [pointer, step, pointer, step, size, size, ctypes.c_int, pointer]
        self._copy.restype = None
        # Of wires.c; a grid's checksums come last.
        grid: list[Any] = [pointer, step, step, size, size, size, pointer]
        number, word = ctypes.c_int, ctypes.c_uint64
        loaded.kv_send_grid.argtypes = [number, pointer, size, *grid, size, number]
        loaded.kv_receive_grid.argtypes = [number, *grid, size, number]
        loaded.kv_guarded_grid.argtypes = [
            number, *grid, pointer, word, pointer, word, size, size, number, pointer, pointer,
            number,
        ]  # fmt: skip
        # Of bell.c.
        small = ctypes.c_uint32
        loaded.kv_bell_start.argtypes = [number, small, small, small, small]
        loaded.kv_bell_start.restype = pointer
        for function in (loaded.kv_bell_heard, loaded.kv_bell_stop):
            function.argtypes, function.restype = [pointer], None
        self.loaded = loaded

    def hash(self, rows: Bytes, sums: Checksums) -> None:
        count, length = rows.shape
        self._hash(rows.ctypes.data, rows.strides[0], count, length, sums.ctypes.data)

    def copy(
        self,
        target: Bytes,
        source: Bytes,
        sums: Checksums,
        stream: bool,
        portion: int = sys.maxsize,
        go_on: GoOn = _always,
    ) -> bool:
        """`portion` rows a call. Addresses are looked up once: that takes longer than the call."""
        into, from_, sum_at = target.ctypes.data, source.ctypes.data, sums.ctypes.data
        into_step, from_step = target.strides[0], source.strides[0]
        count, length = source.shape
        for start in range(0, count, portion):
            if not go_on():
                return False
            self._copy(
                into + start * into_step, into_step, from_ + start * from_step, from_step,
                min(portion, count - start), length, stream, sum_at + start * sums.itemsize,
            )  # fmt: skip
        return True


def _load() -> Library | None:
    if os.environ.get("KVSERVER_NATIVE") == "0":
        return None
    try:
        return Library(LIBRARY)
    except OSError:
        return None


_library = _load()
NATIVE = _library is not None


def native() -> ctypes.CDLL | None:
    """What was loaded, for modules with functions of their own in it (`kvproto.wires`,
    `kvproto.bell`)."""
    return None if _library is None else _library.loaded


def hash_rows(rows: Bytes, sums: Checksums) -> None:
    """Checksums of `rows` [count, bytes] into `sums` [count]. ValueError for arrays of another
    kind.
    """
    _check("rows", rows, rows.shape)
    check_sums(sums, len(rows))
    if _library is not None and rows.shape[1] >= ROW_BYTES_MIN:
        _library.hash(rows, sums)
    else:
        sums[:] = np.fromiter(map(_digest, rows), np.uint64, len(rows))


def copy_rows(
    target: Bytes,
    source: Bytes,
    sums: Checksums,
    *,
    stream: bool = False,
    portion: int = sys.maxsize,
    go_on: GoOn = _always,
) -> bool:
    """Copy `source` [count, bytes] to `target`, which it does not overlap, and leave the checksums
    of what arrived in `sums` [count]. `go_on` is asked before each `portion` of rows (default:
    all); False when it said no. ValueError for arrays of another kind.
    """
    count = len(source)
    _check("source", source, source.shape)
    _check("target", target, source.shape)
    check_sums(sums, len(source))
    if not target.flags.writeable:
        raise ValueError("target: it is read-only")
    if _library is not None and source.shape[1] >= ROW_BYTES_MIN:
        stream = stream and min(portion, count) * source.shape[1] >= STREAM_BYTES_MIN
        return _library.copy(target, source, sums, stream, portion, go_on)
    for start in range(0, count, portion):
        if not go_on():
            return False
        part = slice(start, start + portion)
        np.copyto(target[part], source[part])
        sums[part] = np.fromiter(map(_digest, target[part]), np.uint64)
    return True


def _check(name: str, rows: Bytes, shape: tuple[int, ...]) -> None:
    if rows.dtype != np.uint8 or len(shape) != 2 or rows.shape != shape:
        raise ValueError(f"{name}: {rows.dtype} {rows.shape}, not uint8 {list(shape)}")
    if rows.strides[1] != 1 and shape[1] > 1:
        raise ValueError(f"{name}: its rows are not contiguous")


def check_sums(sums: Checksums, count: int) -> None:
    """ValueError unless native code may leave `count` checksums there."""
    if sums.dtype != np.uint64 or sums.shape != (count,) or not sums.flags.c_contiguous:
        raise ValueError(f"sums: {sums.dtype} {sums.shape}, not contiguous uint64 [{count}]")
    if not sums.flags.writeable:
        raise ValueError("sums: it is read-only")
