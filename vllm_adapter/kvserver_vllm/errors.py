"""What this adapter refuses, named so that the operator knows what to change."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """The engine, its version or the model is outside what this adapter supports.

    Raised while the engine loads, never while it serves.
    """


class ConfigError(ValueError):
    """A key of `kv_connector_extra_config` is unknown, missing or out of bounds."""
