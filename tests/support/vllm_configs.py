"""Real VllmConfigs of a tiny model, as an engine's process would make them, without an engine.

    config = engine_config(write_config(tmp_path / "model"), max_model_len=512)

A model is its config.json and an empty file of weights. All of them are Llamas to vLLM: a process
inspects an architecture once, for seconds. Needs vLLM.
"""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 1024,
}


def write_config(directory: Path, **changes: Any) -> Path:
    """A model directory whose config.json is LLAMA with `changes`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return directory


def engine_config(model: Path, **options: Any) -> Any:
    """The VllmConfig of an engine that was started with these options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own
        from vllm.engine.arg_utils import EngineArgs

        settings = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "block_size": 32,
            "max_model_len": 1024,
            **options,
        }
        return EngineArgs(model=str(model), **settings).create_engine_config()
