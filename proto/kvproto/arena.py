"""The host arena file, byte for byte: what a process that maps it may rely on.

    header (4096 B) | table: one 128-byte entry per 16 KiB unit of data | data (2 MiB aligned)

The server alone writes header and table; a reader loads single aligned words from its map:

  * the header's epoch grows with each start of the server; 0 means that the file was retired;
  * an entry's generation changes before any byte of its slot may change. So a copy is good if
    arena id and epoch are those of the session and the slot's generation is that of the grant,
    before AND after the copy. The state is for recovery: between two states of one generation an
    entry is INVALID for an instant, and a reader that insisted on VALID would miss for nothing.

Header and entry are records of sixteen 64-bit words whose last word holds two CRC-32 values over
the first fifteen (`crc`, `crc_next`). A record counts if it matches one of them: that lets the
server replace any one word atomically (crc_next, word, both). A VALID entry must match both.

A table of zeros is a fresh one: every entry INVALID, generation 0.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError

FORMAT = 1
UNIT = 16 * 1024  # bytes of data per entry; every slot offset and size is a multiple
DATA_ALIGN = 2 << 20
RECORD_BYTES = 128
RECORD_WORDS = 16
CRC_WORD = 15  # u32 crc | u32 crc_next
SEALED_BYTES = 120  # what the CRCs cover

# -- header --------------------------------------------------------------------------------------
HEADER_BYTES = 4096
HEADER_MAGIC = b"kvarena\0"
EPOCH_OFFSET = 16  # u64
ARENA_ID_OFFSET = 24  # 16 bytes
FORMAT_OFFSET = 8  # u32
EPOCH_WORD = EPOCH_OFFSET // 8
DATA_BYTES_WORD = 11
GENERATION_FLOOR_WORD = 12
HEADER_STRUCT = struct.Struct("<8sIIQ16s16sQQQQQQ16xII")

# -- entry ---------------------------------------------------------------------------------------
ENTRY_BYTES = RECORD_BYTES
ENTRY_MAGIC = 0x456B  # "kE"
INVALID, RESERVED, VALID = 0, 1, 2
STATE_WORD = 0  # u16 magic | u8 format | u8 state | u32 slot bytes in units
STATE_SHIFT = 24
SLOT_UNITS_SHIFT = 32
GENERATION_WORD = 1
ROOT_WORD = 2
# magic, format, state, slot units, generation, root, tokens, 0, tag, key, parent, 0, crc, crc_next
ENTRY_STRUCT = struct.Struct("<HBBIQQII16s32s32sQII")
CLIENTS_OFFSET = 48  # of a RESERVED entry: 16 x u32 in the place of key and parent; 0 is none
CLIENTS_WORD = CLIENTS_OFFSET // 8
CLIENTS_MAX = 16

Words = npt.NDArray[np.uint64]


class ArenaHeader(NamedTuple):
    """The header's fields. Sizes and offsets in bytes of the file."""

    epoch: int
    arena_id: bytes
    boot_id: bytes
    table_offset: int
    table_bytes: int  # room of the table: it may hold more entries than the data has units
    data_offset: int
    data_bytes: int
    generation_floor: int  # at least the generation of any entry that was ever cleared

    def encode(self) -> bytes:
        """128 bytes, sealed."""
        raw = HEADER_STRUCT.pack(
            HEADER_MAGIC, FORMAT, RECORD_BYTES, self.epoch, self.arena_id, self.boot_id, UNIT,
            *self[3:], 0, 0,
        )  # fmt: skip
        crc = record_crc(raw, 0)
        return raw[:SEALED_BYTES] + struct.pack("<II", crc, crc)

    @classmethod
    def decode(cls, raw: bytes) -> ArenaHeader:
        """The inverse of `encode`. FieldError names what is not as this version writes it."""
        if len(raw) < RECORD_BYTES or raw[:8] != HEADER_MAGIC:
            raise FieldError("arena.magic", raw[:8], repr(HEADER_MAGIC))
        _, format_, entry_bytes, epoch, arena_id, boot_id, unit, *sizes, crc, crc_next = (
            HEADER_STRUCT.unpack_from(raw)
        )
        if format_ != FORMAT:
            raise FieldError("arena.format", format_, str(FORMAT))
        if record_crc(raw, 0) not in (crc, crc_next):
            raise FieldError("arena.crc", crc, "the header's CRC")
        if (entry_bytes, unit) != (ENTRY_BYTES, UNIT):
            raise FieldError("arena.geometry", (entry_bytes, unit), str((ENTRY_BYTES, UNIT)))
        return cls(epoch, arena_id, boot_id, *sizes)


def record_crc(record: bytes | memoryview, seed: int) -> int:
    """CRC-32 over a record's first 120 bytes; an entry's seed is its index in the table."""
    return zlib.crc32(record[:SEALED_BYTES], seed)


class ArenaReader:
    """What a reader checks before and after it copies, over its own map of the file."""

    def __init__(self, file: npt.NDArray[np.uint8]) -> None:
        """`file` is the map from the file's first byte on. FieldError if it is no arena."""
        self.header = ArenaHeader.decode(file[:RECORD_BYTES].tobytes())
        head = self.header
        # Memoryviews: reading one word of them takes a tenth of what NumPy takes, and `current` is
        # asked before every chunk of a copy.
        self._epoch = file[EPOCH_OFFSET : EPOCH_OFFSET + 8].view(np.uint64).data
        entries = head.data_bytes // UNIT
        table = file[head.table_offset : head.table_offset + entries * ENTRY_BYTES]
        words: Words = table.view(np.uint64).reshape(-1, RECORD_WORDS)
        self._words = words
        self._generations = words[:, GENERATION_WORD].data
        self.data = file[head.data_offset : head.data_offset + head.data_bytes]

    def epoch(self) -> int:
        """The epoch now; it differs from the session's once the server was restarted."""
        return self._epoch[0]

    def words(self, offset: int) -> tuple[Words, Words]:
        """The generation of the slot at `offset`, and the epoch, for code that reads memory: views
        [1].
        """
        entry = self._words[offset // UNIT]
        return entry[GENERATION_WORD : GENERATION_WORD + 1], np.asarray(self._epoch)

    def current(self, offset: int, generation: int, epoch: int) -> bool:
        """Whether the slot at `offset` (within the data) still holds what was granted."""
        return self._generations[offset // UNIT] == generation and self._epoch[0] == epoch
