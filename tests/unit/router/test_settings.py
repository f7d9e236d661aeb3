"""Options of the proxy: precedence, engines' URLs, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvserver.cli import EXIT_BAD, EXIT_USAGE, build_parser, main
from kvserver.options import ConfigError, flag_of
from kvserver.router.settings import ProxySettings, load, option_table
from tests.support.server import free_port

ENGINES = {"prefill": ["http://p:1"], "decode": ["http://d:1"]}


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('prefill = ["http://f:1"]\ndecode = "http://f:2"\nprobe_ms = 77\n')
    environment = {
        "KVSERVER_PROXY_DECODE": "http://e:1,http://e:2/",
        "KVSERVER_PROXY_REQUESTS_MAX": "5",
        "KVSERVER_REQUESTS_MAX": "6",
    }
    settings = load({"requests_max": "9"}, environment=environment, file=file)
    assert settings.prefill == ("http://f:1",)
    assert settings.decode == ("http://e:1", "http://e:2")
    assert (settings.requests_max, settings.probe_ms, settings.prefill_ms) == (9, 77, 30_000)


def test_the_command_line_takes_engines_in_every_way() -> None:
    words = [
        "pd-proxy",
        "--prefill",
        "http://a:1",
        "http://b:1",
        "--prefill",
        "http://c:1,http://d:1",
    ]
    parsed = build_parser().parse_args([*words, "--decode", "https://e.example"])
    settings = load({"prefill": parsed.prefill, "decode": parsed.decode})
    assert settings.prefill == ("http://a:1", "http://b:1", "http://c:1", "http://d:1")
    assert settings.decode == ("https://e.example",)


NO_ENGINES = """
d:1  ftp://d:1  http://  http://d:1/v1  http://u:p@d  http://d:0  http://d:99999
http://d:1?x=1  http://[::1  http://d:1#f  http://d^x:1
"""


@pytest.mark.parametrize("url", NO_ENGINES.split())
def test_what_is_no_engine_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"decode .*must be"):
        load({**ENGINES, "decode": [url]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decode": ()}, "decode .*at least one URL"),
        ({"prefill": ""}, "prefill .*at least one URL"),
        ({"prefill": "http://a:1,http://a:1"}, "prefill .*differ"),
        ({"prefill": [f"http://a:{n}" for n in range(1, 1026)]}, "prefill .*at most 1024"),
        ({"listen": "nowhere"}, "listen .*host:port"),
        ({"backoff_ms": 20_000}, "backoff_ms_max .*at least backoff_ms"),
        ({"bodies_bytes_max": "1MiB"}, "bodies_bytes_max .*at least body_bytes_max"),
        ({"requests_max": 0}, "requests_max .*from 1"),
        ({"prefill_ms": 0}, "prefill_ms .*from 1"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load({**ENGINES, **options})


def test_every_option_says_what_it_is() -> None:
    text = re.sub(r"\s+", " ", _help())
    for name, meta in option_table().items():
        assert flag_of(name) in text
        assert len(meta["help"]) >= 8, name


def _help() -> str:
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return str(commands["pd-proxy"].format_help())


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pd-proxy", "--decode", "http://d:1"]) == EXIT_USAGE
    assert "prefill" in capsys.readouterr().err


def _run(code: str, *arguments: str) -> tuple[int, str]:
    """Exit status and stderr of a process that runs `code` and then the command."""
    code += "import sys, kvserver.cli\nsys.exit(kvserver.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pd-proxy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stderr


def test_an_address_that_cannot_be_had_is_told() -> None:
    words = ["--listen", f"203.0.113.1:{free_port()}", "--decode", "http://127.0.0.1:9"]
    status, told = _run("", *words, "--prefill", "http://127.0.0.1:9")
    assert status == EXIT_BAD
    assert told.startswith("kvserver: listen: 203.0.113.1")


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys\nsys.modules['aiohttp'] = None\n"
    status, told = _run(code, "--prefill", "http://p:1", "--decode", "http://d:1")
    assert status == EXIT_USAGE
    assert told == "kvserver: pd-proxy needs aiohttp: pip install 'kvserver[router]'\n"


def test_settings_stand_by_themselves() -> None:
    settings = ProxySettings(prefill=("http://p:1",), decode=("http://d:1",))
    assert settings.listen == "127.0.0.1:8000"
