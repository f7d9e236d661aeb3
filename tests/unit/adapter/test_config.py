"""What `kv_connector_extra_config` takes, and how it says no."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvclient import Tls
from kvserver_vllm.config import Settings
from kvserver_vllm.errors import ConfigError


def test_transport_and_tls_reach_the_client(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-")
    settings = Settings.parse({"address": "h:1", "transport": "tcp", "tls_ca": str(ca)})
    assert settings.reach() == {"transport": "tcp", "connections": 2, "tls": Tls(ca=str(ca))}
    assert "tls" not in Settings.parse({"address": "h:1"}).reach()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("transport", "pigeon", "transport"),
        ("transport", 7, "transport"),
        ("connections", 0, "connections"),
        ("connections", 99, "connections"),
        ("tls_ca", "/nowhere/ca.pem", "tls_ca"),
        ("tls_cert", "/nowhere/cert.pem", "tls_key"),
        ("lookup_ms", -1, "lookup_ms"),
        ("adress", "h:1", "unknown key 'adress'"),
    ],
)
def test_what_cannot_be_right_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings.parse({"address": "h:1", key: value})
