"""Precedence of sources, and that every bad value is refused with its field, source and limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvserver.config import Settings, load, option_table, unknown_variables
from kvserver.options import ConfigError, parse_bytes
from kvserver.router import settings


def test_each_source_overrides_the_one_below_it(tmp_path: Path) -> None:
    file = tmp_path / "kvserver.toml"
    file.write_text('host_bytes = "32MiB"\nlog_level = "debug"\nrpcs_max = 7\n')
    environment = {"KVSERVER_HOST_BYTES": "64MiB", "KVSERVER_LOG_LEVEL": "error"}
    loaded = load({"host_bytes": "128MiB"}, environment=environment, file=file)
    assert loaded.host_bytes == 128 << 20  # flag
    assert loaded.log_level == "error"  # environment
    assert loaded.rpcs_max == 7  # file
    assert loaded.listen == "127.0.0.1:50051"  # default


def test_foreign_environment_variables_are_ignored() -> None:
    # What Kubernetes sets in every pod next to a service named kvserver.
    environment = {"KVSERVER_PORT": "tcp://10.0.0.1:1", "KVSERVER_SERVICE_HOST": "10.0.0.1"}
    assert load(environment=environment) == Settings()


def test_unknown_variables_are_told_with_the_nearest_option() -> None:
    environment = {
        "KVSERVER_HOST_BYTE": "400GiB",
        "KVSERVER_WHATEVER": "1",
        "KVSERVER_PROXY_PREFIL": "http://p:1",
        # Known here, or others': tests, the Makefile, Kubernetes beside a service "kvserver".
        "KVSERVER_HOST_BYTES": "1GiB",
        "KVSERVER_CONFIG": "/etc/kvserver.toml",
        "KVSERVER_NATIVE": "0",
        "KVSERVER_TEST_WAYS": "shm",
        "KVSERVER_PORT": "tcp://10.0.0.1:1",
        "KVSERVER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "KVSERVER_SERVICE_PORT_GRPC": "50051",
        "KVSERVER_METRICS_SERVICE_HOST": "10.0.0.1",
    }
    assert unknown_variables(environment) == {
        "KVSERVER_HOST_BYTE": "KVSERVER_HOST_BYTES",
        "KVSERVER_WHATEVER": "",
    }
    assert settings.unknown_variables(environment) == {
        "KVSERVER_PROXY_PREFIL": "KVSERVER_PROXY_PREFILL"
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4KiB", 4096),
        ("4 Ki", 4096),
        ("1.5GiB", 3 << 29),
        ("2GB", 2_000_000_000),
        ("1TiB", 1 << 40),
        (77, 77),
    ],
)
def test_parse_bytes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "4G", "-1", "nan", "inf", "1e9", "4 gib", "GiB", None, 1.5])
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(ConfigError, match=r"host_bytes is .*must be a size"):
        parse_bytes(text, "host_bytes")


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("listen", "nowhere", "host:port"),
        ("listen", "a:99999", "host:port"),
        ("metrics_listen", "a:b", "host:port"),
        ("tcp_listen", "x", "host:port with a port from 0 to 65535, or empty"),
        ("tcp_workers", "65", "from 0 to 64"),
        ("tcp_connections_max", "0", "from 1 to 65536"),
        ("tcp_stall_ms", "1", "from 10 to 3600000"),
        ("host_bytes", "1MiB", "from 4 MiB"),
        ("host_bytes", "many", "a size"),
        ("host_dir", "/" + "x" * 200, "at most 88 bytes"),
        ("data_threads", "0", "from 1 to 64"),
        ("data_threads", "1.5", "a whole number"),
        ("data_threads", True, "a whole number"),
        ("keys_per_call_max", "999999", "from 1 to 65536"),
        ("mlock", "maybe", "true or false"),
        ("log_level", "loud", "one of debug, info"),
        ("log_format", "xml", "one of json, text"),
        ("heartbeat_ms", "9000", "at most half of session_ttl_ms"),
        ("drain_ms", "-1", "a whole number"),
        ("disk_bytes", "1GiB", "a directory when disk_bytes is set"),
        ("shm_tenants", 3, "a list of names"),
        ("device", "gpu", "memory, cuda or cuda:N"),
        ("device", "cuda:", "memory, cuda or cuda:N"),
        ("device", 0, "memory, cuda or cuda:N"),
    ],
)
def test_a_bad_value_names_field_and_limit(name: str, value: object, limit: str) -> None:
    with pytest.raises(ConfigError, match=limit) as caught:
        load({name: value})
    assert caught.value.field in (name, "disk_path")
    assert caught.value.limit in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"tls_cert": "/c"}, "tls_key"),
        ({"tls_key": "/k"}, "tls_cert"),
        ({"tls_client_ca": "/ca"}, "tls_cert"),
        ({"tls_cert": "/c", "tls_key": "/k", "tcp_workers": 0}, "tcp_workers"),
    ],
)
def test_tls_files_belong_together(values: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(values)
    assert caught.value.field == field


def test_an_error_names_its_source(tmp_path: Path) -> None:
    file = tmp_path / "kvserver.toml"
    file.write_text("rpcs_max = 0\n")
    with pytest.raises(ConfigError, match=f"from {file}"):
        load(file=file)
    with pytest.raises(ConfigError, match="KVSERVER_RPCS_MAX"):
        load(environment={"KVSERVER_RPCS_MAX": "0"})
    with pytest.raises(ConfigError, match="--rpcs-max"):
        load({"rpcs_max": "0"})


def test_an_unknown_name_in_the_file_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "kvserver.toml"
    file.write_text('host_byte = "1GiB"\n')
    with pytest.raises(ConfigError, match="did you mean host_bytes"):
        load(file=file)


@pytest.mark.parametrize("content", ["host_bytes = ", "\xff\xfe"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "kvserver.toml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="a readable TOML file"):
        load(file=file)
    with pytest.raises(ConfigError, match="a readable TOML file"):
        load(file=tmp_path / "absent.toml")


def test_a_disk_needs_a_size_and_the_default_directory_a_port() -> None:
    with pytest.raises(ConfigError, match="disk_bytes"):
        load({"disk_path": "/tmp/x"})
    with pytest.raises(ConfigError, match="host_dir"):
        load({"listen": "127.0.0.1:0"})
    assert load({"listen": "127.0.0.1:7"}).host_dir == "/dev/shm/kvserver-7"


def test_nobody_has_a_device_tier_that_is_not_a_gpu_unasked() -> None:
    assert (Settings().device_bytes, Settings().device) == (0, "cuda")
    assert load({"device_bytes": "1GiB"}).device == "cuda"
    assert load({"device": "cuda:3"}).device == "cuda:3"
    assert load({"device": "memory"}).device == "memory"


def test_lists_and_flags_in_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "kvserver.toml"
    file.write_text('shm_tenants = ["a", "b"]\nmlock = true\n')
    assert load(file=file).shm_tenants == ("a", "b")
    assert load(file=file).mlock
    settings = load({"shm_tenants": "a, b", "mlock": "on"})
    assert settings.shm_allowed("a")
    assert not settings.shm_allowed("c")
    assert not settings.shm_allowed("")
    assert load({"shm_tenants": ",a"}).shm_allowed("")
    assert not load({"shm_tenants": ""}).shm_allowed("")
    assert Settings().shm_allowed("anyone")


def test_every_default_passes_its_own_check_and_every_option_is_described() -> None:
    for name, option in option_table().items():
        option["parse"](name, option["default"])
        assert len(option["help"]) > 10
