"""Which namespaces are written down, in the arena's log and in the journal.

Rule 1: a namespace is written down before its handle is given out, so that no block can outlive
what its tag refers to.
Rule 2: what is written down is bounded: at twice the limit of live ones, those that the core has
forgotten go. A start keeps those that have a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvproto.namespace import NamespaceSpec
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.mover import Mover
from kvserver.tiers.names import NamespaceLog


class Namespaces:
    """`lives(id)` says whether the core knows a namespace; `live_max` is how many it may know."""

    def __init__(
        self,
        log: NamespaceLog,
        mover: Mover,
        *,
        lives: Callable[[bytes], bool],
        live_max: int,
    ) -> None:
        self._log = log
        self._mover = mover
        self._lives = lives
        self._written_max = 2 * live_max
        self._specs: dict[bytes, NamespaceSpec] = {}

    def __len__(self) -> int:
        return len(self._specs)

    def restored(self, specs: Iterable[NamespaceSpec], journal: Iterable[bytes]) -> None:
        """What a start found used, and the ids that the journal knows. The rest is let go."""
        self._specs = {spec.id: spec for spec in specs}
        self._log.rewrite(spec.canonical for spec in self._specs.values())
        known = set(journal)
        for identity in known - self._specs.keys():
            self._mover.drop_namespace(identity)
        for identity in self._specs.keys() - known:
            self._mover.add_namespace(self._specs[identity])

    def add(self, spec: NamespaceSpec) -> None:
        """CoreError when it cannot be written."""
        if spec.id in self._specs:
            return
        if len(self._specs) >= self._written_max:
            self.drop([identity for identity in self._specs if not self._lives(identity)])
        try:
            self._log.add(spec.canonical)
        except OSError as error:
            raise CoreError(
                ErrorKind.UNAVAILABLE, f"the namespace cannot be written down: {error}"
            ) from error
        self._mover.add_namespace(spec)
        self._specs[spec.id] = spec

    def drop(self, identities: Iterable[bytes]) -> None:
        for identity in identities:
            if self._specs.pop(identity, None) is not None:
                self._mover.drop_namespace(identity)
        try:
            self._log.rewrite(spec.canonical for spec in self._specs.values())
        except OSError as error:
            raise CoreError(
                ErrorKind.UNAVAILABLE, f"the log of namespaces cannot be written: {error}"
            ) from error
