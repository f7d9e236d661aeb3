"""Recurrent state on real engines: handed over as it was before the prompt's last token.

Engines run without prefix caching, since vLLM's own caching of states does not run on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvclient import Client
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT, prefix_hashes
from tests.support.engines import PATIENT, Engine, Generated, hub_config, read_events
from tests.support.kv_oracle import (
    answer_complaints,
    cells,
    evict_all,
    page_complaints,
    specs_of,
    wait_connected,
    wait_for,
)
from tests.support.model_zoo import FAMILIES, ids, write_family
from tests.support.server import start_server

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, TOKENS = 128, 16
PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False}
STATE = -1
LENGTHS = (300, 3 * BLOCK + 1, 2 * BLOCK, 90)
"""The state is that of a tail, of a full block, of a tail of 127 tokens, of a tail alone."""
PROMPTS = {length: ids(length, length) for length in LENGTHS}
LONGER = [*PROMPTS[300], 7]
"""Handed off, it leaves the state after the last token of a prompt of 300."""


def names_of(tokens: list[int]) -> list[bytes]:
    """Keys of what is handed over of a prompt."""
    return prefix_hashes(tokens[:-1], BLOCK, tail=True)


class Decoder:
    """A decode engine, and what it pulls."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine, self.log = engine, log

    def answer(self, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        before = len(read_events(self.log))
        params = {"do_remote_prefill": True, "do_remote_decode": False}
        answer = self.engine.generate(tokens, tokens=TOKENS, transfer=params)
        return answer, read_events(self.log)[before:]


def replace_state(
    client: Client, spec: NamespaceSpec, tokens: list[int], change: np.ndarray
) -> None:
    """Put other bytes behind the checksums in place of a prompt's state."""
    namespace = client.open_namespace(spec)
    *parents, name = names_of(tokens)
    evict_all(client, namespace.id, [name])
    size = (len(tokens) - 1) % BLOCK or BLOCK
    parent = parents[-1] if parents else ROOT
    result = namespace.push([name], change, parents=[parent], tokens=[size])
    assert result.written == 1, result


def state_of(client: Client, spec: NamespaceSpec, tokens: list[int]) -> np.ndarray:
    namespace = client.open_namespace(spec)
    grid = namespace.grid
    data = np.zeros((1, grid.layers, grid.heads, grid.cell_bytes()), np.uint8)
    assert namespace.pull(names_of(tokens)[-1:], data).found.all()
    return data


@pytest.mark.parametrize("name", ["granite4", "mamba2", "falconh1"])
def test_a_decode_engine_goes_on_from_the_state_before_the_last_token(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    model = write_family(tmp_path / "model", name)
    log, decode_log = tmp_path / "p.jsonl", tmp_path / "d.jsonl"
    with Engine.start(model, **family.options) as lone:
        want = {length: lone.generate(p, tokens=TOKENS) for length, p in PROMPTS.items()}
    with start_server(tmp_path, host_bytes="128MiB") as server:
        config = hub_config(server.address, event_log=log, **PATIENT)
        with Engine.start(model, config=config, **family.options) as engine:
            wait_connected(log)
            for tokens in (*PROMPTS.values(), LONGER):
                answer = engine.generate(tokens, tokens=1, transfer=PREFILL_LEG)
                assert answer.params is not None
            wanted = {key.hex() for p in (*PROMPTS.values(), LONGER) for key in names_of(p)[-1:]}
            wait_for("pushes", lambda: wanted <= states_of(read_events(log), "pushed"))
        pushed = cells(read_events(log), "pushed")
        assert states_of(read_events(log), "pushed") == wanted, "a state of each prompt, no other"
        config = hub_config(server.address, event_log=decode_log, **PATIENT)
        with Engine.start(model, config=config, **family.options) as engine:
            wait_connected(decode_log)
            decoder = Decoder(engine, decode_log)
            for length, tokens in PROMPTS.items():
                got, events = decoder.answer(tokens)
                assert answer_complaints(got, want[length]) == [], f"prompt of {length} tokens"
                scheduled = [(e["tokens"], e["left"]) for e in events if e["event"] == "scheduled"]
                assert scheduled == [(1, 1)]
                pulled = cells(events, "pulled")
                assert page_complaints(pushed, pulled) == []
                assert states_of(events, "pulled") == {names_of(tokens)[-1].hex()}
                if 0 in family.windows:
                    assert {key for key, _ in pulled} == {key.hex() for key in names_of(tokens)}
            with Client.connect(server.address) as client:
                spec = next(s for s in specs_of(client) if s.encoding.startswith("state-"))
                good = state_of(client, spec, PROMPTS[300])
                after = state_of(client, spec, LONGER)
                assert (good != after).any()
                # A state after the last token, and one with a layer altered: either is seen.
                for bad in (after, altered(good)):
                    replace_state(client, spec, PROMPTS[300], bad)
                    got, events = decoder.answer(PROMPTS[300])
                    assert answer_complaints(got, want[300]) != []
                    assert len(page_complaints(pushed, cells(events, "pulled"))) == 1
                replace_state(client, spec, PROMPTS[300], good)
            got, _ = decoder.answer(PROMPTS[300])
            assert answer_complaints(got, want[300]) == []


def altered(state: np.ndarray) -> np.ndarray:
    """With the numbers of the last layer doubled."""
    changed = state.copy()
    numbers = changed[0, -1].view(np.float32)
    numbers *= 2.0
    return changed


def states_of(events: list[dict[str, Any]], kind: str) -> set[str]:
    return {e["hash"] for e in events if e["event"] == kind and e["window"] == STATE}
