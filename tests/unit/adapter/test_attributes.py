"""What else decides the numbers, over the configurations that vLLM itself makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.attributes import attributes_of, require_numbers
from kvserver_vllm.config import Settings
from kvserver_vllm.connector import KVServerConnector
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.identity import _cpu_encoding, build_spec, kv_dtype, require_supported
from kvserver_vllm.messages import RankHolds, RankInfo
from tests.support.vllm_configs import LONGROPE, engine_config, write_config

pytestmark = pytest.mark.timeout(180)  # the first configuration makes vLLM import its model

GROUPS = SimpleNamespace(
    kv_cache_groups=[SimpleNamespace(kv_cache_spec=type("FullAttentionSpec", (), {})())]
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 1024,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
Options = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windowed")
    return write_config(path, model_type="mistral", sliding_window=64)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("long"), rope_parameters=LONGROPE)


def spec_id(config: Any, *, kv: str = "float32", encoding: str = "cpu-attn-kt/1") -> bytes:
    """The namespace of an engine with this configuration."""
    require_supported("0.32.0", config, GROUPS)
    info = RankInfo(tuple(range(4)), 0, 2, encoding, kv, 32, 8192)
    ranks = {(0, 0): info}
    return build_spec(config, ranks, bytes(32), tenant="", block_tokens=128, epoch="").id


@pytest.fixture(scope="module")
def base(model: Path) -> bytes:
    return spec_id(engine_config(model))


def tempered(config: Any) -> Any:
    config.rms_norm_eps = 0.1
    return config


@pytest.mark.parametrize(
    "options",
    [
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
        {"hf_overrides": {"rope_theta": 5e5}},
        {"hf_overrides": {"rope_parameters": YARN}},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
        {"hf_overrides": tempered},
        {"hf_overrides": {"num_experts_per_tok": 1}},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "fp8"},
        {"dtype": "bfloat16", "quantization": "int8_per_channel_weight_only"},
        {"load_format": "pt"},
        {"model_impl": "transformers"},
    ],
    ids=str,
)
def test_an_option_that_changes_the_numbers_is_another_namespace(
    model: Path, base: bytes, options: Options
) -> None:
    assert spec_id(engine_config(model, **options)) != base


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 512},
        {"block_size": 64},
        {"tensor_parallel_size": 2},
        {"seed": 7},
        {"served_model_name": "another"},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 512},
        {"enforce_eager": False},
        {"enable_lora": True},
        {"disable_sliding_window": True},
        {"speculative_config": NGRAM},
        {"load_format": "runai_streamer"},
    ],
    ids=str,
)
def test_an_option_that_changes_no_number_shares(
    model: Path, base: bytes, options: Options
) -> None:
    assert spec_id(engine_config(model, **options)) == base


W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def test_the_scheme_of_a_quantised_checkpoint_counts(tmp_path: Path, base: bytes) -> None:
    """Which layers are left alone, and whether KV has scales, too; scales are the files' bytes."""
    schemes = [W8A8, {**W8A8, "ignore": []}, {**W8A8, "kv_cache_scheme": KV_SCHEME}]
    ids = {base}
    for number, scheme in enumerate(schemes):
        path = write_config(tmp_path / str(number), quantization_config=scheme)
        config = engine_config(path)
        assert attributes_of(config)["quantization_method"] == "compressed-tensors"
        ids.add(spec_id(config))
    assert len(ids) == 1 + len(schemes)


def test_windows_and_rope_stand_readable(windowed: Path, long: Path) -> None:
    assert attributes_of(engine_config(windowed))["window"] == '{"sliding_window":64}'
    assert "longrope" in attributes_of(engine_config(long))["rope"]


def test_a_window_that_is_switched_off_is_another_namespace(windowed: Path) -> None:
    ids = {
        spec_id(engine_config(windowed, max_model_len=64, disable_sliding_window=off))
        for off in (False, True)
    }
    assert len(ids) == 2


def test_the_engines_limit_counts_where_it_chooses_ropes_factors(long: Path) -> None:
    assert len({spec_id(engine_config(long, max_model_len=n)) for n in (1024, 2048)}) == 2


def test_llama_4_tempers_its_attention_by_the_engines_limit(model: Path) -> None:
    config = engine_config(model)
    config.model_config.hf_config.architectures = ["Llama4ForCausalLM"]
    seen = []
    for limit, generation in [(1024, {}), (65_536, {}), (1024, {"attn_temperature_tuning": True})]:
        config.model_config.max_model_len = limit
        config.model_config.override_generation_config = generation
        seen.append(attributes_of(config)["max_model_len"])
    assert seen == ["plain", "tempered", "tempered"]


def test_a_composite_model_is_more_than_its_text_model(model: Path, base: bytes) -> None:
    config = engine_config(model)
    ids = {base}
    for layer in (-2, -1):
        whole = type(config.model_config.hf_config)(vision_feature_layer=layer)
        whole.architectures = ["LlamaForCausalLM"]
        config.model_config.hf_config = whole
        ids.add(spec_id(config))
    assert len(ids) == 3


