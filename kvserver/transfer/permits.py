"""Permits: what lets a transport trust a slot that a client names.

Reserve and Acquire give one for each slot; a client hands it back with every request that moves
bytes. A permit vouches for the operation, the client, the hold, the slot and the granted region
(`kvproto.frames.Place.sealed`), so a data worker needs no table of who may do what.

Rule 1: the secret is this process's alone: permits of an earlier server are worth nothing.
Rule 2: a permit does not expire. That the slot still is what was granted is asked of the arena's
directory, by generation, for each transfer.
"""

from __future__ import annotations

import hmac
from hashlib import blake2b

from kvproto.frames import PERMIT_BYTES, Op, Place


class Permits:
    def __init__(self, secret: bytes) -> None:
        """`secret`: 16 to 64 random bytes."""
        assert 16 <= len(secret) <= 64, len(secret)
        self._secret = secret

    def mint(self, op: Op, client: int, place: Place) -> bytes:
        """16 bytes; whatever permit `place` carries is not looked at."""
        sealed = place.sealed(op, client)
        return blake2b(sealed, digest_size=PERMIT_BYTES, key=self._secret).digest()

    def check(self, op: Op, client: int, place: Place) -> bool:
        """Whether `place.permit` was minted for exactly this."""
        return hmac.compare_digest(self.mint(op, client, place), place.permit)
