"""The host arena's directory: one 128-byte entry per 16 KiB unit of data.

    INVALID --write_reserved--> RESERVED --write_valid--> VALID
       ^------------write_invalid-----------/-----------------/

Rule 1: only this module writes entries.
Rule 2: a kill at any instruction leaves an entry as it was, or INVALID, or as it was to become;
        never VALID with a body that was not written for it.
        Becoming INVALID: state, generation, CRC cleared. Becoming RESERVED or VALID: INVALID,
        generation, body, CRC, then state.
Rule 3: a RESERVED entry stays RESERVED while its writers or its generation change: word by word,
        each step whole (`SealedRecords.step`). A kill while a second writer joins must not lose
        the first, who may still be writing.
Rule 4: an entry's generation never falls.
Rule 5: an entry that does not read back as it was written is damaged: never served, counted.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvproto.arena import (
    CLIENTS_MAX,
    CLIENTS_OFFSET,
    CLIENTS_WORD,
    ENTRY_BYTES,
    ENTRY_MAGIC,
    ENTRY_STRUCT,
    FORMAT,
    GENERATION_WORD,
    INVALID,
    RECORD_WORDS,
    RESERVED,
    SLOT_UNITS_SHIFT,
    STATE_SHIFT,
    STATE_WORD,
    UNIT,
    VALID,
    record_crc,
)
from kvserver.tiers.words import SealedRecords

GENERATION_LIMIT = 1 << 63  # no honest generation reaches it: above it, a bit has flipped
_BODY_START = 16
_RESERVED = struct.Struct(f"<HBBIQ32x{CLIENTS_MAX}I16x")
_CLIENTS = struct.Struct(f"<{CLIENTS_MAX}I")
_NOBODY = (0,) * CLIENTS_MAX
assert _RESERVED.size == ENTRY_BYTES == ENTRY_STRUCT.size


class ValidEntry(NamedTuple):
    """A whole block: what `write_valid` stored."""

    offset: int
    slot_bytes: int
    generation: int
    tag: bytes
    key: bytes
    parent: bytes
    tokens: int
    root: int


class ReservedEntry(NamedTuple):
    """A slot that `clients` may be writing."""

    offset: int
    slot_bytes: int
    generation: int
    clients: tuple[int, ...]


class InvalidEntry(NamedTuple):
    """A slot that holds nothing; `damaged` when it held something that cannot be read back."""

    offset: int
    generation: int
    damaged: bool


Entry = ValidEntry | ReservedEntry | InvalidEntry


class EntryScan(NamedTuple):
    valid: list[ValidEntry]
    reserved: list[ReservedEntry]
    damaged: list[int]  # offsets


def encode_valid(entry: ValidEntry) -> bytes:
    """The 128 bytes of a VALID entry."""
    return _sealed(
        ENTRY_STRUCT.pack(
            ENTRY_MAGIC, FORMAT, VALID, entry.slot_bytes // UNIT, entry.generation, entry.root,
            entry.tokens, 0, entry.tag, entry.key, entry.parent, 0, 0, 0,
        ),
        entry.offset,
    )  # fmt: skip


def encode_reserved(entry: ReservedEntry) -> bytes:
    """The 128 bytes of a RESERVED entry."""
    places = (*entry.clients, *_NOBODY[len(entry.clients) :])
    units = entry.slot_bytes // UNIT
    raw = _RESERVED.pack(ENTRY_MAGIC, FORMAT, RESERVED, units, entry.generation, *places)
    return _sealed(raw, entry.offset)


def decode(raw: bytes, offset: int) -> Entry:
    """What 128 bytes at the entry of `offset` say. Never raises."""
    return _decode(ENTRY_STRUCT.unpack(raw), raw, offset)


def _sealed(raw: bytes, offset: int) -> bytes:
    crc = record_crc(raw, offset // UNIT)
    return raw[:-8] + struct.pack("<II", crc, crc)


def _decode(fields: tuple[Any, ...], raw: bytes | memoryview, offset: int) -> Entry:
    magic, format_, state, units, generation, root, tokens, _, tag, key, parent, _, *crcs = fields
    plausible = generation < GENERATION_LIMIT
    if state == INVALID and plausible and (magic, format_) in ((ENTRY_MAGIC, FORMAT), (0, 0)):
        return InvalidEntry(offset, generation, False)
    known = (magic, format_) == (ENTRY_MAGIC, FORMAT) and units > 0 and plausible
    if known and state == VALID and record_crc(raw, offset // UNIT) == crcs[0] == crcs[1]:
        return ValidEntry._make((offset, units * UNIT, generation, tag, key, parent, tokens, root))
    if known and state == RESERVED and record_crc(raw, offset // UNIT) in crcs:
        ids = _CLIENTS.unpack_from(raw, CLIENTS_OFFSET)
        return ReservedEntry(offset, units * UNIT, generation, tuple(i for i in ids if i))
    return InvalidEntry(offset, generation if plausible else 0, True)


def states_of(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The states of entries given as rows of words."""
    return words[:, STATE_WORD] >> np.uint64(STATE_SHIFT) & np.uint64(0xFF)


def generation_max_of(words: npt.NDArray[np.uint64]) -> int:
    """The largest honest generation of entries given as rows of words; 0 for none."""
    generations = words[:, GENERATION_WORD]
    honest = generations[generations < np.uint64(GENERATION_LIMIT)]
    return int(honest.max()) if honest.size else 0


