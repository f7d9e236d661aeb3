"""Sealed records in shared memory: 128 bytes that survive a kill between any two instructions.

Rule 1: a record's last word holds two CRCs over the rest; it counts if it matches one of them.
Rule 2: `step` replaces one word. The CRC of the record to be is stored beside the present one, then
        the word, then the new CRC twice. Each is one aligned 8-byte store, so a kill leaves the
        old record or the new one.
Rule 3: words that others read from their own maps (state, generation, epoch) are only ever written
        as one aligned 8-byte store; NumPy makes exactly that of an item assignment.

A SIGKILL loses no store to a shared mapping, so no flush is needed; a power cut loses the file.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from kvproto.arena import CRC_WORD, RECORD_BYTES, RECORD_WORDS, SEALED_BYTES


class SealedRecords:
    """An array of sealed records over 8-byte aligned memory."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.words: npt.NDArray[np.uint64] = memory.view(np.uint64)
        self.count = self.words.size // RECORD_WORDS
        self._bytes = memory.data

    def load(self, record: int, word: int) -> int:
        return int(self.words[record * RECORD_WORDS + word])

    def store(self, record: int, word: int, value: int) -> None:
        """One aligned 8-byte store."""
        self.words[record * RECORD_WORDS + word] = value

    def fill(self, record: int, start: int, raw: bytes) -> None:
        """Write bytes of a record that nobody may trust at the moment; not atomic."""
        at = record * RECORD_BYTES + start
        self._bytes[at : at + len(raw)] = raw

    def raw(self, record: int) -> bytes:
        at = record * RECORD_BYTES
        return bytes(self._bytes[at : at + RECORD_BYTES])

    def seal(self, record: int, crc: int) -> None:
        """Store `crc` as both CRCs."""
        self.store(record, CRC_WORD, crc << 32 | crc)

    def step(self, record: int, word: int, value: int, *, seed: int) -> None:
        """Replace one word of a record that counts; it counts at every moment in between."""
        raw = self.raw(record)
        after = bytearray(raw[:SEALED_BYTES])
        struct.pack_into("<Q", after, word * 8, value)
        now, then = zlib.crc32(raw[:SEALED_BYTES], seed), zlib.crc32(after, seed)
        self.store(record, CRC_WORD, then << 32 | now)
        self.store(record, word, value)
        self.seal(record, then)
