"""Imports vLLM once, with its own warnings switched off: they are not ours to fail on."""

from __future__ import annotations

import contextlib
import warnings

with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import vllm.v1.core.block_pool
    import vllm.v1.core.sched.scheduler  # noqa: F401