class EntryTable:
    """Writes and reads the entries of a data area, in place. Offsets are those of the data."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._records = SealedRecords(memory)
        self.words = self._records.words.reshape(-1, RECORD_WORDS)

    def __len__(self) -> int:
        return self._records.count

    def read(self, offset: int) -> Entry:
        return decode(self._records.raw(self._index(offset)), offset)

    def write_invalid(self, offset: int, generation: int) -> None:
        """The slot holds nothing from now on."""
        index = self._index(offset)
        self._check_generation(index, generation)
        self._invalidate(index, generation)
        self._records.seal(index, 0)

    def write_reserved(
        self, offset: int, slot_bytes: int, generation: int, clients: tuple[int, ...]
    ) -> None:
        """`clients` may write the slot from now on, and nobody else."""
        assert 0 < len(clients) <= CLIENTS_MAX, clients
        index = self._index(offset)
        self._check_generation(index, generation)
        if self._records.load(index, STATE_WORD) == _head(RESERVED, slot_bytes // UNIT):
            now = self.read(offset)
            if isinstance(now, ReservedEntry):
                self._change_reserved(index, now, generation, clients)
                return
        self._replace(
            index, encode_reserved(ReservedEntry(offset, slot_bytes, generation, clients))
        )

    def write_valid(
        self,
        offset: int,
        slot_bytes: int,
        generation: int,
        tag: bytes,
        key: bytes,
        parent: bytes,
        tokens: int,
        root: int,
    ) -> None:
        """The slot holds this block, whole."""
        assert (len(tag), len(key), len(parent)) == (16, 32, 32), (tag, key, parent)
        index = self._index(offset)
        self._check_generation(index, generation)
        entry = ValidEntry(offset, slot_bytes, generation, tag, key, parent, tokens, root)
        self._replace(index, encode_valid(entry))

    def heal(self, offset: int, generation: int) -> None:
        """Make a damaged entry INVALID; the only write that does not look at the generation."""
        index = self._index(offset)
        self._invalidate(index, generation)
        self._records.seal(index, 0)

    def scan(self) -> EntryScan:
        """Every entry that is not INVALID, ascending, and the offsets of the damaged ones."""
        heads = self.words[:, STATE_WORD]
        states = states_of(self.words)
        magics = heads & np.uint64((1 << STATE_SHIFT) - 1)
        ours = (magics == np.uint64(FORMAT << 16 | ENTRY_MAGIC)) | (magics == np.uint64(0))
        generations = self.words[:, GENERATION_WORD]
        empty = (states == INVALID) & ours & (generations < np.uint64(GENERATION_LIMIT))
        indices = np.flatnonzero(~empty)
        raw = memoryview(self.words[indices].tobytes())
        scan = EntryScan([], [], [])
        at = 0
        for index, fields in zip(indices.tolist(), ENTRY_STRUCT.iter_unpack(raw), strict=True):
            entry = _decode(fields, raw[at : at + ENTRY_BYTES], index * UNIT)
            at += ENTRY_BYTES
            if isinstance(entry, ValidEntry):
                scan.valid.append(entry)
            elif isinstance(entry, ReservedEntry):
                scan.reserved.append(entry)
            else:
                scan.damaged.append(entry.offset)
        return scan

    def generation_max(self) -> int:
        """The largest honest generation of any entry."""
        return generation_max_of(self.words)

    def _index(self, offset: int) -> int:
        index, rest = divmod(offset, UNIT)
        assert rest == 0, offset
        assert 0 <= index < self._records.count, offset
        return index

    def _check_generation(self, index: int, generation: int) -> None:
        now = self._records.load(index, GENERATION_WORD)
        assert now <= generation < GENERATION_LIMIT, (
            f"slot {index * UNIT}: generation {now} -> {generation}"
        )

    def _invalidate(self, index: int, generation: int) -> None:
        self._records.store(index, STATE_WORD, _head(INVALID, 0))
        self._records.store(index, GENERATION_WORD, generation)

    def _replace(self, index: int, raw: bytes) -> None:
        head, generation = struct.unpack_from("<QQ", raw)
        self._invalidate(index, generation)
        self._records.fill(index, _BODY_START, raw[_BODY_START:-8])
        self._records.seal(index, int.from_bytes(raw[-4:], "little"))
        self._records.store(index, STATE_WORD, head)

    def _change_reserved(
        self, index: int, now: ReservedEntry, generation: int, clients: tuple[int, ...]
    ) -> None:
        """Add and remove writers; one that stays keeps its place and so is never absent."""
        raw = self._records.raw(index)
        places = [i if i in clients else 0 for i in _CLIENTS.unpack_from(raw, CLIENTS_OFFSET)]
        joining = iter([i for i in clients if i not in places])
        places = [i or next(joining, 0) for i in places]
        for pair in range(CLIENTS_MAX // 2):
            word = CLIENTS_WORD + pair
            value = places[2 * pair] | places[2 * pair + 1] << 32
            if value != self._records.load(index, word):
                self._records.step(index, word, value, seed=index)
        if generation != now.generation:
            self._records.step(index, GENERATION_WORD, generation, seed=index)


def _head(state: int, units: int) -> int:
    return units << SLOT_UNITS_SHIFT | state << STATE_SHIFT | FORMAT << 16 | ENTRY_MAGIC
