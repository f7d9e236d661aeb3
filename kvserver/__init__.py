"""kvserver: a KV-cache hub for LLM serving."""

__version__ = "0.1.0"
