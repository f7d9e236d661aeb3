"""What the shell knows of a session beyond the core: its token, names and opened namespaces.

Rule 1: a session is known by a random 63-bit id; its token, 16 random bytes, is what lets a rank
join it and what a transport asks for. Tokens are compared in constant time and never logged.
Rule 2: a namespace's handle is valid for the sessions that opened it and for no other.
Rule 3: an engine's role (`runtime.roles`) is known for as long as its session lives.
Rule 4: the core decides when a session ends; `keep_only` drops what it no longer knows.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from kvproto.namespace import NamespaceSpec
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.roles import Follower

TOKEN_BYTES = 16


@dataclass(slots=True)
class Session:
    id: int
    token: bytes
    tenant: str
    name: str
    version: str
    clients: set[int] = field(default_factory=set)
    namespaces: dict[int, NamespaceSpec] = field(default_factory=dict)
    transports: set[str] = field(default_factory=set)
    remote: set[int] = field(default_factory=set)  # clients that need permits: they map nothing
    follower: Follower | None = None  # of an engine that takes orders

    def spec(self, handle: int) -> NamespaceSpec:
        spec = self.namespaces.get(handle)
        if spec is None:
            raise CoreError(
                ErrorKind.NOT_FOUND,
                f"namespace {handle} was not opened by this session",
                field="namespace",
            )
        return spec

    def check_client(self, client: int) -> int:
        if client not in self.clients:
            raise CoreError(
                ErrorKind.NOT_FOUND, f"client {client} is none of this session's", field="client"
            )
        return client


class Sessions:
    """All sessions, by id and by token."""

    def __init__(self) -> None:
        self._by_id: dict[int, Session] = {}
        self._by_token: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def create(self, *, tenant: str, name: str, version: str) -> Session:
        """A session with a fresh id and token, not yet known to `get`: see `add`."""
        identity = 0
        while identity == 0 or identity in self._by_id:
            identity = secrets.randbits(63)
        return Session(identity, secrets.token_bytes(TOKEN_BYTES), tenant, name, version)

    def add(self, session: Session) -> None:
        self._by_id[session.id] = session
        self._by_token[session.token] = session

    def get(self, session: int) -> Session:
        found = self._by_id.get(session)
        if found is None:
            raise CoreError(
                ErrorKind.NOT_FOUND, "this session is unknown or has ended", field="session"
            )
        return found

    def all(self) -> list[Session]:
        return list(self._by_id.values())

    def find(self, session: int) -> Session | None:
        return self._by_id.get(session)

    def by_token(self, token: bytes) -> Session:
        found = self._by_token.get(token)
        if found is None:
            raise CoreError(ErrorKind.NOT_FOUND, "no session has this token", field="join_token")
        return found

    def engine(self, name: str) -> Session:
        """The one session with an engine that takes orders whose name begins so."""
        taking = [session for session in self._by_id.values() if session.follower is not None]
        found = [session for session in taking if session.name == name]
        found = found or [session for session in taking if session.name.startswith(name)]
        if not name or len(found) != 1:
            names = ", ".join(sorted(session.name for session in found or taking)[:8]) or "none"
            raise CoreError(
                ErrorKind.NOT_FOUND,
                f"engine {name!r} must name one engine that takes orders; there are: {names}",
                field="engine",
                limit=names,
            )
        return found[0]

    def is_remote(self, client: int) -> bool:
        """Whether a living session's client has attached by a remote transport."""
        return any(client in session.remote for session in self._by_id.values())

    def authorise(self, session: int, client: int, token: bytes) -> bool:
        """Whether `token` proves that `client` belongs to `session`. From any thread."""
        found = self._by_id.get(session)
        return (
            found is not None
            and hmac.compare_digest(found.token, token)
            and client in found.clients
        )

    def remove(self, session: int) -> None:
        found = self._by_id.pop(session, None)
        if found is not None:
            if found.follower is not None:
                found.follower.end()
            del self._by_token[found.token]

    def keep_only(self, alive: Collection[int]) -> list[int]:
        """Drop every session that is not in `alive`; the ids that went."""
        gone = [session for session in self._by_id if session not in alive]
        for session in gone:
            self.remove(session)
        return gone
