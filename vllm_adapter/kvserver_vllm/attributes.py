"""What decides the numbers in a KV cache beside the weights: the attributes of a namespace.

Rules:
  1. What can change a value of the KV is in here, or `require_numbers` refuses it by name. What
     cannot (sizes, limits, seeds, names, parallelism, scheduling) is not, so that engines which
     differ in it share.
  2. Nothing is taken from a path or from a name that could be given to something else.
  3. What people ask about first stands readable (`rope`, `window`, `quantization`, ...); the rest
     of the model's configuration is one digest.

Everything is read from the VllmConfig that the engine runs with, after `hf_overrides` and all
other options were applied to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from typing import Any

from kvserver_vllm.errors import UnsupportedError

ATTRIBUTE_BYTES_MAX = 400
LLAMA4_TUNED_LEN = 32_768
"""Llama 4 tempers its attention by default where `max_model_len` is larger (vLLM's llama4.py)."""

# Fields of a model's configuration that say nothing about the KV it computes. `max_model_len` is
# written there by some models (MiniMax-M2) when they load, in the ranks' processes only.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "max_model_len",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_READABLE = {
    "rope": ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    "window": ("sliding_window", "use_sliding_window", "layer_types", "attention_chunk_size"),
    "quantization": ("quantization_config",),
}
# Options of the vision (audio, ...) side that change what is computed from an equal item.
_MULTIMODAL = (
    "mm_processor_kwargs",
    "mm_device_do_normalize",
    "media_io_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
)
# Names of KV formats whose pages hold all that is needed to read them; scales of the fp8 ones are
# the checkpoint's, or 1.
KV_FORMATS = frozenset({"auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"})
# Load formats that read the files of one directory, by which of them each prefers.
_LOADERS = {
    "auto": "safetensors",
    "hf": "safetensors",
    "safetensors": "safetensors",
    "fastsafetensors": "safetensors",
    "instanttensor": "safetensors",
    "runai_streamer": "safetensors",
    "mistral": "consolidated",
    "pt": "pt",
    "npcache": "pt",
    "sharded_state": "shards",
    "runai_streamer_sharded": "shards",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
}


def require_numbers(config: Any) -> None:
    """UnsupportedError for options whose effect on the numbers no namespace can name."""
    cache, model = config.cache_config, config.model_config
    if str(cache.cache_dtype) not in KV_FORMATS:
        raise UnsupportedError(
            f"kv_cache_dtype {cache.cache_dtype!r} keeps scales beside its pages; "
            f"supported: {', '.join(sorted(KV_FORMATS))}"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedError("calculate_kv_scales: KV scales that depend on the traffic")
    images = getattr(model, "multimodal_config", None)
    if images is not None and getattr(images, "mm_encoder_attn_dtype", None):
        raise UnsupportedError(
            f"mm_encoder_attn_dtype {images.mm_encoder_attn_dtype!r}: scales that depend on "
            "the traffic"
        )
    load_format = str(config.load_config.load_format)
    if load_format == "dummy":
        raise UnsupportedError("load_format 'dummy': random weights have no content to fingerprint")
    if load_format not in _LOADERS:
        raise UnsupportedError(
            f"load_format {load_format!r} takes weights from elsewhere than local files; "
            f"supported: {', '.join(sorted(_LOADERS))}"
        )


def attributes_of(config: Any) -> dict[str, str]:
    """The attributes that follow from a VllmConfig. `require_numbers` has passed."""
    model = config.model_config
    text, whole = model.hf_text_config, model.hf_config
    settings = text.to_dict()
    attributes = config_attributes(settings)
    if whole is not text:
        attributes["model_config"] = _digest_text(_canonical(_pruned(whole.to_dict())))
    attributes["dtype"] = str(model.dtype).removeprefix("torch.")
    attributes["quantization_method"] = str(model.quantization or "none")
    attributes["loader"] = _LOADERS[str(config.load_config.load_format)]
    attributes.update(_options(config, settings))
    return attributes


def _options(config: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """Attributes that only some engines have: an option that is off is left out."""
    model, cache = config.model_config, config.cache_config
    found: dict[str, Any] = {
        "max_model_len": _length(model, settings),
        "quantization_options": _plain(getattr(model, "quantization_config", None)),
        "kv_skip_layers": list(getattr(cache, "kv_cache_dtype_skip_layers", ()) or ()),
        "model_classes": dict(getattr(model, "model_class_overrides", None) or {}),
        "model_impl": _implementation(model),
        "non_causal": bool(getattr(config.attention_config, "use_non_causal", False)),
        "multimodal": _multimodal(model),
    }
    return {name: _readable(value) for name, value in found.items() if value}


def _length(model: Any, settings: Mapping[str, Any]) -> int | str | None:
    """What the engine's own limit changes in the numbers, where it changes any."""
    if "longrope" in str(settings.get("rope_parameters") or settings.get("rope_scaling")):
        # vLLM chooses between the long and the short factors by the engine's limit.
        return int(model.max_model_len)
    if any("Llama4" in name for name in model.hf_config.architectures or ()):
        chosen = {
            **model.try_get_generation_config(),
            **model.override_generation_config,
        }.get("attn_temperature_tuning", model.max_model_len > LLAMA4_TUNED_LEN)
        return "tempered" if chosen else "plain"
    return None


def _implementation(model: Any) -> str:
    """The model's code, where it is not vLLM's own choice."""
    chosen = getattr(model.model_impl, "value", model.model_impl)
    return "" if chosen in ("auto", "vllm") else str(chosen)


def _multimodal(model: Any) -> dict[str, Any]:
    images = getattr(model, "multimodal_config", None)
    found = {name: getattr(images, name, None) for name in _MULTIMODAL}
    return {name: value for name, value in found.items() if value}


def config_attributes(settings: Mapping[str, Any]) -> dict[str, str]:
    """Attributes that follow from the text model's configuration."""
    rest = _pruned(settings)
    attributes = {}
    for name, keys in _READABLE.items():
        found = {key: rest.pop(key, None) for key in keys}
        attributes[name] = _readable({k: v for k, v in found.items() if v is not None})
    attributes["config"] = _digest_text(_canonical(rest))
    return attributes


def _pruned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that do not matter, at every level."""
    return {
        key: _pruned(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in _IGNORED
    }


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _readable(value: Any) -> str:
    text = value if isinstance(value, str) else _canonical(value)
    return text if len(text.encode()) <= ATTRIBUTE_BYTES_MAX else _digest_text(text)


def _digest_text(text: str) -> str:
    return "sha256:" + sha256(text.encode()).hexdigest()[:32]
