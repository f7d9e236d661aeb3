"""Time to first token of an engine: of prompts that it computes, and that it pulls from a hub.

    python -m bench.first_token [--layers 8] [--tokens 2048 8192 16384] [--rounds 5] [--out FILE]

One vLLM engine with the adapter, beside a hub over shared memory. The model has so many layers of a
Llama 3.1 8B, in bf16, with random weights: per layer it computes and caches what that model does
(4 KiB of KV a token), so the ratio of the two times is that of the whole model. Each prompt is
computed, and pushed meanwhile; then the engine forgets its own cache and is asked again, and pulls.
(Of a prompt that is over so soon, no more than a twentieth of the engine's KV is held for the push:
`--kv-bytes` has to be twenty times the longest.)
Figures are medians. `--small` has a tiny model instead, for a look at whether all of it works.

Needs vLLM, for CUDA or for CPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine
from tests.support.engines import Engine, Generated, hub_config
from tests.support.server import start_server
from tests.support.tiny_models import TINY, write_model

VOCABULARY = 8192
BLOCK = 128
WARM = 2  # prompts of each length before the first that counts
PUSHED_S = 1.0


def write_layers(directory: Path, layers: int, positions: int) -> Path:
    """A checkpoint of so many layers of a Llama 3.1 8B, of a small vocabulary."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=VOCABULARY,
        max_position_embeddings=positions, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def filled(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()

    directory.mkdir(parents=True)
    weights = {name: filled(shape) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def measure(engine: Engine, length: int, rounds: int, vocabulary: int) -> dict[str, Any]:
    """Prompts of `length` tokens, computed and then pulled, one at a time."""
    rng = np.random.default_rng(length)
    found: list[tuple[Generated, Generated]] = []
    for number in range(rounds + WARM):
        tokens = rng.integers(2, vocabulary, length).tolist()
        computed = engine.generate(tokens, tokens=2)
        engine.idle(PUSHED_S)
        engine.reset_prefix_cache()
        pulled = engine.generate(tokens, tokens=2)
        engine.reset_prefix_cache()
        if number >= WARM:
            assert computed.cached == 0, computed.cached
            assert length - pulled.cached <= BLOCK, pulled.cached
            found.append((computed, pulled))
    times = [[1e3 * one.ttft_s for one in column] for column in zip(*found, strict=True)]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "tokens": length,
        "pulled": found[0][1].cached,
        "computed_ms": round(statistics.median(times[0]), 1),
        "pulled_ms": round(statistics.median(times[1]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "equal_answers": sum(a.tokens == b.tokens for a, b in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_token", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--host-bytes", default="12GiB")
    parser.add_argument("--kv-bytes", type=int, default=16 << 30)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    longest = max(options.tokens) + 64
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        (there / "hub").mkdir()
        if options.small:
            model, vocabulary = write_model(there / "model", TINY), TINY.vocab
        else:
            model, vocabulary = write_layers(there / "model", options.layers, longest), VOCABULARY
        with (
            start_server(there / "hub", host_bytes=options.host_bytes) as server,
            Engine.start(
                model,
                config=hub_config(server.address, cache_dir=scratch),
                kv_bytes=options.kv_bytes,
                max_model_len=longest,
                dtype="float32" if options.small else "bfloat16",
                environment={"OMP_NUM_THREADS": "4"} if torch.cuda.is_available() else {},
                **({"gpu_memory_utilization": 0.5} if torch.cuda.is_available() else {}),
            ) as engine,
        ):
            engine.generate([3] * 64, tokens=2)
            engine.idle(10.0)  # the weights are digested
            rows = []
            for length in options.tokens:
                rows.append(measure(engine, length, options.rounds, vocabulary))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(machine.facts(), card)
    if options.out:
        result = {"machine": machine.facts(), "card": card, "layers": options.layers, "rows": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
