"""What must hold when an engine decodes from KV that another computed; empty lists say it does.

The oracle looks at three things that a wrong byte cannot all escape: hashes of the pages as they
stood in the two engines' own memory (event logs), the tokens, and the log-probabilities against an
engine that never saw a hub.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvclient import Client
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from tests.support.engines import Generated, read_events

LOGPROB_TOLERANCE = 1e-4
DISTINCT_TOKENS_MIN = 6
LOOKUP_PINS_S = 30.0

Cells = dict[tuple[str, int], str]


def cells(events: Iterable[Mapping[str, Any]], kind: str) -> Cells:
    """{(block hash, global head): hash over all layers} of the `pushed` or `pulled` events."""
    found: Cells = {}
    for event in events:
        if event["event"] == kind:
            for offset, value in enumerate(event["cells"]):
                found[event["hash"], event["heads"][0] + offset] = value
    return found


def page_complaints(pushed: Cells, pulled: Cells) -> list[str]:
    """Pulled pages that differ from the pushed ones, or were pushed by nobody."""
    return [
        f"block {key[0][:12]} head {key[1]}: pulled {value}, pushed {pushed.get(key)}"
        for key, value in pulled.items()
        if pushed.get(key) != value
    ]


def answer_complaints(got: Generated, want: Generated) -> list[str]:
    """Differences of tokens and log-probabilities; too few distinct tokens prove nothing."""
    complaints = []
    if got.tokens != want.tokens:
        complaints.append(f"tokens {got.tokens}, want {want.tokens}")
    if len(set(want.tokens)) < DISTINCT_TOKENS_MIN:
        complaints.append(f"only {len(set(want.tokens))} distinct tokens: {want.tokens}")
    for step, (one, other) in enumerate(zip(got.logprobs, want.logprobs, strict=False)):
        worst = max((abs(one[t] - other[t]) for t in one.keys() & other.keys()), default=1.0)
        if worst > LOGPROB_TOLERANCE:
            complaints.append(f"step {step}: log-probabilities differ by {worst:.2e}")
    return complaints


def transports_of(log: Path) -> set[str]:
    """The transports that the processes of this event log have connected with."""
    return {e["transport"] for e in read_events(log) if e["event"] == "connected"}


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until `condition` holds; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def wait_connected(log: Path, processes: int = 1, *, timeout_s: float = 20.0) -> None:
    """Wait until so many processes of an engine have a session with the hub."""

    def done() -> bool:
        events = read_events(log)
        connected = {e["pid"] for e in events if e["event"] == "connected"}
        return len(connected) >= processes and any(e["event"] == "namespace" for e in events)

    wait_for(f"{processes} processes connected ({log})", done, timeout_s)


def wait_pushed(log: Path, blocks: int, *, timeout_s: float = 20.0) -> None:
    """Wait until the event log tells of `blocks` blocks pushed by each of its ranks."""

    def done() -> bool:
        by_rank: dict[int, int] = {}
        for event in read_events(log):
            if event["event"] == "push_done":
                by_rank[event["rank"]] = by_rank.get(event["rank"], 0) + event["blocks"]
        return bool(by_rank) and min(by_rank.values()) >= blocks

    wait_for(f"{blocks} blocks pushed ({log})", done, timeout_s)


def the_spec(client: Client) -> NamespaceSpec:
    """The one namespace of this hub, as its own answer tells it."""
    (known,) = client.list_namespaces()
    spec = known.spec
    return NamespaceSpec(
        model=spec.model,
        weights=spec.weights,
        adapter=spec.adapter,
        kv_dtype=spec.kv_dtype,
        encoding=spec.encoding,
        block_tokens=spec.block_tokens,
        page_tokens=spec.page_tokens,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        page_bytes=spec.page_bytes,
        tenant=spec.tenant,
        attributes=dict(spec.attributes),
    )


def evict_all(client: Client, namespace: bytes, hashes: Sequence[bytes]) -> None:
    """Evict until no block is left: an engine's lookup pins what it found for two seconds."""
    evicted = 0

    def done() -> bool:
        nonlocal evicted
        reply = client.evict(namespace, hashes)
        evicted += reply.blocks
        return not reply.in_use

    wait_for("the leases of the engines' lookups to end", done, LOOKUP_PINS_S)
    assert evicted == len(hashes)


def corrupt_a_page(client: Client, hashes: Sequence[bytes]) -> None:
    """Negative control: alter one page (second block and page, third layer, second head) behind
    the checksums, as only a wrong writer could. `hashes` are a prompt's blocks from its first."""
    namespace = client.open_namespace(the_spec(client))
    grid = namespace.grid
    data = np.zeros((len(hashes), grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    assert namespace.pull(hashes, data).found.all()
    evict_all(client, namespace.id, hashes)
    page = data[1, 2, 1, grid.page_bytes : 2 * grid.page_bytes].view(np.float32)
    page += 1.0
    result = namespace.push(hashes, data, parents=[ROOT, *hashes[:-1]])
    assert result.written == len(hashes), result
