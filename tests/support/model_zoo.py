"""Tiny models of many families, written as checkpoint directories.

    model = write_family(directory, "cohere2")

Each family is as small as its architecture allows, with a fixed seed, untied embeddings where vLLM
takes them, and weights spread widely enough that greedy decoding wanders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 512
POSITIONS = 2048
SPREAD = 0.08


@dataclass(frozen=True)
class Family:
    """`config` names a class of transformers and its arguments; `options` go to the engine.

    `windows` are those of its layers, 0: full attention, -1: a recurrent state. `seed` is one whose
    model does not repeat itself; `tied` says that its head is its embeddings. `fix` changes the
    model before it is written, `finish` the directory.
    """

    name: str
    config: str
    arguments: dict[str, Any]
    kv_heads: int = 2
    windows: tuple[int, ...] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    tied: bool = False
    fix: Callable[[Any], None] | None = None
    finish: Callable[[Path], None] | None = None


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
STATES_NOT_CACHED: dict[str, Any] = {"enable_prefix_caching": False}


def _spread_sinks(model: Any) -> None:
    """Attention sinks that are not all zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_(0.0, 1.0)


def _outweigh_embeddings(model: Any) -> None:
    """What the layers add to a token outweighs it: a head that is tied to the embeddings would
    answer with the token that it was asked with."""
    for name, parameter in model.named_parameters():
        if "post_attention" in name or "post_feedforward" in name:
            parameter.data.fill_(4.0)


def _quantise(directory: Path) -> None:
    """Linear layers in 8 bits, with a scale for each of their outputs, as compressed-tensors has
    them; what goes into them is quantised token by token while the engine runs."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weights = tensors[name]
        scale = weights.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weights / scale).round().to(torch.int8)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel"},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
    }
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaConfig", _COMMON),
        Family("llama-int8", "LlamaConfig", _COMMON, finish=_quantise),
        Family("qwen3", "Qwen3Config", _COMMON),
        Family(
            "opt",
            "OPTConfig",
            {
                "vocab_size": VOCAB,
                "hidden_size": 128,
                "ffn_dim": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": POSITIONS,
                "word_embed_proj_dim": 128,
            },
            kv_heads=4,
            seed=1,
        ),
        Family(
            "gpt2",
            "GPT2Config",
            {
                "vocab_size": VOCAB,
                "n_embd": 128,
                "n_inner": 256,
                "n_layer": 4,
                "n_head": 4,
                "n_positions": POSITIONS,
            },
            kv_heads=4,
        ),
        Family(
            "mistral",
            "MistralConfig",
            {**_COMMON, "sliding_window": 64},
            windows=(64,),
        ),
        Family(
            "cohere2",
            "Cohere2Config",
            {
                **_COMMON,
                "sliding_window": 64,
                "layer_types": [
                    "sliding_attention",
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                ],
                "logit_scale": 1.0,
            },
            windows=(0, 65),  # vLLM adds one
        ),
        Family(
            "gptoss",
            "GptOssConfig",
            {
                **_COMMON,
                "sliding_window": 64,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            windows=(0, 64),
            fix=_spread_sinks,
        ),
        Family(
            "gemma3",
            "Gemma3TextConfig",
            {
                **_COMMON,
                "num_hidden_layers": 6,
                "sliding_window": 64,
                "query_pre_attn_scalar": 32,
                "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            },
            windows=(0, 64),
        ),
        Family(
            "gemma2",
            "Gemma2Config",
            {
                **_COMMON,
                "sliding_window": 64,
                "query_pre_attn_scalar": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            windows=(0, 64),
            seed=3,
            tied=True,  # vLLM takes no other
            fix=_outweigh_embeddings,
        ),
        Family(
            "llama4",
            "Llama4TextConfig",
            {
                **_COMMON,
                "intermediate_size_mlp": 256,
                "attention_chunk_size": 64,
                "num_local_experts": 4,
                "moe_layers": [],
                "interleave_moe_layer_step": 0,
                "no_rope_layers": [1, 1, 1, 0],
            },
        ),
        Family(
            "deepseek3",
            "DeepseekV3Config",
            {
                **{k: v for k, v in _COMMON.items() if k != "head_dim"},
                "num_key_value_heads": 4,
                "kv_lora_rank": 512,
                "q_lora_rank": 64,
                "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 32,
                "v_head_dim": 32,
                "first_k_dense_replace": 2,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "topk_method": "noaux_tc",
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "num_mtp_layers": 0,
            },
            kv_heads=1,
            options={"block_size": 16},
            seed=5,
        ),
        Family(
            "qwen3next",
            "Qwen3NextConfig",
            {
                **_COMMON,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 64,
                "layer_types": [
                    "linear_attention",
                    "linear_attention",
                    "linear_attention",
                    "full_attention",
                ],
            },
            windows=(0, -1),
            options=STATES_NOT_CACHED,
        ),
        Family(
            "deepseek2",
            "DeepseekV2Config",
            {
                **{k: v for k, v in _COMMON.items() if k != "head_dim"},
                "num_key_value_heads": 4,
                "kv_lora_rank": 512,
                "q_lora_rank": None,
                "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 32,
                "v_head_dim": 32,
                "first_k_dense_replace": 4,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
            },
            kv_heads=1,
            options={"block_size": 16},
            seed=2,
        ),
        Family(
            "mamba2",
            "Mamba2Config",
            {
                "vocab_size": VOCAB,
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_heads": 8,
                "head_dim": 32,
                "state_size": 32,
                "n_groups": 1,
                "expand": 2,
                "conv_kernel": 4,
                "chunk_size": 64,
            },
            kv_heads=0,
            windows=(-1,),
            options=STATES_NOT_CACHED,
        ),
        Family(
            "granite4",
            "GraniteMoeHybridConfig",
            {
                **{k: v for k, v in _COMMON.items() if k != "head_dim"},
                **_MAMBA,
                "num_local_experts": 0,
                "shared_intermediate_size": 256,
                "position_embedding_type": "rope",
                "layer_types": ["mamba", "attention", "mamba", "mamba"],
            },
            windows=(0, -1),
            options=STATES_NOT_CACHED,
        ),
        Family(
            "falconh1",
            "FalconH1Config",
            {**_COMMON, **_MAMBA, "mamba_d_ssm": 256},
            windows=(0, -1),
            options=STATES_NOT_CACHED,
        ),
    )
}


def ids(seed: int, tokens: int) -> list[int]:
    """A reproducible prompt of token ids."""
    source = random.Random(seed)
    return [source.randrange(2, VOCAB) for _ in range(tokens)]


def write_family(directory: Path, name: str, *, dtype: str = "float32") -> Path:
    """Write the family's model into `directory` (made if absent) and return it."""
    import torch
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config)(
        **family.arguments, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.tie_word_embeddings = family.tied
    config.initializer_range = SPREAD
    torch.manual_seed(family.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if family.fix is not None:
        family.fix(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    if family.finish is not None:
        family.finish(directory)
    return directory
