"""What must hold when an engine decodes from KV that another computed; empty lists say it does.

The oracle looks at three things that a wrong byte cannot all escape: hashes of the pages as they
stood in the two engines' own memory (event logs), the tokens, and the log-probabilities against an
engine that never saw a hub.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvclient import Client
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT, prefix_hashes
from tests.support.engines import Generated, read_events
from tests.support.server import ServerProcess

LOGPROB_TOLERANCE = 1e-4
DISTINCT_TOKENS_MIN = 6
LOOKUP_PINS_S = 30.0

Cells = dict[tuple[str, int], frozenset[str]]
"""(block hash, global head) -> "window layer page: hash" of each page that the engine had.

Layers count within a section, whose window tells it from others; pages count within the block.
"""


States = npt.NDArray[np.uint8]


def cells(events: Iterable[Mapping[str, Any]], kind: str) -> Cells:
    """The pages of the `pushed` or `pulled` events, of all ranks together."""
    found: dict[tuple[str, int], set[str]] = {}
    for event in events:
        if event["event"] == kind:
            for layer, row in enumerate(event["cells"], start=event["layers"][0]):
                for head, pages in enumerate(row, start=event["heads"][0]):
                    found.setdefault((event["hash"], head), set()).update(
                        f"{event['window']} {layer} {at}: {value}"
                        for at, value in zip(event["at"], pages, strict=True)
                    )
    return {key: frozenset(values) for key, values in found.items()}


def page_complaints(pushed: Cells, pulled: Cells) -> list[str]:
    """Pulled pages that differ from the pushed ones, or were pushed by nobody."""
    return [
        f"block {key[0][:12]} head {key[1]}: pulled {sorted(values - pushed.get(key, frozenset()))}"
        for key, values in pulled.items()
        if not values <= pushed.get(key, frozenset())
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


def wait_pushed(
    log: Path, blocks: int, *, ranks: int = 1, windows: int = 1, timeout_s: float = 20.0
) -> None:
    """Wait until the event log tells of `blocks` blocks pushed by each of `ranks` ranks, in each of
    the sections that the model's `windows` kinds of layers make.

    Ranks and sections push on their own: one may be done before another's first event.
    """

    def done() -> bool:
        found: dict[tuple[int, int], int] = {}
        for event in read_events(log):
            if event["event"] == "push_done":
                part = event["rank"], event["window"]
                found[part] = found.get(part, 0) + event["blocks"]
        return len(found) >= ranks * windows and min(found.values()) >= blocks

    wait_for(f"{blocks} blocks pushed ({log})", done, timeout_s)


def the_spec(client: Client) -> NamespaceSpec:
    """The one namespace of this hub, as its own answer tells it."""
    (spec,) = specs_of(client)
    return spec


def specs_of(client: Client) -> list[NamespaceSpec]:
    """The namespaces of this hub."""
    return [_spec(known.spec) for known in client.list_namespaces()]


def _spec(spec: Any) -> NamespaceSpec:
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


def corrupt_a_page(
    client: Client, hashes: Sequence[bytes], spec: NamespaceSpec | None = None
) -> None:
    """Negative control: alter one page (second block and page, third layer, second head) behind
    the checksums, as only a wrong writer could. `hashes` are a prompt's blocks from its first;
    `spec` says in which namespace, where the hub has several."""
    namespace = client.open_namespace(spec or the_spec(client))
    grid = namespace.grid
    data = np.zeros((len(hashes), grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    assert namespace.pull(hashes, data).found.all()
    evict_all(client, namespace.id, hashes)
    layer, head = min(2, grid.layers - 1), min(1, grid.heads - 1)
    page = data[1, layer, head, grid.page_bytes : 2 * grid.page_bytes].view(np.float32)
    page += 1.0
    result = namespace.push(hashes, data, parents=[ROOT, *hashes[:-1]])
    assert result.written == len(hashes), result


def hand_off_keys(tokens: Sequence[int], block: int) -> list[bytes]:
    """Keys of what is handed over of a prompt of a model with recurrent states, that of the state
    last: it is the one before the prompt's last token."""
    return prefix_hashes(tokens[:-1], block, tail=True)


def state_of(client: Client, spec: NamespaceSpec, keys: Sequence[bytes]) -> States:
    """The state that was handed over under the last of these keys, [1, layers, 1, bytes]."""
    namespace = client.open_namespace(spec)
    grid = namespace.grid
    data = np.zeros((1, grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    assert namespace.pull(keys[-1:], data).found.all()
    return data


def replace_state(
    client: Client, spec: NamespaceSpec, keys: Sequence[bytes], state: States, *, tokens: int
) -> None:
    """Put another state behind the checksums. Its block holds so many `tokens`."""
    namespace = client.open_namespace(spec)
    evict_all(client, namespace.id, keys[-1:])
    parent = keys[-2] if len(keys) > 1 else ROOT
    result = namespace.push(keys[-1:], state, parents=[parent], tokens=[tokens])
    assert result.written == 1, result


def altered(state: States) -> States:
    """With the numbers of the last layer doubled."""
    changed = state.copy()
    numbers = changed[0, -1].view(np.float32)
    numbers *= 2.0
    return changed


def flip_a_bit(
    server: ServerProcess, client: Client, spec: NamespaceSpec, key: bytes, *, layer: int, head: int
) -> None:
    """Flip one bit of a cell where it stands in the hub's arena."""
    namespace = client.open_namespace(spec)
    grid = namespace.grid
    data = np.zeros((1, grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    assert namespace.pull([key], data).found.all()
    arena = server.host_dir / "arena"
    with arena.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        place = memory.find(data[0, layer, head].tobytes())
        assert place > 0
        memory[place + 100] ^= 1
