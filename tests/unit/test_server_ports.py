"""The ports that tests start servers on: each given once, and a lost race is no failure."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support import server as support


def test_each_port_is_given_once_and_none_that_the_kernel_gives() -> None:
    ports = [support.free_port() for _ in range(300)]
    assert len(set(ports)) == len(ports)
    assert set(ports) <= set(support.PORTS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert taken.getsockname()[1] not in support.PORTS


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_whose_port_was_taken_meanwhile_starts_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        answers = [support.free_port() for _ in range(8)]
        answers[which] = other.getsockname()[1]
        left = iter(answers)
        monkeypatch.setattr(support, "free_port", lambda: next(left))
        with support.start_server(tmp_path) as server:
            assert server.stats().epoch == 1
            assert server.address == f"127.0.0.1:{answers[2]}"
        with pytest.raises(support.ServerError, match="in use"):
            support.start_server(
                tmp_path,
                listen=f"127.0.0.1:{other.getsockname()[1]}",
                metrics_listen=f"127.0.0.1:{answers[7]}",
            )
