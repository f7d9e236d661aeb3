"""Tiny models of many families, written as checkpoint directories.

    model = write_family(directory, "cohere2")

Each family is as small as its architecture allows, with a fixed seed, untied embeddings and
weights spread widely enough that greedy decoding wanders.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 512
POSITIONS = 2048
SPREAD = 0.08


@dataclass(frozen=True)
class Family:
    """`config` names a class of transformers and its arguments."""

    name: str
    config: str
    arguments: dict[str, Any]


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


FAMILIES = {
    family.name: family
    for family in (
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
        ),
    )
}


def ids(seed: int, tokens: int) -> list[int]:
    """A reproducible prompt of token ids."""
    source = random.Random(seed)
    return [source.randrange(2, VOCAB) for _ in range(tokens)]


def write_family(directory: Path, name: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write the family's model into `directory` (made if absent) and return it."""
    import torch
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config)(
        **family.arguments, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.tie_word_embeddings = False
    config.initializer_range = SPREAD
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    return directory
