"""Recurrent state on real engines: handed over as it was before the prompt's last token.

Engines run without prefix caching, since vLLM's own caching of states does not run on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvclient import Client
from tests.support.engines import (
    PATIENT,
    Engine,
    EngineError,
    Generated,
    hub_config,
    read_events,
)
from tests.support.kv_oracle import (
    altered,
    answer_complaints,
    cells,
    hand_off_keys,
    page_complaints,
    replace_state,
    specs_of,
    state_of,
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
TAIL_TTL_MS = 300_000
"""For engines that start one after another."""
LENGTHS = (300, 3 * BLOCK + 1, 2 * BLOCK, 90)
"""The state is that of a tail, of a full block, of a tail of 127 tokens, of a tail alone."""
PROMPTS = {length: ids(length, length) for length in LENGTHS}
LONGER = [*PROMPTS[300], 7]
"""Handed off, it leaves the state after the last token of a prompt of 300."""
KEYS = hand_off_keys(PROMPTS[300], BLOCK)


class Decoder:
    """A decode engine, and what it pulls."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine, self.log = engine, log

    def answer(self, tokens: list[int]) -> tuple[Generated, list[dict[str, Any]]]:
        before = len(read_events(self.log))
        params = {"do_remote_prefill": True, "do_remote_decode": False}
        answer = self.engine.generate(tokens, tokens=TOKENS, transfer=params)
        return answer, read_events(self.log)[before:]


def hand_off(engine: Engine, log: Path, prompts: list[list[int]], *, attention: bool) -> None:
    """Prefill them, and wait until all of it is at the hub."""
    wait_connected(log)
    wanted = set()
    for tokens in prompts:
        answer = engine.generate(tokens, tokens=1, transfer=PREFILL_LEG)
        assert answer.params is not None
        keys = [key.hex() for key in hand_off_keys(tokens, BLOCK)]
        wanted |= {(keys[-1], STATE), *((key, 0) for key in keys if attention)}

    def done() -> bool:
        events = read_events(log)
        return wanted <= {(e["hash"], e["window"]) for e in events if e["event"] == "pushed"}

    wait_for("pushes", done)


def answers_of_a_lone_engine(model: Path, options: dict[str, Any]) -> dict[int, Generated]:
    """On some processors (seen on one with AVX512_BF16, and not on another EPYC) vLLM 0.31 has
    Mamba's convolution in bfloat16 only, and does not start in fp32, with a hub or without."""
    try:
        with Engine.start(model, **options) as lone:
            return {length: lone.generate(p, tokens=TOKENS) for length, p in PROMPTS.items()}
    except EngineError as error:
        if "causal_conv1d" in str(error) and "not implemented for 'Float'" in str(error):
            pytest.skip("this vLLM has no convolution in fp32 on this processor")
        raise


@pytest.mark.parametrize("name", ["granite4", "mamba2", "falconh1"])
def test_a_decode_engine_goes_on_from_the_state_before_the_last_token(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    model = write_family(tmp_path / "model", name)
    log, decode_log = tmp_path / "p.jsonl", tmp_path / "d.jsonl"
    want = answers_of_a_lone_engine(model, family.options)
    with start_server(tmp_path, host_bytes="128MiB", tail_ttl_ms=TAIL_TTL_MS) as server:
        config = hub_config(server.address, event_log=log, **PATIENT)
        with Engine.start(model, config=config, **family.options) as engine:
            wait_connected(log)
            for tokens in (*PROMPTS.values(), LONGER):
                answer = engine.generate(tokens, tokens=1, transfer=PREFILL_LEG)
                assert answer.params is not None
            wanted = {
                key.hex()
                for p in (*PROMPTS.values(), LONGER)
                for key in hand_off_keys(p, BLOCK)[-1:]
            }
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
                pulled, keys = cells(events, "pulled"), hand_off_keys(tokens, BLOCK)
                assert page_complaints(pushed, pulled) == []
                assert states_of(events, "pulled") == {keys[-1].hex()}
                if 0 in family.windows:
                    assert {key for key, _ in pulled} == {
                        key.hex() for key in hand_off_keys(tokens, BLOCK)
                    }
            with Client.connect(server.address) as client:
                spec = next(s for s in specs_of(client) if s.encoding.startswith("state-"))
                good = state_of(client, spec, KEYS)
                after = state_of(client, spec, hand_off_keys(LONGER, BLOCK))
                assert (good != after).any()
                # A state after the last token, and one with a layer altered: either is seen.
                for bad in (after, altered(good)):
                    replace_state(client, spec, KEYS, bad, tokens=299 % BLOCK)
                    got, events = decoder.answer(PROMPTS[300])
                    assert answer_complaints(got, want[300]) != []
                    assert len(page_complaints(pushed, cells(events, "pulled"))) == 1
                replace_state(client, spec, KEYS, good, tokens=299 % BLOCK)
            got, _ = decoder.answer(PROMPTS[300])
            assert answer_complaints(got, want[300]) == []


def states_of(events: list[dict[str, Any]], kind: str) -> set[str]:
    return {e["hash"] for e in events if e["event"] == kind and e["window"] == STATE}


def test_two_decode_engines_go_on_alike_from_a_state_in_bfloat16(tmp_path: Path) -> None:
    """On a CPU gated delta nets run in bfloat16 only, which rounds by the length of a pass: a lone
    engine's answer is another. Bytes are equal all the same."""
    family, log, tokens = FAMILIES["qwen3next"], tmp_path / "p.jsonl", PROMPTS[300]
    model = write_family(tmp_path / "model", family.name, dtype="bfloat16")
    options = {"dtype": "bfloat16", **family.options}
    answers = []
    with start_server(tmp_path, host_bytes="128MiB", tail_ttl_ms=TAIL_TTL_MS) as server:
        config = hub_config(server.address, event_log=log, **PATIENT)
        with Engine.start(model, config=config, **options) as engine:
            hand_off(engine, log, [tokens], attention=True)
        pushed = cells(read_events(log), "pushed")
        for number in range(2):
            decode_log = tmp_path / f"d{number}.jsonl"
            config = hub_config(server.address, event_log=decode_log, **PATIENT)
            with Engine.start(model, config=config, **options) as engine:
                wait_connected(decode_log)
                decoder = Decoder(engine, decode_log)
                got, events = decoder.answer(tokens)
                answers.append(got)
                assert [(e["tokens"], e["left"]) for e in events if e["event"] == "scheduled"] == [
                    (1, 1)
                ]
                assert page_complaints(pushed, cells(events, "pulled")) == []
                assert {key for key, _ in cells(events, "pulled")} == {key.hex() for key in KEYS}
                if number == 1:
                    with Client.connect(server.address) as client:
                        spec = next(s for s in specs_of(client) if s.encoding.startswith("state-"))
                        bad = altered(state_of(client, spec, KEYS))
                        replace_state(client, spec, KEYS, bad, tokens=299 % BLOCK)
                    got, events = decoder.answer(tokens)
                    assert len(page_complaints(pushed, cells(events, "pulled"))) == 1
    assert answer_complaints(answers[1], answers[0]) == []
    assert answer_complaints(got, answers[0]) != []
