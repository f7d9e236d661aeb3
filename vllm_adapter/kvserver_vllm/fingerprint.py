"""What the weights are: a digest of their content, never of a path.

A checkpoint's fingerprint is SHA-256 over the sorted digests of its weight files, so renaming the
directory or a shard changes nothing and one changed weight changes it. Each file is digested once
and remembered in a small file of the user's cache directory under its device, inode, size and
times; a file changed in place has a new change time even where its mtime was restored.

Digesting a large checkpoint takes minutes the first time (about 1.4 GB/s a thread): callers run
it off the engine's threads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvserver_vllm.errors import UnsupportedError

PATTERNS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
READ_BYTES = 8 << 20
THREADS = 4
CACHE_ENTRIES_MAX = 4096
ATTRIBUTE_BYTES_MAX = 400
# Fields of a model's configuration that say nothing about the KV it computes.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def cache_path() -> Path:
    """Where file digests are remembered."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kvserver" / "fingerprints.json"


def checkpoint_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint: those of the first format that is present."""
    for pattern in PATTERNS:
        files = sorted(path for path in directory.glob(pattern) if path.is_file())
        if files:
            return files
    raise UnsupportedError(f"no weight files ({', '.join(PATTERNS)}) in {directory}")


def fingerprint(path: Path, cache: Path | None = None) -> bytes:
    """32 bytes that stand for the content of a checkpoint (a directory, or one weight file).

    `cache` is the file that remembers digests (default `cache_path()`). UnsupportedError when
    there are no weights.
    """
    files = [path] if path.is_file() else checkpoint_files(path)
    remembered = _DigestCache(cache if cache is not None else cache_path())
    with ThreadPoolExecutor(THREADS, thread_name_prefix="kvserver-digest") as pool:
        digests = list(pool.map(remembered.digest, files))
    remembered.save()
    return sha256(b"kvfp1" + b"".join(sorted(digests))).digest()


class _DigestCache:
    """File digests by identity of the file. Losing the cache only costs time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self._fresh: dict[str, str] = {}

    def digest(self, path: Path) -> bytes:
        key = _identity(path)
        known = self._known.get(key)
        if known is not None:
            return bytes.fromhex(known)
        value = _digest_file(path)
        if _identity(path) == key:
            self._fresh[key] = value.hex()
        return value

    def save(self) -> None:
        """Merge what is new into the file, atomically. A failure is ignored: it is a cache."""
        if not self._fresh:
            return
        merged = {**_read(self._path), **self._fresh}
        entries = dict(list(merged.items())[-CACHE_ENTRIES_MAX:])
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=self._path.name, delete=False
            ) as file:
                json.dump(entries, file)
            os.replace(file.name, self._path)


def _read(path: Path) -> dict[str, str]:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(loaded, dict):
        return {}
    return {k: v for k, v in loaded.items() if isinstance(v, str) and len(v) == 64}


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _digest_file(path: Path) -> bytes:
    digest = sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.digest()


def config_attributes(config: Mapping[str, Any]) -> dict[str, str]:
    """Attributes of a namespace that follow from the model's configuration.

    The fields that people ask about first stand readable; the rest is one digest. Fields that do
    not change the KV are left out.
    """
    rest = {k: v for k, v in config.items() if k not in _IGNORED}
    attributes = {}
    for name, keys in {
        "rope": ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        "window": ("sliding_window", "use_sliding_window", "layer_types", "attention_chunk_size"),
        "quantization": ("quantization_config",),
    }.items():
        found = {key: rest.pop(key, None) for key in keys}
        attributes[name] = _readable({k: v for k, v in found.items() if v is not None})
    attributes["config"] = _digest_text(_canonical(rest))
    return attributes


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _readable(value: Any) -> str:
    text = _canonical(value)
    return text if len(text.encode()) <= ATTRIBUTE_BYTES_MAX else _digest_text(text)


def _digest_text(text: str) -> str:
    return "sha256:" + sha256(text.encode()).hexdigest()[:32]


def join(parts: Sequence[bytes]) -> bytes:
    """One digest over several, each with its length."""
    digest = sha256(b"kvfj1")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
