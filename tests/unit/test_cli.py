"""The commands against a real server process: output, exit status, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvserver
from kvclient import Client
from kvproto import cells
from kvserver.cli import EXIT_BAD, EXIT_OK, EXIT_UNREACHABLE, EXIT_USAGE, main
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, free_port

BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
OTHER = Blocks(layers=2, heads=2, page_bytes=512, name="other")
Capture = pytest.CaptureFixture[str]


def push(server: ServerProcess, blocks: Blocks = BLOCKS, *, durable: bool = False) -> None:
    keys = blocks.chain(1, 4)
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(blocks.spec)
        pushed = namespace.push(keys, blocks.payloads(keys), durable=durable)
        assert pushed.written == 4


def test_help_explains_every_command(capsys: Capture) -> None:
    for command in (
        [],
        ["serve"],
        ["stats"],
        ["namespaces"],
        ["evict"],
        ["role"],
        ["watch"],
        ["check"],
        ["purge"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "exit status:", "--host-bytes", "default: 4GiB", "--drop", "--yes"):
        assert word in text


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert kvserver.__version__ in capsys.readouterr().out


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvserver", "--version"], capture_output=True, timeout=30
    )
    assert done.stdout.decode().strip() == f"kvserver {kvserver.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--host-bytes", "many"],
        ["serve", "--listen", "nowhere"],
        ["serve", "--config", "/nonexistent.toml"],
        ["evict", "zz"],
        ["evict", "abc"],
        ["check"],
        ["purge", "--yes"],
    ],
)
def test_wrong_usage_is_status_2_and_says_why(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("kvserver: ")


@pytest.mark.parametrize(
    ("arguments", "given", "meant"),
    [
        (["serve", "--host-bytes=1KiB"], "KVSERVER_HOST_BYTE", "KVSERVER_HOST_BYTES"),
        (["pd-proxy"], "KVSERVER_PROXY_PREFIL", "KVSERVER_PROXY_PREFILL"),
    ],
)
def test_a_variable_that_is_no_option_is_told(
    arguments: list[str], given: str, meant: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(given, "1")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"warning: {given} is set, and is no option; did you mean {meant}?" in said


def test_a_server_that_is_not_there_is_status_3(capsys: Capture) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert main(["stats", "--address", address, "--timeout-s", "2"]) == EXIT_UNREACHABLE
    assert address in capsys.readouterr().err


def test_stats_namespaces_and_evict(server: ServerProcess, capsys: Capture) -> None:
    push(server)
    push(server, OTHER)
    address = ["--address", server.address]

    assert main(["stats", *address]) == EXIT_OK
    text = capsys.readouterr().out
    assert "host" in text
    assert "8 blocks" in text
    counters = dict(line.split() for line in text.partition("counter ")[2].splitlines()[1:-2])
    assert counters["completed"] == "8"
    assert "0" not in counters.values()  # there are dozens that never moved
    assert text.rstrip().endswith("counters are 0 (--json shows all)")
    assert main(["stats", "--json", *address]) == EXIT_OK
    stats = json.loads(capsys.readouterr().out)
    assert stats["blocks"] == "8"
    assert stats["native"] is cells.LIBRARY.exists() is ("without native code" not in text)

    assert main(["namespaces", *address]) == EXIT_OK
    text = capsys.readouterr().out
    assert BLOCKS.spec.id.hex()[:16] in text
    assert "near miss: " in text  # the two differ in their model's name only
    assert main(["namespaces", "--json", *address]) == EXIT_OK
    assert len(json.loads(capsys.readouterr().out)["namespaces"]) == 2

    assert main(["evict", "ffffffff", *address]) == EXIT_BAD
    assert main(["evict", BLOCKS.spec.id.hex()[:12], *address]) == EXIT_OK
    assert "evicted 4 blocks" in capsys.readouterr().out
    assert server.stats().blocks == 4
    assert main(["evict", OTHER.spec.id.hex(), "--drop", "--json", *address]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["blocks"] == "4"
    assert server.stats().blocks == 0


@pytest.mark.parametrize("option", ["--host-dir", "--disk-path"])
def test_purge_offers_nothing_that_it_would_refuse(
    option: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "of-others").touch()
    assert main(["purge", option, str(tmp_path)]) == EXIT_BAD
    assert "no directory that a server has used" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["of-others"]


def test_a_running_servers_files_are_not_offered_for_purging(
    server: ServerProcess, capsys: Capture
) -> None:
    for option in ("host_dir", "disk_path"):
        directory = str(server.options[option])
        assert main(["purge", "--" + option.replace("_", "-"), directory]) == EXIT_BAD
        assert f"in use by pid {server.pid}" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["tls_key", "tls_cert"])
def test_a_file_of_tls_that_is_not_there_is_named(
    absent: str, tmp_path: Path, capsys: Capture
) -> None:
    there = tmp_path / "there.pem"
    there.touch()
    files = {"tls_key": there, "tls_cert": there, absent: tmp_path / "absent.pem"}
    words = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    ports = [f"--{name}=127.0.0.1:{free_port()}" for name in ("listen", "metrics-listen")]
    none = ["--tcp-listen=", "--host-bytes=4MiB", f"--host-dir={tmp_path}"]
    assert main(["serve", *words, *ports, *none]) == EXIT_BAD
    assert (
        f"kvserver: {absent} is '{files[absent]}', must be a readable file: No such"
        in capsys.readouterr().err
    )


def test_check_finds_what_is_bad_and_purge_removes_it(
    serve: Callable[..., ServerProcess], capsys: Capture
) -> None:
    server = serve(disk_bytes="64MiB")
    disk = Path(str(server.options["disk_path"]))
    files = ["--host-dir", str(server.host_dir), "--disk-path", str(disk)]
    assert main(["check", *files]) == EXIT_BAD  # a server holds them
    assert "in use" in capsys.readouterr().err
    push(server, durable=True)
    assert server.terminate() == 0

    assert main(["check", *files]) == EXIT_OK
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [["host", "4"], ["disk", "4"]]

    slots = disk / "slots"
    raw = bytearray(slots.read_bytes())
    at = raw.find(BLOCKS.payload(BLOCKS.chain(1, 4)[2]).tobytes())
    assert at > 0
    raw[at + 100] ^= 1
    slots.write_bytes(raw)
    assert main(["check", *files]) == EXIT_BAD
    assert BLOCKS.chain(1, 4)[2].hex() in capsys.readouterr().out

    assert main(["purge", *files]) == EXIT_OK
    assert "say --yes" in capsys.readouterr().out
    assert (server.host_dir / "arena").exists()
    assert main(["purge", "--yes", *files]) == EXIT_OK
    assert not server.host_dir.exists()
    assert not disk.exists()
    assert main(["purge", "--yes", *files]) == EXIT_BAD
