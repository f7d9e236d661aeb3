"""What a real engine's own registry says: the connector's figures, and where tokens came from."""

from __future__ import annotations

from tests.support.engines import Engine
from tests.support.kv_oracle import wait_for
from tests.support.tiny_models import TINY, Shape

BLOCK = 128
PREFIX = "vllm:kvserver_"
SOURCES = (
    "prompt_tokens_by_source.local_compute",
    "prompt_tokens_by_source.local_cache_hit",
    "prompt_tokens_by_source.external_kv_transfer",
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
)


def figures(engine: Engine) -> dict[str, float]:
    """The connector's, by name without the prefix."""
    engine.idle(0.05)  # figures travel with steps
    return {
        name.removeprefix(PREFIX): value
        for name, value in engine.metrics().items()
        if name.startswith(PREFIX)
    }


def sources(engine: Engine) -> dict[str, float]:
    """vLLM's own, of where prompts' tokens came from."""
    engine.idle(0.05)
    values = engine.metrics()
    return {name: values.get(f"vllm:{name}", 0) for name in SOURCES}


def changed(before: dict[str, float], after: dict[str, float], *names: str) -> list[float]:
    return [after[name] - before[name] for name in names]


def wait_saved(engine: Engine, before: float, blocks: int, shape: Shape = TINY) -> None:
    """Until the connector has pushed so many blocks more than `before` bytes."""
    wanted = before + blocks * BLOCK * shape.kv_bytes_per_token
    wait_for("the push in the metrics", lambda: figures(engine)["pushed_bytes"] >= wanted)
