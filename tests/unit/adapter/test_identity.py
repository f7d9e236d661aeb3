"""Which engines are served, and what makes two of them share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.config import Settings
from kvserver_vllm.errors import ConfigError, UnsupportedError
from kvserver_vllm.identity import (
    Adapters,
    head_range,
    layer_index,
    layer_starts,
    replicas,
    require_supported,
)
from kvserver_vllm.messages import RankInfo
from tests.support.vllm_configs import engine_config, write_config

pytestmark = pytest.mark.timeout(180)  # the first configuration makes vLLM import its model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield write_config(tmp_path_factory.mktemp("model"))


class FullAttentionSpec:
    pass


class ChunkedLocalAttentionSpec:
    pass


def engine(model: Path, /, **changes: Any) -> Any:
    """The configuration of an engine, with attributes of its parts changed."""
    config = engine_config(model)
    parts = (config.model_config, config.parallel_config, config.load_config, config)
    for name, value in changes.items():
        part = next(part for part in parts if hasattr(part, name))
        object.__setattr__(part, name, value)
    return config


def split(heads: int, ranks: int, *, mla: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads, use_mla=mla),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


def groups(*specs: type) -> SimpleNamespace:
    found = [SimpleNamespace(kv_cache_spec=s(), layer_names=["a.0"]) for s in specs]
    return SimpleNamespace(kv_cache_groups=found)


def info(layers: range = range(4), start: int = 0, heads: int = 4, **changes: Any) -> RankInfo:
    values = {
        "encoding": "cpu-attn-kt/1",
        "kv_dtype": "float32",
        "page_tokens": 32,
        "page_bytes": 8192,
        **changes,
    }
    return RankInfo(layers=tuple(layers), head_start=start, heads=heads, **values)


@pytest.mark.parametrize("version", ["0.31.0", "0.31.2.dev3", "0.32.0+cpu", "0.33.1"])
def test_supported_engines_pass(model: Path, version: str) -> None:
    require_supported(version, engine(model), groups(FullAttentionSpec))


@pytest.mark.parametrize(
    ("version", "changes", "specs", "named"),
    [
        ("0.30.1", {}, [FullAttentionSpec], "vLLM 0.30.1"),
        ("0.34.0", {}, [FullAttentionSpec], "vLLM 0.34.0"),
        ("nightly", {}, [FullAttentionSpec], "vLLM nightly"),
        ("", {}, [FullAttentionSpec], "vLLM : this adapter supports"),
        ("1.32.0", {}, [FullAttentionSpec], "vLLM 1.32.0"),
        (
            "0.32.0",
            {"decode_context_parallel_size": 2},
            [FullAttentionSpec],
            "decode_context_parallel_size is 2",
        ),
        (
            "0.32.0",
            {"prefill_context_parallel_size": 2},
            [FullAttentionSpec],
            "prefill_context_parallel_size is 2",
        ),
        (
            "0.32.0",
            {},
            [FullAttentionSpec, ChunkedLocalAttentionSpec],
            "ChunkedLocalAttentionSpec",
        ),
        (
            "0.32.0",
            {"speculative_config": SimpleNamespace(method="eagle")},
            [FullAttentionSpec],
            "'eagle'",
        ),
        ("0.32.0", {"model": "nobody/no-such-model"}, [FullAttentionSpec], "no-such-model"),
    ],
)
def test_what_is_refused_is_named(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    changes: dict[str, Any],
    specs: list[type],
    named: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnsupportedError, match=named):
        require_supported(version, engine(model, **changes), groups(*specs))


@pytest.mark.parametrize(
    ("heads", "size", "want"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 2)]),
        (8, 4, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
    ],
)
def test_ranks_are_head_regions_and_replicas_share_one(
    heads: int, size: int, want: list[tuple[int, int]]
) -> None:
    config = split(heads, size)
    assert [head_range(config, rank) for rank in range(size)] == want
    assert replicas(config) == max(1, size // heads)


def test_a_latent_is_one_head_that_all_ranks_replicate() -> None:
    config = split(16, 4, mla=True)
    assert [head_range(config, rank) for rank in range(4)] == [(0, 1)] * 4
    assert replicas(config) == 4


def test_pipeline_stages_are_layer_ranges() -> None:
    stages = {(0, 0): info(range(3)), (0, 1): info(range(3)), (1, 0): info(range(3, 7))}
    assert layer_starts(stages) == ({0: 0, 1: 3}, 7)
    with pytest.raises(UnsupportedError, match="ascending"):
        layer_starts({(0, 0): info(range(3, 6)), (1, 0): info(range(3))})
    with pytest.raises(UnsupportedError, match="different layers"):
        layer_starts({(0, 0): info(range(3)), (0, 1): info(range(2))})


def test_layer_names_carry_their_index() -> None:
    assert layer_index("model.layers.12.self_attn.attn") == 12
    with pytest.raises(UnsupportedError, match="one layer index"):
        layer_index("model.blocks.1.experts.2.attn")


def adapter(path: Path, weights: bytes, settings: str = "{}") -> SimpleNamespace:
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(weights)
    (path / "adapter_config.json").write_text(settings)
    return SimpleNamespace(lora_int_id=1, lora_path=str(path), load_inplace=False)


def test_adapters_are_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digests = [
        Adapters().digest(adapter(tmp_path / name, weights, settings))
        for name, weights, settings in [
            ("a", b"one", "{}"),
            ("b", b"one", "{}"),
            ("c", b"two", "{}"),
            ("d", b"one", '{"lora_alpha": 2}'),
        ]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_adapter_that_cannot_be_read_is_shared_with_nobody(tmp_path: Path) -> None:
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path / "no"), load_inplace=False)
    mine, other = Adapters(), Adapters()
    assert mine.digest(lora) == mine.digest(lora) != other.digest(lora)


def test_settings_have_defaults_and_name_what_is_wrong() -> None:
    settings = Settings.parse({"address": "hub:1"})
    assert (settings.block_tokens, settings.lookup_ms, settings.load_deadline_ms) == (
        128,
        100,
        10_000,
    )
    for extra, named in [
        ({}, "address"),
        ({"address": "hub:1", "adress": 1}, "unknown key 'adress'"),
        ({"address": "hub:1", "lookup_ms": -1}, "lookup_ms is -1"),
        ({"address": "hub:1", "lookup_ms": True}, "lookup_ms is True"),
        ({"address": "hub:1", "push": 1}, "push is 1"),
        ({"address": "hub:1", "tenant": 3}, "tenant is 3"),
        ({"address": "hub:1", "block_tokens": 0}, "block_tokens is 0"),
    ]:
        with pytest.raises(ConfigError, match=named):
            Settings.parse(extra)


def test_registering_twice_is_harmless() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    import kvserver_vllm

    kvserver_vllm.register()
    kvserver_vllm.register()
    assert kvserver_vllm.CONNECTOR in KVConnectorFactory._registry
