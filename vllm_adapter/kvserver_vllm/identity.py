"""Which engines this adapter serves, and the namespace that follows from one.

`require_supported` runs while the engine loads and refuses by name. A rank describes what it
holds (`rank_info`); the scheduler half joins the ranks' words, the model's configuration and the
weights' fingerprint into one NamespaceSpec (`build_spec`). Nothing in it is a path or a name that
somebody could give to other weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvproto.namespace import NamespaceSpec
from kvserver_vllm.attributes import attributes_of, require_numbers
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.fingerprint import changed_since, checkpoint_files, fingerprint, join
from kvserver_vllm.layout import (
    CPU_ENCODING,
    LATENT_ENCODING,
    STATE_PREFIX,
    TOKEN_ENCODING,
    LayerTensor,
    PageFormat,
    Pages,
)
from kvserver_vllm.messages import STATE, RankInfo

VERSION_MIN = (0, 31)
VERSION_MAX = (0, 33)
# Attention backends whose content is K||V per token and head.
_TOKEN_BACKENDS = frozenset({"FLASH_ATTN"})
# Those of multi-head latent attention whose content is one latent a token.
_LATENT_BACKENDS = frozenset({"CPU_MLA"})
# Instruction sets of CPU attention that store K as [D, N] and V as [N, D].
_TRANSPOSED_ISAS = frozenset({"vec", "vec16"})
STATE_KIND = "MambaSpec"
_SPEC_KINDS = ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec", STATE_KIND)


def require_supported(version: str, config: Any, kv_cache_config: Any) -> None:
    """UnsupportedError, naming what it is, when this engine cannot be served."""
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if not VERSION_MIN <= release <= VERSION_MAX:
        raise UnsupportedError(f"vLLM {version}: this adapter supports 0.31, 0.32 and 0.33")
    model, parallel = config.model_config, config.parallel_config
    if model.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models have KV that prefix hashes do not name")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"{name} is {getattr(parallel, name)}: only 1 is supported")
    for group in kv_cache_config.kv_cache_groups:
        for kind in sorted({type(spec).__name__ for spec in specs_of(group)}):
            if kind not in _SPEC_KINDS:
                raise UnsupportedError(
                    f"KV cache of kind {kind}; supported: {', '.join(_SPEC_KINDS)}"
                )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        raise UnsupportedError(
            f"speculative method {speculative.method!r} keeps KV of its own; ngram is supported"
        )
    if any(keeps_state(group) for group in kv_cache_config.kv_cache_groups):
        require_states(config)
    require_numbers(config)
    checkpoint_files(weights_path(config))


def require_states(config: Any) -> None:
    """UnsupportedError unless a state lies in one piece and stands for the last token computed."""
    mode = getattr(config.cache_config, "mamba_cache_mode", "none")
    if mode != "none":
        raise UnsupportedError(
            f"recurrent state with mamba_cache_mode {mode!r}: set enable_prefix_caching to false"
        )
    if config.speculative_config is not None:
        raise UnsupportedError("recurrent state with speculative decoding: it runs ahead")
    size = int(config.parallel_config.tensor_parallel_size)
    if size > 1:
        raise UnsupportedError(
            f"recurrent state with tensor_parallel_size {size}: only 1 is supported"
        )


def keeps_state(group: Any) -> bool:
    """Whether a KV cache group holds a recurrent state, one block a request."""
    return all(type(spec).__name__ == STATE_KIND for spec in specs_of(group))


def state_info(names: Sequence[str], spec: Any, pages: Pages, block_tokens: int) -> RankInfo:
    """What a rank holds of layers that keep a state: a page that stands for a whole hub block."""
    kind = getattr(spec.mamba_type, "name", str(spec.mamba_type)).lower()
    dtypes = [str(dtype).removeprefix("torch.") for dtype in spec.dtypes]
    return RankInfo(
        layers=tuple(layer_index(name) for name in names),
        head_start=0,
        heads=1,
        encoding=state_encoding(kind),
        kv_dtype="+".join(dtypes),
        page_tokens=block_tokens,
        page_bytes=pages.format.page_bytes,
        window=STATE,
    )


def state_encoding(kind: str) -> str:
    """The content encoding of a recurrent state. How a convolution's state lies is vLLM's choice by
    machine and environment."""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout

    return f"{STATE_PREFIX}{kind}-{get_conv_state_layout().lower()}/1"


def weights_path(config: Any) -> Path:
    """Where the weights lie on this machine. UnsupportedError when they do not."""
    model = config.model_config
    place = model.model_weights or model.model
    if os.path.exists(place):
        return Path(place)
    try:
        from huggingface_hub import snapshot_download

        # The commit that was loaded: a branch may have moved on since.
        commit = getattr(model.hf_config, "_commit_hash", None) or model.revision
        return Path(snapshot_download(place, revision=commit, local_files_only=True))
    except Exception as error:
        raise UnsupportedError(f"no local copy of the weights of {place!r}") from error


def changed_weights(config: Any, when: float) -> Path | None:
    """What changed of a local checkpoint since `when`. A commit of a repository never changes."""
    model = config.model_config
    place = model.model_weights or model.model
    return changed_since(Path(place), when) if os.path.exists(place) else None


def specs_of(group: Any) -> list[Any]:
    """The KV cache specs of one of vLLM's KV cache groups: one for all layers, or one each."""
    merged = group.kv_cache_spec
    single = getattr(merged, "kv_cache_specs", None)
    return list(single.values()) if single else [merged]


