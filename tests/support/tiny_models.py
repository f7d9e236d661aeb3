"""Small Llama models with random weights, written as checkpoint directories.

Fixed seeds, so that the same shape is the same model everywhere; embeddings are untied, since
tied ones let a small model repeat one token, and the weights are spread widely enough that greedy
decoding wanders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. `head_dim` must be one that CPU attention takes (32, 64, ...)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 1024
    positions: int = 2048

    @property
    def kv_bytes_per_token(self) -> int:
        """In float32."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim


TINY = Shape(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate=256)
# Large enough that a prompt's forward pass takes longer than a layer's push.
MEDIUM = Shape(hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1536)
# About 136 million parameters: 900 tokens take about a second to prefill on two cores.
DEMO = Shape(hidden=1024, layers=12, heads=16, kv_heads=8, head_dim=64, intermediate=2816)


def write_model(directory: Path, shape: Shape = TINY, *, seed: int = 0) -> Path:
    """Write the model into `directory` (made if absent) and return it."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama_config(shape))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def _llama_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )


def write_adapter(directory: Path, shape: Shape = TINY, *, seed: int, rank: int = 8) -> Path:
    """Write a LoRA adapter of such a model's attention into `directory` (made if absent)."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
    tensors = {}
    for layer in range(shape.layers):
        for module, heads in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down = torch.randn(rank, shape.hidden, generator=generator) * 0.1
            up = torch.randn(heads * shape.head_dim, rank, generator=generator) * 0.1
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(sizes),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def prompt(seed: int, tokens: int, shape: Shape = TINY) -> list[int]:
    """A reproducible prompt of token ids; equal seeds share their prefix."""
    import random

    source = random.Random(seed)
    return [source.randrange(2, shape.vocab) for _ in range(tokens)]


@dataclass(frozen=True)
class Vision:
    """A BLIP-2's sizes around a text model of `TINY`'s: its images become `tokens` tokens before a
    prompt, equal ones for all images."""

    pixels: int = 56
    patch: int = 14
    tokens: int = 32
    kv_heads: int = TINY.heads
    image_token: int = TINY.vocab - 1


VISION = Vision()


def write_vision_model(directory: Path, *, seed: int = 0) -> Path:
    """A BLIP-2 with random weights, its tokenizer and its processor. Of vLLM's models with images
    it is one of the few that import no torchvision."""
    import torch
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, replace(TINY, vocab=VISION.image_token))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    size = {"height": VISION.pixels, "width": VISION.pixels}
    transformers.Blip2Processor(
        BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=VISION.tokens
    ).save_pretrained(directory)
    assert tokenizer.convert_tokens_to_ids("<image>") == VISION.image_token
    config = transformers.Blip2Config(
        text_config=transformers.OPTConfig(
            vocab_size=TINY.vocab,
            hidden_size=TINY.hidden,
            ffn_dim=TINY.intermediate,
            num_hidden_layers=TINY.layers,
            num_attention_heads=TINY.heads,
            max_position_embeddings=TINY.positions,
            word_embed_proj_dim=TINY.hidden,
            tie_word_embeddings=False,
            init_std=0.08,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        ),
        vision_config=transformers.Blip2VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=VISION.pixels,
            patch_size=VISION.patch,
        ),
        qformer_config=transformers.Blip2QFormerConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=64,
        ),
        num_query_tokens=VISION.tokens,
        image_token_index=VISION.image_token,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = transformers.Blip2ForConditionalGeneration(config).float()
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # wide enough that an image changes the answer
            parameter.data.normal_(0.0, 0.08 if name.startswith("language_model") else 0.3)
    model.save_pretrained(directory, safe_serialization=True)
    return directory


CHAT_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path, shape: Shape = TINY) -> None:
    """A byte-level tokenizer with exactly `shape.vocab` tokens and a chat template, beside a model:
    every text has tokens, and every token is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(ord("a") + i) for i in range(26)]
    words = [(a, b) for a in ["\u0120", *letters] for b in letters]  # U+0120: a space's byte
    digits = [(str(a), str(b)) for a in range(10) for b in range(10)]
    special, alphabet = ["<s>", "</s>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*words, *digits][: shape.vocab - len(alphabet) - len(special)]
    vocab = [*special, *alphabet, *(a + b for a, b in merges)]
    assert len(vocab) == len(set(vocab)) == shape.vocab
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
