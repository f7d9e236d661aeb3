"""Families of models on real engines: one engine prefills and is gone, another decodes.

All of it is slow, and runs in `make test-all`; `test_vllm_hybrid.py` has one family in every run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvclient import Client
from kvproto.prefix import prefix_hashes
from tests.support.engines import (
    PATIENT,
    Engine,
    EngineError,
    Generated,
    hub_config,
    read_events,
)
from tests.support.kv_oracle import (
    DISTINCT_TOKENS_MIN,
    answer_complaints,
    cells,
    corrupt_a_page,
    page_complaints,
    specs_of,
    wait_connected,
    wait_for,
    wait_pushed,
)
from tests.support.model_zoo import FAMILIES, Family, ids, write_family
from tests.support.server import ServerProcess, start_server

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK, TOKENS = 128, 12
PROMPT = ids(3, 700)
FULL = len(PROMPT) // BLOCK


class Run:
    """Engines of one family, one after another, at one hub."""

    def __init__(self, path: Path, family: Family, server: ServerProcess, dtype: str) -> None:
        self.model = write_family(path / "model", family.name, dtype=dtype)
        self.family, self.server, self.dtype, self.path = family, server, dtype, path
        self.log, self.decode_log = path / "p.jsonl", path / "d.jsonl"

    def engine(self, log: Path) -> Engine:
        config = hub_config(self.server.address, event_log=log, **PATIENT)
        options = {"dtype": self.dtype, **self.family.options}
        return Engine.start(self.model, config=config, **options)

    def prefill(self) -> Generated:
        with self.engine(self.log) as engine:
            wait_connected(self.log)
            answer = engine.generate(PROMPT, tokens=TOKENS)
            wait_pushed(self.log, FULL, windows=len(set(self.family.windows)))
        assert answer.cached == 0
        return answer

    def decode(self, *, corrupt: bool = False) -> list[Generated]:
        """The prompt's answer from the hub's blocks; with `corrupt`, and again with a bad page."""
        with self.engine(self.decode_log) as engine:
            wait_connected(self.decode_log)
            answers = [engine.generate(PROMPT, tokens=TOKENS)]
            if corrupt:
                with Client.connect(self.server.address) as client:
                    spec = next(s for s in specs_of(client) if self._first(s.attributes))
                    corrupt_a_page(client, prefix_hashes(PROMPT, BLOCK), spec)

                def done() -> bool:
                    engine.idle(0.1)
                    return engine.reset_prefix_cache()

                wait_for("a reset of the prefix cache", done)
                answers.append(engine.generate(PROMPT, tokens=TOKENS))
        return answers

    def _first(self, attributes: dict[str, str]) -> bool:
        """Whether it is the section that every block of a prefix is needed of."""
        return attributes.get("section", "full") == "full"

    def pages(self) -> list[str]:
        pushed = cells(read_events(self.log), "pushed")
        pulled = cells(read_events(self.decode_log), "pulled")
        assert len(pushed) == FULL * self.family.kv_heads
        assert len({value for values in pushed.values() for value in values}) > len(pushed)
        return page_complaints(pushed, pulled)

    def pulled(self) -> dict[int, int]:
        """Blocks that were pulled, by window."""
        found: dict[int, int] = {}
        for event in read_events(self.decode_log):
            if event["event"] == "pulled":
                found[event["window"]] = found.get(event["window"], 0) + 1
        return found


@pytest.mark.parametrize(
    "name", ["qwen3", "llama-int8", "opt", "gpt2", "mistral", "gemma2", "gemma3", "gptoss"]
)
def test_a_decode_engine_answers_from_what_a_prefill_engine_computed(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    with start_server(tmp_path, host_bytes="128MiB") as server:
        run = Run(tmp_path, family, server, "float32")
        computed = run.prefill()
        good, *bad = run.decode(corrupt=0 in family.windows)
    assert answer_complaints(good, computed) == []
    assert good.cached >= FULL * BLOCK - 1
    assert set(run.pulled()) == set(family.windows)
    # The corrupted page, and nothing else: what the second pull brought differs in one cell.
    assert len(run.pages()) == len(bad)
    assert all(answer_complaints(answer, computed) for answer in bad)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("deepseek2", "float32"),
        ("deepseek3", "float32"),
        ("llama", "bfloat16"),
        ("cohere2", "bfloat16"),
    ],
)
def test_two_decode_engines_agree_where_prefill_and_decode_round_differently(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """Latent attention on a CPU decodes by other kernels than it prefills; bfloat16 rounds by the
    length of a pass. Bytes are equal all the same, and so are two engines that decode from them."""
    family = FAMILIES[name]
    with start_server(tmp_path, host_bytes="128MiB") as server:
        run = Run(tmp_path, family, server, dtype)
        run.prefill()
        (one,) = run.decode()
        assert run.pages() == []
        (other,) = run.decode()
    assert answer_complaints(other, one) == []
    assert min(one.cached, other.cached) >= FULL * BLOCK - 1
    assert run.pages() == []
    assert set(run.pulled()) == set(family.windows)


def test_chunked_local_attention_is_refused_while_the_engine_loads(tmp_path: Path) -> None:
    """Llama-4 runs on a CPU without a hub."""
    model = write_family(tmp_path / "model", "llama4")
    with Engine.start(model) as lone:
        assert len(set(lone.generate(PROMPT, tokens=TOKENS).tokens)) >= DISTINCT_TOKENS_MIN
    with pytest.raises(EngineError, match="KV cache of kind ChunkedLocalAttentionSpec"):
        Engine.start(model, config=hub_config("127.0.0.1:9"))