def attention_layers(config: Any, names: Sequence[str]) -> dict[str, Any]:
    """The model's attention layers of these names, on this rank."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    found: dict[str, Any] = get_layers_from_vllm_config(config, AttentionLayerBase, list(names))
    return found


def layer_index(name: str) -> int:
    """The global index in a layer's name: 5 for model.layers.5.self_attn.attn."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise UnsupportedError(f"attention layer {name!r} does not carry one layer index")
    return numbers[0]


def encoding_of(config: Any, names: Sequence[str], layer: LayerTensor) -> str:
    """The content encoding of a page, from the attention backend of these layers."""
    layers = attention_layers(config, names)
    backends = {attention.get_attn_backend().get_name() for attention in layers.values()}
    if len(backends) != 1:
        raise UnsupportedError(f"attention backends differ between layers: {sorted(backends)}")
    (backend,) = backends
    if backend == "CPU_ATTN":
        return _cpu_encoding({getattr(attention, "isa", "?") for attention in layers.values()})
    if backend in _TOKEN_BACKENDS and layer.tokens % 16 == 0:
        return TOKEN_ENCODING
    if backend in _LATENT_BACKENDS and layer.tokens % 16 == 0:
        return LATENT_ENCODING
    return f"{backend.lower()}/1"


def _cpu_encoding(isas: set[str]) -> str:
    """CPU attention packs K differently where it has matrix units."""
    if len(isas) != 1:
        raise UnsupportedError(f"CPU attention differs between layers: {sorted(isas)}")
    (isa,) = isas
    return CPU_ENCODING if isa in _TRANSPOSED_ISAS else f"cpu-attn-{isa}/1"


def kv_dtype_of(config: Any, names: Sequence[str], tensor: Any) -> str:
    """The dtype of the KV in `tensor`. Quantised KV is bytes to torch, so its format is named."""
    layers = attention_layers(config, names)
    formats = {str(getattr(layer, "kv_cache_dtype", "auto")) for layer in layers.values()}
    return kv_dtype(str(tensor.dtype).removeprefix("torch."), formats)


def kv_dtype(stored: str, formats: set[str]) -> str:
    """A namespace's kv_dtype: what torch says is stored, or the format that the bytes are in."""
    quantised = {"fp8_e4m3" if name == "fp8" else name for name in formats if "fp8" in name}
    if not quantised:
        return stored
    if len(quantised) > 1 or len(formats) > 1:
        raise UnsupportedError(f"KV formats differ between layers: {sorted(formats)}")
    return quantised.pop()


