"""The arena's directory: codecs, bit flips, and a kill at every store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvproto.arena import (
    ENTRY_BYTES,
    GENERATION_WORD,
    RECORD_BYTES,
    RESERVED,
    STATE_SHIFT,
    STATE_WORD,
    UNIT,
    VALID,
    ArenaHeader,
)
from kvproto.errors import FieldError
from kvserver.tiers.entry import (
    EntryTable,
    InvalidEntry,
    ReservedEntry,
    ValidEntry,
    decode,
    encode_reserved,
    encode_valid,
)
from kvserver.tiers.words import SealedRecords

TAG, KEY, PARENT = bytes(range(16)), bytes(range(32)), bytes(range(100, 132))
VALID_ENTRY = ValidEntry(3 * UNIT, 2 * UNIT, 7, TAG, KEY, PARENT, 128, 0xFEDC_BA98_7654_3210)
RESERVED_ENTRY = ReservedEntry(3 * UNIT, 2 * UNIT, 7, (5, 9, 0xFFFF_FFFF))
HEADER = ArenaHeader(5, b"a" * 16, b"b" * 16, 4096, 8 << 20, 10 << 20, 64 << 20, 99)


def flips(raw: bytes) -> list[bytes]:
    """`raw` with each of its bits flipped, one at a time."""
    whole = int.from_bytes(raw, "little")
    return [(whole ^ 1 << bit).to_bytes(len(raw), "little") for bit in range(8 * len(raw))]


def table(units: int = 8) -> EntryTable:
    return EntryTable(np.zeros(units * ENTRY_BYTES, np.uint8))


def put_valid(entries: EntryTable, entry: ValidEntry) -> None:
    entries.write_valid(*entry)


def test_an_entry_reads_back_as_it_was_written() -> None:
    assert len(encode_valid(VALID_ENTRY)) == len(encode_reserved(RESERVED_ENTRY)) == ENTRY_BYTES
    assert decode(encode_valid(VALID_ENTRY), VALID_ENTRY.offset) == VALID_ENTRY
    assert decode(encode_reserved(RESERVED_ENTRY), RESERVED_ENTRY.offset) == RESERVED_ENTRY
    sixteen = RESERVED_ENTRY._replace(clients=tuple(range(1, 17)))
    assert decode(encode_reserved(sixteen), sixteen.offset) == sixteen


def test_zeros_are_invalid_and_generation_0() -> None:
    assert decode(bytes(ENTRY_BYTES), 0) == InvalidEntry(0, 0, False)
    found = table().scan()
    assert (found.valid, found.reserved, found.damaged) == ([], [], [])


def test_state_and_generation_are_the_first_two_words() -> None:
    """Readers in other processes load exactly these words."""
    words = np.frombuffer(encode_valid(VALID_ENTRY), np.uint64)
    assert int(words[STATE_WORD]) >> STATE_SHIFT & 0xFF == VALID
    assert int(words[GENERATION_WORD]) == 7
    words = np.frombuffer(encode_reserved(RESERVED_ENTRY), np.uint64)
    assert int(words[STATE_WORD]) >> STATE_SHIFT & 0xFF == RESERVED


def test_no_flipped_bit_of_a_valid_entry_is_accepted() -> None:
    for raw in flips(encode_valid(VALID_ENTRY)):
        assert isinstance(decode(raw, VALID_ENTRY.offset), InvalidEntry)


def test_no_flipped_bit_of_a_reserved_entry_changes_what_it_says() -> None:
    for raw in flips(encode_reserved(RESERVED_ENTRY)):
        entry = decode(raw, RESERVED_ENTRY.offset)
        assert isinstance(entry, InvalidEntry) or entry == RESERVED_ENTRY


def test_an_entry_under_another_index_is_damaged() -> None:
    assert decode(encode_valid(VALID_ENTRY), 4 * UNIT) == InvalidEntry(4 * UNIT, 7, True)


def test_scan_finds_what_decode_finds() -> None:
    """The vectorised test of states against the codec, on every flip of an entry."""
    for flipped in flips(encode_valid(VALID_ENTRY._replace(offset=0))):
        memory = np.frombuffer(bytearray(flipped), np.uint8)
        found = EntryTable(memory).scan()
        entry = decode(flipped, 0)
        assert found.valid == []
        assert found.damaged == ([0] if isinstance(entry, InvalidEntry) and entry.damaged else [])


def test_the_headers_flipped_bits_are_refused() -> None:
    raw = HEADER.encode()
    assert len(raw) == RECORD_BYTES
    assert ArenaHeader.decode(raw) == HEADER
    for flipped in flips(raw):
        try:
            decoded = ArenaHeader.decode(flipped)
        except FieldError:
            continue
        assert decoded == HEADER  # a bit of the second CRC, which says nothing of the content


def test_writes_and_reads() -> None:
    entries = table()
    entries.write_invalid(0, 1)
    assert entries.read(0) == InvalidEntry(0, 1, False)
    entries.write_reserved(0, UNIT, 1, (4,))
    assert entries.read(0) == ReservedEntry(0, UNIT, 1, (4,))
    put_valid(entries, VALID_ENTRY)
    found = entries.scan()
    assert (found.valid, found.reserved) == ([VALID_ENTRY], [ReservedEntry(0, UNIT, 1, (4,))])
    assert entries.generation_max() == 7


def test_a_generation_never_falls() -> None:
    entries = table()
    put_valid(entries, VALID_ENTRY)
    with pytest.raises(AssertionError, match="generation 7 -> 6"):
        entries.write_invalid(VALID_ENTRY.offset, 6)
    with pytest.raises(AssertionError, match="generation 7 -> 6"):
        entries.write_reserved(VALID_ENTRY.offset, UNIT, 6, (1,))
    with pytest.raises(AssertionError, match="generation 7 -> 6"):
        put_valid(entries, VALID_ENTRY._replace(generation=6))


def test_a_flipped_high_bit_does_not_become_the_largest_generation() -> None:
    entries = table()
    put_valid(entries, VALID_ENTRY)
    entries.words[5, GENERATION_WORD] = np.uint64(1 << 63 | 3)
    assert entries.generation_max() == 7
    assert entries.scan().damaged == [5 * UNIT]


def test_writers_keep_their_place_when_others_come_and_go() -> None:
    entries = table()
    entries.write_reserved(0, UNIT, 1, (10, 11, 12))
    entries.write_reserved(0, UNIT, 1, (12, 13))
    entry = entries.read(0)
    assert isinstance(entry, ReservedEntry)
    assert sorted(entry.clients) == [12, 13]
    entries.write_reserved(0, UNIT, 2, tuple(range(12, 28)))
    entry = entries.read(0)
    assert isinstance(entry, ReservedEntry)
    assert (entry.generation, sorted(entry.clients)) == (2, list(range(12, 28)))


# ---- a kill at every store ---------------------------------------------------------------------


class Killed(BaseException):
    pass


class KillingRecords(SealedRecords):
    """Stops at the n-th store; a fill stops after each of some numbers of bytes."""

    def __init__(self, memory: np.ndarray, steps: int) -> None:
        super().__init__(memory)
        self.steps = steps

    def _step(self) -> None:
        if self.steps == 0:
            raise Killed
        self.steps -= 1

    def store(self, record: int, word: int, value: int) -> None:
        self._step()
        super().store(record, word, value)

    def fill(self, record: int, start: int, raw: bytes) -> None:
        for cut in range(0, len(raw), 5):
            self._step()
            super().fill(record, start, raw[:cut])
        self._step()
        super().fill(record, start, raw)


Write = Callable[[EntryTable], None]
ONE = ValidEntry(0, UNIT, 4, TAG, KEY, PARENT, 128, 1)
TWO = ValidEntry(0, 2 * UNIT, 5, TAG[::-1], PARENT, KEY, 64, 2)
STARTS: dict[str, Write] = {
    "fresh": lambda t: None,
    "invalid": lambda t: t.write_invalid(0, 4),
    "reserved": lambda t: t.write_reserved(0, UNIT, 4, (1, 2)),
    "valid": lambda t: put_valid(t, ONE),
}
WRITES: dict[str, Write] = {
    "invalid": lambda t: t.write_invalid(0, 5),
    "reserved": lambda t: t.write_reserved(0, 2 * UNIT, 5, (7, 8, 9)),
    "valid": lambda t: put_valid(t, TWO),
}


def kill_everywhere(start: Write, write: Write) -> list[EntryTable]:
    """The table after `write` was killed before its 1st, 2nd, … store, and after it ended."""
    tables = []
    for steps in itertools.count():
        memory = np.zeros(2 * ENTRY_BYTES, np.uint8)
        entries = EntryTable(memory)
        start(entries)
        entries._records = KillingRecords(memory, steps)
        tables.append(EntryTable(memory))
        try:
            write(entries)
        except Killed:
            continue
        return tables
    raise AssertionError


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("start", STARTS)
def test_a_kill_leaves_old_or_invalid_or_new(start: str, write: str) -> None:
    before, after = table(2), table(2)
    STARTS[start](before)
    STARTS[start](after)
    WRITES[write](after)
    torn = kill_everywhere(STARTS[start], WRITES[write])
    assert len(torn) > 2
    generation = 0
    for entries in torn:
        entry = entries.read(0)
        if isinstance(entry, InvalidEntry):
            assert entry.generation in (before.read(0).generation, 5)
            assert not entry.damaged
        else:
            assert entry in (before.read(0), after.read(0))
        assert entry.generation >= generation
        generation = entry.generation
        WRITES[write](entries)  # a torn entry takes the write again
        assert entries.read(0) == after.read(0)
    assert generation == 5


@pytest.mark.parametrize(
    ("clients", "generation"), [((1, 2, 3), 4), ((2, 9, 8, 7), 4), ((2,), 4), ((1, 2, 3), 6)]
)
def test_a_kill_never_loses_a_writer_that_stays(clients: tuple[int, ...], generation: int) -> None:
    def write(entries: EntryTable) -> None:
        entries.write_reserved(0, UNIT, generation, clients)

    torn = kill_everywhere(STARTS["reserved"], write)
    assert len(torn) > 2
    for entries in torn:
        entry = entries.read(0)
        assert isinstance(entry, ReservedEntry)
        assert set(entry.clients) >= {1, 2} & set(clients)
        assert set(entry.clients) <= {1, 2} | set(clients)
        assert entry.generation in (4, generation)
    assert set(entry.clients) == set(clients)
    assert entry.generation == generation


def test_scan_of_a_large_table_is_fast() -> None:
    """100,000 VALID entries; the bound is loose, for the machine may be busy."""
    entries = table(100_000)
    raw = b"".join(encode_valid(ONE._replace(offset=i * UNIT)) for i in range(100_000))
    entries.words[:] = np.frombuffer(raw, np.uint64).reshape(entries.words.shape)
    started = time.process_time()
    found = entries.scan()
    assert len(found.valid) == 100_000
    assert time.process_time() - started < 1.5
