"""Permits: what lets a data worker trust a request without asking the server.

A permit is a keyed BLAKE2b over everything that a grant says: the operation, the client, the
reservation or lease, where the slot lies, its generation and geometry, and the region
(`kvproto.frames.Place.sealed`). The service mints one for each block it grants to a client of a
remote transport; whoever moves the bytes checks it, and needs no state of the server's for that.

Rule 1: the secret is made anew by each server process and leaves it only towards its own workers.
So a permit ends with the epoch at the latest; the slot's generation ends it earlier.
Rule 2: permits are compared in constant time and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from kvproto.frames import PERMIT_BYTES, Op, Place

SECRET_BYTES = 32


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


class Permits:
    """Mints and checks. From any thread."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == SECRET_BYTES, len(secret)
        self._keyed = hashlib.blake2b(digest_size=PERMIT_BYTES, key=secret)

    def mint(self, op: Op, client: int, place: Place) -> bytes:
        """16 bytes for `client` to do `op` at `place`; the place's own permit is not looked at."""
        digest = self._keyed.copy()
        digest.update(place.sealed(op, client))
        return digest.digest()

    def mint_all(self, op: Op, client: int, places: Iterable[Place | None]) -> bytes:
        """One permit a place, packed; zeros where nothing was granted."""
        nothing = bytes(PERMIT_BYTES)
        return b"".join(
            nothing if place is None else self.mint(op, client, place) for place in places
        )

    def check(self, op: Op, client: int, place: Place) -> bool:
        """Whether `place.permit` was minted here for exactly this."""
        return hmac.compare_digest(self.mint(op, client, place), place.permit)
