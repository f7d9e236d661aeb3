"""Which engines are served, and what makes two of them share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.config import Settings
from kvserver_vllm.errors import ConfigError, UnsupportedError
from kvserver_vllm.identity import (
    Adapters,
    build_spec,
    head_range,
    layer_index,
    layer_starts,
    replicas,
    require_supported,
)
from kvserver_vllm.messages import RankInfo


class FullAttentionSpec:
    pass


class MambaSpec:
    pass


class TextConfig(SimpleNamespace):
    model_type = "llama"

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def engine(path: Path, **changes: Any) -> SimpleNamespace:
    model = {
        "model": str(path),
        "revision": None,
        "is_encoder_decoder": False,
        "dtype": "torch.float32",
        "quantization": None,
        "max_model_len": 1024,
        "hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"]),
        "hf_text_config": TextConfig(rope_theta=1e4, num_hidden_layers=4),
        "heads": 4,
    }
    parallel = {
        "tensor_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    rest: dict[str, Any] = {"speculative_config": None, "load_format": "auto"}
    for name, value in changes.items():
        for part in (model, parallel, rest):
            if name in part:
                part[name] = value
    heads = model.pop("heads")
    return SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads, **model),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(),
        load_config=SimpleNamespace(load_format=rest["load_format"]),
        speculative_config=rest["speculative_config"],
    )


def groups(*specs: type) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s()) for s in specs])


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
def test_supported_engines_pass(tmp_path: Path, version: str) -> None:
    require_supported(version, engine(tmp_path), groups(FullAttentionSpec))


@pytest.mark.parametrize(
    ("version", "changes", "specs", "named"),
    [
        ("0.30.1", {}, [FullAttentionSpec], "vLLM 0.30.1"),
        ("0.34.0", {}, [FullAttentionSpec], "vLLM 0.34.0"),
        ("nightly", {}, [FullAttentionSpec], "vLLM nightly"),
        ("0.32.0", {"is_encoder_decoder": True}, [FullAttentionSpec], "encoder-decoder"),
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
        ("0.32.0", {}, [FullAttentionSpec, FullAttentionSpec], "2 KV cache groups"),
        ("0.32.0", {}, [MambaSpec], "MambaSpec"),
        (
            "0.32.0",
            {"speculative_config": SimpleNamespace(method="eagle")},
            [FullAttentionSpec],
            "'eagle'",
        ),
        ("0.32.0", {"load_format": "dummy"}, [FullAttentionSpec], "'dummy'"),
        ("0.32.0", {"model": "nobody/no-such-model"}, [FullAttentionSpec], "no-such-model"),
    ],
)
def test_what_is_refused_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    changes: dict[str, Any],
    specs: list[type],
    named: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnsupportedError, match=named):
        require_supported(version, engine(tmp_path, **changes), groups(*specs))


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
    tmp_path: Path, heads: int, size: int, want: list[tuple[int, int]]
) -> None:
    config = engine(tmp_path, heads=heads, tensor_parallel_size=size)
    assert [head_range(config, rank) for rank in range(size)] == want
    assert replicas(config) == max(1, size // heads)


def test_pipeline_stages_are_layer_ranges() -> None:
    stages = {(0, 0): info(range(3)), (0, 1): info(range(3)), (1, 0): info(range(3, 7))}
    assert layer_starts(stages) == ({0: 0, 1: 3}, 7)
    with pytest.raises(UnsupportedError, match="ascending"):
        layer_starts({(0, 0): info(range(3, 6)), (1, 0): info(range(3))})
    with pytest.raises(UnsupportedError, match="different layers"):
        layer_starts({(0, 0): info(range(3)), (0, 1): info(range(2))})


def spec(path: Path, weights: bytes = bytes(32), epoch: str = "", **changes: Any) -> bytes:
    config = engine(path, **changes)
    ranks = {(0, 0): info()}
    return build_spec(config, ranks, weights, tenant="", block_tokens=128, epoch=epoch).id


def test_the_namespace_follows_what_shapes_the_kv_and_no_name(tmp_path: Path) -> None:
    base = spec(tmp_path)
    assert spec(tmp_path / "moved") == base
    assert spec(tmp_path, tensor_parallel_size=2) == base
    assert spec(tmp_path, max_model_len=512) == base
    others = [
        spec(tmp_path, weights=b"x" * 32),
        spec(tmp_path, epoch="after a reset"),
        spec(tmp_path, dtype="torch.bfloat16"),
        spec(tmp_path, quantization="awq"),
        spec(tmp_path, hf_text_config=TextConfig(rope_theta=5e5, num_hidden_layers=4)),
    ]
    assert len({base, *others}) == 6


def test_long_rope_chooses_its_factors_by_the_engines_limit(tmp_path: Path) -> None:
    text = TextConfig(rope_scaling={"type": "longrope", "short_factor": [1.0] * 200})
    ids = {spec(tmp_path, hf_text_config=text, max_model_len=n) for n in (1024, 8192)}
    assert len(ids) == 2


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
