"""A fingerprint follows the content of the weights and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvserver_vllm import fingerprint as module
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.fingerprint import changed_since, fingerprint, process_start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model-1.safetensors").write_bytes(os.urandom(5000))
    (directory / "model-2.safetensors").write_bytes(os.urandom(3000))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fingerprints.json"


def test_renaming_the_directory_or_a_shard_changes_nothing(checkpoint: Path, cache: Path) -> None:
    before = fingerprint(checkpoint, cache)
    moved = checkpoint.rename(checkpoint.with_name("renamed"))
    (moved / "model-1.safetensors").rename(moved / "shard.safetensors")
    assert fingerprint(moved, cache) == before
    assert fingerprint(moved, cache.with_name("empty.json")) == before


@pytest.mark.parametrize("keep_times", [False, True])
def test_one_changed_byte_changes_it(checkpoint: Path, cache: Path, keep_times: bool) -> None:
    before = fingerprint(checkpoint, cache)
    path = checkpoint / "model-2.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(1234)
        (byte,) = file.read(1)
        file.seek(1234)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(checkpoint, cache) != before


def test_a_file_is_digested_once(checkpoint: Path, cache: Path, digested: list[str]) -> None:
    first = fingerprint(checkpoint, cache)
    assert fingerprint(checkpoint, cache) == first
    assert sorted(digested) == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', '{"a": "zz"}'])
def test_a_broken_cache_costs_only_time(checkpoint: Path, cache: Path, text: str) -> None:
    before = fingerprint(checkpoint, cache)
    cache.write_text(text)
    assert fingerprint(checkpoint, cache) == before


def test_a_cache_that_cannot_be_written_is_no_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(fingerprint(checkpoint, tmp_path / "file" / "cache.json")) == 32


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no weight files"):
        fingerprint(tmp_path)


def test_files_of_every_format_count(checkpoint: Path, cache: Path) -> None:
    """Another load_format takes the weights from them."""
    before = fingerprint(checkpoint, cache)
    (checkpoint / "pytorch_model.bin").write_bytes(b"others")
    assert fingerprint(checkpoint, cache) != before


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    names: list[str] = []
    real = module._digest_file

    def digest(path: Path) -> bytes:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(module, "_digest_file", digest)
    return names


def test_a_changed_file_is_digested_anew_and_the_others_are_not(
    checkpoint: Path, cache: Path, digested: list[str]
) -> None:
    fingerprint(checkpoint, cache)
    digested.clear()
    (checkpoint / "model-2.safetensors").write_bytes(os.urandom(3000))
    fingerprint(checkpoint, cache)
    assert digested == ["model-2.safetensors"]


def test_a_cache_that_others_can_write_is_not_read(
    checkpoint: Path, cache: Path, digested: list[str]
) -> None:
    before = fingerprint(checkpoint, cache)
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    assert fingerprint(checkpoint, cache) != before, "the cache is believed"
    cache.chmod(0o666)
    digested.clear()
    assert fingerprint(checkpoint, cache) == before
    assert len(digested) == 2
    assert cache.stat().st_mode & 0o777 == 0o600


def test_engines_that_start_together_digest_once_and_lose_no_entry(
    checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes, one after another by the lock; each model's files are read by one of them."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(os.urandom(4000))
    code = (
        "import os, sys, time; from pathlib import Path; "
        "from kvserver_vllm import fingerprint as m; real = m._digest_file; "
        "say = lambda p: os.write(1, f'{p.name}\\n'.encode()); "  # whole lines: threads call it
        "m._digest_file = lambda p: (say(p), time.sleep(0.2), real(p))[2]; "
        "m.fingerprint(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    engines = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(model), str(cache)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for model in (checkpoint, other, checkpoint, other)
    ]
    read = sorted(name for engine in engines for name in engine.communicate()[0].split())
    assert [engine.returncode for engine in engines] == [0, 0, 0, 0]
    assert read == ["model-1.safetensors", "model-2.safetensors", "model.safetensors"]
    assert len(json.loads(cache.read_text())) == 3


def test_a_lock_that_is_never_given_back_costs_only_time(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_S", 0.2)
    with module._turn(cache.with_suffix(".lock")):
        assert len(fingerprint(checkpoint, cache)) == 32


def test_what_changed_after_the_engine_began_is_named(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "prod"
    link.symlink_to(checkpoint)
    loaded = link.lstat().st_ctime + 0.02
    time.sleep(0.1)
    assert changed_since(link, loaded) is None
    link.unlink()
    link.symlink_to(checkpoint)
    assert changed_since(link, loaded) == link
    assert changed_since(link / ".", loaded) == link
    assert changed_since(checkpoint, loaded) is None
    shard = checkpoint / "model-1.safetensors"
    shard.write_bytes(b"new")
    assert changed_since(checkpoint, loaded) == shard


def test_a_process_knows_when_it_began(tmp_path: Path) -> None:
    code = "from kvserver_vllm.fingerprint import process_start; print(process_start())"
    (tmp_path / "before").touch()
    began = float(subprocess.check_output([sys.executable, "-c", code]))
    (tmp_path / "after").touch()
    assert (tmp_path / "before").stat().st_ctime <= began, "weights written just before count"
    assert began < (tmp_path / "after").stat().st_ctime + 1.1
    assert process_start() < began
