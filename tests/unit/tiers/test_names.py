"""The namespace log: a torn or damaged record costs itself only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvproto.errors import FieldError
from kvserver.tiers.names import (
    CANONICAL_BYTES_MAX,
    NAMESPACES_NAME,
    NamespaceLog,
    decode_records,
    encode_record,
    read_namespaces,
)

ONE, TWO, THREE = b"first namespace", b"second", b"third namespace of three"


def test_what_is_added_is_there_after_a_restart(tmp_path: Path) -> None:
    log = NamespaceLog.open(tmp_path)
    assert log.canonicals == []
    assert [log.add(raw) for raw in (ONE, TWO, ONE)] == [True, True, False]
    again = NamespaceLog.open(tmp_path)  # the first was not closed, as after a kill
    assert again.canonicals == [ONE, TWO]
    assert again.lost_bytes == 0
    assert not again.add(TWO)
    again.close()
    log.close()
    assert read_namespaces(tmp_path) == ([ONE, TWO], 0)


def test_a_torn_last_record_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / NAMESPACES_NAME
    whole = encode_record(ONE) + encode_record(TWO)
    last = encode_record(THREE)
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        log = NamespaceLog.open(tmp_path)
        assert log.canonicals == [ONE, TWO]
        assert log.lost_bytes == length
        assert log.add(THREE)  # appended behind what counts, not behind the torn record
        log.close()
        assert read_namespaces(tmp_path) == ([ONE, TWO, THREE], 0)


def test_a_flipped_bit_costs_one_record() -> None:
    whole = [encode_record(raw) for raw in (ONE, TWO, THREE)]
    start = len(whole[0])
    for bit in range(8 * len(whole[1])):
        raw = bytearray(b"".join(whole))
        raw[start + bit // 8] ^= 1 << bit % 8
        assert decode_records(bytes(raw)) == ([ONE, THREE], len(whole[1]))


def test_rewrite_keeps_exactly_what_it_is_given(tmp_path: Path) -> None:
    log = NamespaceLog.open(tmp_path)
    for raw in (ONE, TWO):
        log.add(raw)
    size = (tmp_path / NAMESPACES_NAME).stat().st_size
    log.rewrite([TWO])
    assert log.canonicals == [TWO]
    assert (tmp_path / NAMESPACES_NAME).stat().st_size < size
    assert log.add(THREE)
    log.close()
    assert read_namespaces(tmp_path) == ([TWO, THREE], 0)


def test_a_write_that_falls_short_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = NamespaceLog.open(tmp_path)
    log.add(ONE)
    real, calls = os.write, []

    def short(fd: int, raw: bytes) -> int:
        calls.append(raw)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, raw[:5])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space"):
        log.add(TWO)
    monkeypatch.undo()
    assert read_namespaces(tmp_path) == ([ONE], 0)
    assert log.add(TWO)
    assert read_namespaces(tmp_path) == ([ONE, TWO], 0)
    log.close()


def test_an_encoding_has_a_limit(tmp_path: Path) -> None:
    log = NamespaceLog.open(tmp_path)
    for raw in (b"", bytes(CANONICAL_BYTES_MAX + 1)):
        with pytest.raises(FieldError, match="namespace canonical bytes"):
            log.add(raw)
    log.close()
