"""What the weights are: a digest of their content, never of a path.

A checkpoint's fingerprint is SHA-256 over the sorted digests of its weight files, so renaming the
directory or a shard changes nothing and one changed weight changes it. All files that any loader
could take count: which of them this engine loads says the namespace's `loader`.

Each file is digested once and remembered in a small file of the user's cache directory under its
device, inode, size and times; a file changed in place has a new change time even where its mtime
was restored. Engines that start together digest one after another (a lock beside the cache), so
that all but the first read what the first wrote. A cache that is broken, or that somebody else
could have written, is not read.

Digesting a large checkpoint takes minutes the first time (about 1.4 GB/s a thread): callers run
it off the engine's threads. By then the engine has loaded the weights: `changed_since` says
whether they can have been others.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from kvserver_vllm.errors import UnsupportedError

PATTERNS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
READ_BYTES = 8 << 20
THREADS = 4
CACHE_ENTRIES_MAX = 4096
CACHE_FILE = "fingerprints.json"
TURN_S = 600.0
"""Longest that an engine waits for another's digests before it makes its own."""
TURN_POLL_S = 0.1
_DIGEST = re.compile("[0-9a-f]{64}")


def cache_path(directory: str = "") -> Path:
    """Where file digests are remembered: in `directory`, or the user's cache directory."""
    if directory:
        return Path(directory) / CACHE_FILE
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kvserver" / CACHE_FILE


def checkpoint_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint: a directory, or one file. UnsupportedError without any."""
    if path.is_file():
        return [path]
    found = {file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file()}
    if not found:
        raise UnsupportedError(f"no weight files ({', '.join(PATTERNS)}) in {path}")
    return sorted(found)


def fingerprint(path: Path, cache: Path | None = None) -> bytes:
    """32 bytes that stand for the content of a checkpoint (a directory, or one weight file).

    `cache` is the file that remembers digests (default `cache_path()`). UnsupportedError when
    there are no weights.
    """
    files = checkpoint_files(path)
    cache = cache if cache is not None else cache_path()
    with _turn(cache.with_suffix(".lock")):
        remembered = _DigestCache(cache)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="kvserver-digest") as pool:
            digests = list(pool.map(remembered.digest, files))
        remembered.save()
    return sha256(b"kvfp1" + b"".join(sorted(digests))).digest()


def changed_since(path: Path, when: float) -> Path | None:
    """What of a checkpoint changed after `when` (seconds since the epoch): a weight file, the
    directory, or a link on the way to them. None: who loaded the weights at `when` or later
    loaded what stands there now."""
    links = [way for way in path.absolute().parents if way.is_symlink()]
    for one in [path, *checkpoint_files(path)]:
        if max(one.lstat().st_ctime, one.stat().st_ctime) > when:
            return one
    return next((link for link in links if link.lstat().st_ctime > when), None)


def process_start() -> float:
    """When this process began, in seconds since the epoch as file times count them. At most a
    second too late (the kernel tells the time of its boot in whole seconds), never too early: an
    engine reads no weights in its first second, and often starts right after they were written."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    assert boot is not None
    return int(boot[1]) + 1 + int(fields[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the lock `path`. Without it after TURN_S, and where it cannot be had: it saves time."""
    fd = -1
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + TURN_S
    try:
        while fd >= 0 and time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(TURN_POLL_S)
            except OSError:
                break
        yield
    finally:
        if fd >= 0:
            os.close(fd)


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
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=self._path.name, delete=False
            ) as file:
                json.dump(entries, file)
            os.replace(file.name, self._path)


def _read(path: Path) -> dict[str, str]:
    try:
        with open(path) as file:
            if not _ours(os.fstat(file.fileno())):
                return {}
            loaded = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(loaded, dict):
        return {}
    return {k: v for k, v in loaded.items() if isinstance(v, str) and _DIGEST.fullmatch(v)}


def _ours(entry: os.stat_result) -> bool:
    """Whether nobody but this user can have written the file."""
    return entry.st_uid == os.geteuid() and not entry.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _identity(path: Path) -> str:
    entry = path.stat()
    return f"{entry.st_dev}:{entry.st_ino}:{entry.st_size}:{entry.st_mtime_ns}:{entry.st_ctime_ns}"


def _digest_file(path: Path) -> bytes:
    digest = sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.digest()


def join(parts: Sequence[bytes]) -> bytes:
    """One digest over several, each with its length."""
    digest = sha256(b"kvfj1")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
