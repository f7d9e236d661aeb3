"""Pulls of one block that are done in few steps: their answers are those of any other pull.

Of wrong bytes, of sessions that end and of hubs that stop: test_inline.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from kvclient import Client, InvalidArgument, Namespace, PullResult, single
from kvclient.transfer.shm import ShmArena
from tests.contract.conftest import host_tier
from tests.support.payload import Blocks, Bytes
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Its disk holds four times what its memory holds."""
    directory = tmp_path_factory.mktemp("single")
    with start_server(directory, host_bytes="8MiB", disk_bytes="32MiB") as server:
        yield server


@pytest.fixture
def namespace(hub: ServerProcess) -> Iterator[Namespace]:
    with Client.connect(hub.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        client.evict(namespace.id)
        yield namespace


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pull of one block, whether it was done here."""
    done: list[bool] = []
    pull = single.pull

    def noted(*arguments: Any) -> PullResult | None:
        result = pull(*arguments)
        done.append(result is not None)
        return result

    monkeypatch.setattr(single, "pull", noted)
    return done


def pushed(namespace: Namespace, seed: int, count: int) -> list[bytes]:
    keys = BLOCKS.chain(seed, count)
    assert namespace.push(keys, BLOCKS.payloads(keys)).written == count
    return keys


def plain(result: PullResult) -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in astuple(result)]


def test_one_block_as_any_other_pull_has_it(namespace: Namespace, ways: list[bool]) -> None:
    keys = [*pushed(namespace, 1, 3), *BLOCKS.chain(2, 1)]
    for key in keys:
        out, ordinary = BLOCKS.out(1), BLOCKS.out(1)
        result = namespace.pull([key], out)
        assert plain(result) == plain(
            namespace.pull([key], ordinary, region=BLOCKS.spec.grid.whole)
        )
        assert np.array_equal(out, ordinary)
        assert result.found.all() == (key in keys[:3])
        assert BLOCKS.wrong([key], out, result.found) == []
    assert ways == [True] * 4


def test_what_it_leased_is_free_again(namespace: Namespace, ways: list[bool]) -> None:
    keys = pushed(namespace, 3, 8)
    for _ in range(4):
        for key in keys:
            assert namespace.pull([key], BLOCKS.out(1)).found.all()
    assert ways == [True] * 32
    assert namespace._client.evict(namespace.id, keys).blocks == 8


def test_a_tail_and_cells_that_lie_apart(namespace: Namespace, ways: list[bool]) -> None:
    keys = pushed(namespace, 4, 1)
    wide = np.zeros((4, 2, 2 * BLOCKS.shape[2]), np.uint8)
    half = wide[:, :, : BLOCKS.shape[2]]
    assert namespace.pull(keys, [half]).found.all()
    assert np.array_equal(half, BLOCKS.payload(keys[0]))
    assert not wide[:, :, BLOCKS.shape[2] :].any()
    (tail,) = BLOCKS.chain(5, 1)
    page = BLOCKS.spec.page_tokens
    cells: Bytes = BLOCKS.payload(tail)[:, :, : BLOCKS.spec.page_bytes].copy()
    assert namespace.push([tail], [cells], tokens=[page]).written == 1
    out = BLOCKS.out(1)
    result = namespace.pull([tail], out)
    assert (result.found.tolist(), result.tokens.tolist()) == ([True], [page])
    assert np.array_equal(out[0].reshape(BLOCKS.shape)[:, :, : cells.shape[2]], cells)
    assert ways == [False, False]


def test_overtaken_by_reuse_it_is_pulled_anew(
    namespace: Namespace, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot changes hands before, or after, the last byte was copied."""
    keys = pushed(namespace, 6, 1)
    genuine = ShmArena.current
    for wrong in (0, 1):
        asked = itertools.count()

        def current(
            self: ShmArena, offset: int, generation: int, wrong: int = wrong, asked: Any = asked
        ) -> bool:
            return genuine(self, offset, generation) and next(asked) != wrong

        monkeypatch.setattr(ShmArena, "current", current)
        out = BLOCKS.out(1)
        assert BLOCKS.wrong(keys, out, namespace.pull(keys, out).found) == []
    assert ways == [False, False]


def test_from_disk(hub: ServerProcess, namespace: Namespace, ways: list[bool]) -> None:
    """What has left memory comes back for it, in one answer or in several."""
    count = 120
    assert count * BLOCKS.payload_bytes > host_tier(hub).bytes_total
    keys = BLOCKS.chain(100, count)
    for start in range(0, count, 20):
        some = keys[start : start + 20]
        assert namespace.push(some, BLOCKS.payloads(some), durable=True).written == len(some)
    for key in keys[::10]:
        out = BLOCKS.out(1)
        result = namespace.pull([key], out)
        assert result.found.all()
        assert BLOCKS.wrong([key], out, result.found) == []
    assert all(ways)


def test_arguments_are_named(namespace: Namespace) -> None:
    (key,) = BLOCKS.chain(8, 1)
    out = BLOCKS.out(1)
    frozen = BLOCKS.out(1)
    frozen.setflags(write=False)
    for field, keys, arrays in (
        ("hashes[0]", [key[:31]], out),
        ("out", [key], BLOCKS.out(2)),
        ("out[0]", [key], out[:, :1]),
        ("out[0]", [key], frozen),
    ):
        with pytest.raises(InvalidArgument) as refused:
            namespace.pull(keys, arrays)
        assert refused.value.field == field
