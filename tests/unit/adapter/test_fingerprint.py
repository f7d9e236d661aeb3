"""A fingerprint follows the content of the weights and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvserver_vllm import fingerprint as module
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.fingerprint import config_attributes, fingerprint


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


def test_a_file_is_digested_once(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    real = module._digest_file
    monkeypatch.setattr(module, "_digest_file", lambda p: (digested.append(p.name), real(p))[1])
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


def test_config_names_what_differs() -> None:
    base = {"rope_theta": 1e4, "sliding_window": 64, "num_hidden_layers": 4, "architectures": ["A"]}
    one = config_attributes(base)
    assert one == config_attributes({**base, "architectures": ["B"], "_name_or_path": "/x"})
    rope = config_attributes({**base, "rope_theta": 5e5})
    assert {k for k in one if one[k] != rope[k]} == {"rope"}
    window = config_attributes({**base, "sliding_window": None})
    assert {k for k in one if one[k] != window[k]} == {"window"}
    other = config_attributes({**base, "hidden_act": "gelu"})
    assert {k for k in one if one[k] != other[k]} == {"config"}
