"""Near misses: live namespaces that differ from a new one in exactly one field.

"Why no hits?" is the first question of every user. Two specs that differ in one field are equal
once that field is left out: every spec is filed under what remains when each field in turn, or
none, is left out. So the search costs O(fields), however many namespaces there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from kvproto.namespace import NamespaceSpec

_FIELDS = tuple(f.name for f in fields(NamespaceSpec) if f.name != "attributes")


class NearMisses:
    def __init__(self, most: int) -> None:
        self._most = most
        self._filed: dict[int, dict[int, NamespaceSpec]] = {}  # rest -> handle -> spec

    def add(self, handle: int, spec: NamespaceSpec) -> None:
        for rest in _rests(spec):
            self._filed.setdefault(rest, {})[handle] = spec

    def remove(self, handle: int, spec: NamespaceSpec) -> None:
        for rest in _rests(spec):
            others = self._filed[rest]
            others.pop(handle, None)
            if not others:
                del self._filed[rest]

    def find(self, spec: NamespaceSpec) -> list[str]:
        """For each near miss of the same tenant, at most `most`: the field and the namespace."""
        found: dict[int, str] = {}
        for rest in _rests(spec):
            for handle, other in self._filed.get(rest, {}).items():
                if len(found) == self._most:
                    return list(found.values())
                differing = spec.differences(other)
                if len(differing) == 1 and differing != ["tenant"]:
                    label = f"{other.id.hex()[:8]} ({other.model})"
                    found[handle] = f"{differing[0]} differs from namespace {label}"
        return list(found.values())


def _rests(spec: NamespaceSpec) -> Iterator[int]:
    """Hashes of a spec without each of its fields in turn, and of all of it."""
    items: list[tuple[str, object]] = [(name, getattr(spec, name)) for name in _FIELDS]
    items += [(f"attributes[{key}]", value) for key, value in sorted(spec.attributes.items())]
    yield hash(tuple(items))
    for at in range(len(items)):
        yield hash((*items[:at], *items[at + 1 :]))