def rank_info(config: Any, names: Sequence[str], pages: Pages, dtype: str, rank: int) -> RankInfo:
    """What tensor-parallel rank `rank` holds."""
    form: PageFormat = pages.format
    start, heads = head_range(config, rank)
    if heads != pages.heads:
        raise UnsupportedError(
            f"the KV cache has {pages.heads} heads on this rank, the model's split gives {heads}"
        )
    return RankInfo(
        layers=tuple(layer_index(name) for name in names),
        head_start=start,
        heads=heads,
        encoding=form.encoding,
        kv_dtype=dtype,
        page_tokens=form.page_tokens,
        page_bytes=form.page_bytes,
    )


def head_range(config: Any, rank: int) -> tuple[int, int]:
    """(first head, heads) of a tensor-parallel rank; ranks beyond the heads hold replicas."""
    size = int(config.parallel_config.tensor_parallel_size)
    heads = max(1, kv_heads(config) // size)
    return rank // replicas(config) * heads, heads


def replicas(config: Any) -> int:
    """Consecutive ranks that hold the same heads."""
    return max(1, int(config.parallel_config.tensor_parallel_size) // max(1, kv_heads(config)))


def kv_heads(config: Any) -> int:
    """KV heads of the whole model. Latent attention has one, the same on every rank."""
    model = config.model_config
    return 1 if model.use_mla else int(model.get_total_num_kv_heads())


def layer_starts(ranks: Mapping[tuple[int, int], RankInfo]) -> tuple[dict[int, int], int]:
    """({pipeline rank: first layer of its region}, layers in all). Keys are (pp, tp) ranks."""
    by_stage: dict[int, tuple[int, ...]] = {}
    for (stage, _), info in ranks.items():
        if by_stage.setdefault(stage, info.layers) != info.layers:
            raise UnsupportedError(f"ranks of pipeline stage {stage} hold different layers")
    starts, total, last = {}, 0, -1
    for stage in sorted(by_stage):
        if by_stage[stage][0] <= last:
            raise UnsupportedError("pipeline stages do not hold ascending ranges of layers")
        starts[stage] = total
        total += len(by_stage[stage])
        last = by_stage[stage][-1]
    return starts, total


def build_spec(
    config: Any,
    ranks: Mapping[tuple[int, int], RankInfo],
    weights: bytes,
    *,
    tenant: str,
    block_tokens: int,
    epoch: str,
    section: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
) -> NamespaceSpec:
    """The namespace of one section of this engine. `epoch` is "" until the engine's cache was
    reset; `section` are the attributes that tell it from the others; `attributes` those that the
    ranks found (default: what follows from `config`)."""
    model = config.model_config
    _, layers = layer_starts(ranks)
    info = next(iter(ranks.values()))
    for other in ranks.values():
        if (other.encoding, other.page_bytes) != (info.encoding, info.page_bytes):
            raise UnsupportedError("ranks encode their KV differently")
    found = dict(attributes or attributes_of(config))
    if epoch:
        found["epoch"] = epoch
    found.update(section or {})
    architectures = getattr(model.hf_config, "architectures", None) or [
        model.hf_text_config.model_type
    ]
    return NamespaceSpec(
        model=str(architectures[0]),
        weights=weights,
        kv_dtype=info.kv_dtype,
        encoding=info.encoding,
        layers=layers,
        kv_heads=1 if info.window == STATE else kv_heads(config),
        page_bytes=info.page_bytes,
        page_tokens=info.page_tokens,
        block_tokens=block_tokens,
        tenant=tenant,
        attributes=found,
    )


class Adapters:
    """Digests of LoRA adapters by content, each worked out once."""

    def __init__(self, cache: Path | None = None) -> None:
        """`cache` is the file that remembers digests (default: the user's)."""
        self._cache = cache
        self._known: dict[tuple[int, str], bytes] = {}

    def digest(self, lora: Any) -> bytes:
        """Digest of a LoRARequest's adapter. One that cannot be read is this engine's own."""
        key = (int(lora.lora_int_id), str(lora.lora_path))
        if lora.load_inplace or key not in self._known:
            self._known[key] = _adapter_digest(key[1], self._cache)
        return self._known[key]


def _adapter_digest(path: str, cache: Path | None) -> bytes:
    try:
        directory = Path(path)
        settings = sha256((directory / "adapter_config.json").read_bytes()).digest()
        return join([fingerprint(directory, cache), settings])
    except (OSError, UnsupportedError):
        return os.urandom(32)