def test_what_a_model_writes_into_its_configuration_is_asked_of_the_ranks(model: Path) -> None:
    """Falcon-H1 and DeepSeek do while they are built: the scheduler half sees it only if it lives
    in the same process, which depends on the number of ranks."""
    built, apart = engine_config(model), engine_config(model)
    built.model_config.hf_text_config.rope_parameters["partial_rotary_factor"] = 1.0
    assert attributes_of(built) != attributes_of(apart)
    info = RankInfo(tuple(range(4)), 0, 2, "cpu-attn-kt/1", "float32", 32, 8192)
    ids = set()
    for config in (built, apart):
        half = SimpleNamespace(
            _vllm_config=config,
            _ranks={(0, 0): RankHolds((info,), attributes_of(built))},
            _settings=Settings.parse({"address": "hub:1"}),
            _epoch="",
        )
        ((spec, _),) = KVServerConnector._sections(half, bytes(32))
        ids.add(spec.id)
    assert len(ids) == 1


def test_how_items_are_processed_counts(model: Path) -> None:
    config = engine_config(model)
    seen = set()
    for kwargs in ({"num_crops": 4}, {"num_crops": 16}, None):
        images = SimpleNamespace(mm_processor_kwargs=kwargs, mm_encoder_attn_dtype=None)
        config.model_config.multimodal_config = images
        seen.add(spec_id(config))
    assert len(seen) == 3


def test_layers_left_out_of_kv_quantisation_count(model: Path) -> None:
    config = engine_config(model, kv_cache_dtype="fp8_e4m3")
    plain = spec_id(config, kv="fp8_e4m3")
    config.cache_config.kv_cache_dtype_skip_layers = ["0"]
    assert spec_id(config, kv="fp8_e4m3") != plain


def test_formats_of_quantised_kv_are_told_apart() -> None:
    """To torch all of them are bytes."""
    assert kv_dtype("bfloat16", {"auto"}) == "bfloat16"
    assert kv_dtype("uint8", {"fp8"}) == kv_dtype("uint8", {"fp8_e4m3"}) == "fp8_e4m3"
    assert kv_dtype("uint8", {"fp8_e5m2"}) == "fp8_e5m2"
    with pytest.raises(UnsupportedError, match=r"\['auto', 'fp8_e4m3'\]"):
        kv_dtype("uint8", {"auto", "fp8_e4m3"})


ISAS = ("vec", "vec16", "amx", "neon", "rvv", "vxe", "vsx")


def test_what_cpu_attention_stores_depends_on_its_instruction_set(base: bytes, model: Path) -> None:
    config = engine_config(model)
    ids = {isa: spec_id(config, encoding=_cpu_encoding({isa})) for isa in ISAS}
    assert ids["vec"] == ids["vec16"] == base
    assert len(set(ids.values())) == len(ISAS) - 1
    with pytest.raises(UnsupportedError, match=r"\['amx', 'vec'\]"):
        _cpu_encoding({"vec", "amx"})


def with_calibration(config: Any) -> None:
    config.cache_config = SimpleNamespace(cache_dtype="fp8", calculate_kv_scales=True)


def with_fp8_vision(config: Any) -> None:
    config.model_config.multimodal_config = SimpleNamespace(mm_encoder_attn_dtype="fp8")


@pytest.mark.parametrize(
    ("options", "change", "named"),
    [
        ({"kv_cache_dtype": "int8_per_token_head"}, None, "'int8_per_token_head'"),
        ({"load_format": "dummy"}, None, "'dummy'"),
        ({"load_format": "tensorizer"}, None, "'tensorizer'"),
        ({}, with_calibration, "calculate_kv_scales"),
        ({}, with_fp8_vision, "mm_encoder_attn_dtype 'fp8'"),
    ],
)
def test_numbers_that_no_namespace_can_name_are_refused(
    model: Path, options: Options, change: Callable[[Any], None] | None, named: str
) -> None:
    config = engine_config(model, **options)
    if change is not None:
        change(config)
    with pytest.raises(UnsupportedError, match=named):
        require_numbers(config)


@pytest.mark.parametrize("method", [None, "draft_model"])
def test_a_draft_model_is_refused(model: Path, method: str | None) -> None:
    draft = {"model": str(model), "num_speculative_tokens": 3, "method": method}
    config = engine_config(model, speculative_config=draft)
    with pytest.raises(UnsupportedError, match="'draft_model' keeps KV of its own"):
        require_supported("0.32.0", config, GROUPS)


def test_an_encoder_decoder_is_refused_before_anything_else(model: Path) -> None:
    config = engine_config(model, hf_overrides={"is_encoder_decoder": True}, load_format="dummy")
    groups = SimpleNamespace(kv_cache_groups=[])
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        require_supported("0.32.0", config, groups)


def test_weights_that_are_not_here_are_refused_at_start(model: Path, tmp_path: Path) -> None:
    config = engine_config(model)
    config.model_config.model_weights = "s3://bucket/model"
    with pytest.raises(UnsupportedError, match="s3://bucket/model"):
        require_supported("0.32.0", config, GROUPS)
    config.model_config.model_weights = str(tmp_path)
    with pytest.raises(UnsupportedError, match="no weight files"):
        require_supported("0.32.0", config, GROUPS)
