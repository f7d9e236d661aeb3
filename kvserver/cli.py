"""The command line: start a server, look into one, check or remove what one left behind.

Exit statuses: 0 done, 1 the command found something bad or the server refused, 2 wrong usage or
configuration, 3 the server cannot be reached, 70 a server found a bug of its own and stopped.

Rule 1: a command that deletes names exactly one thing, and says what it removed.
Rule 2: commands that talk to a server use the Admin service (`watch` opens a session, as a router
does), never the server's files; `check` and `purge` use the files and refuse while a server holds
them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

import kvserver
from kvproto.errors import FieldError
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver import config, options, tables
from kvserver.router import settings as proxy_settings

PROTOCOL_VERSION = 1
EXIT_OK, EXIT_BAD, EXIT_USAGE, EXIT_UNREACHABLE = 0, 1, 2, 3
_EPILOG = """\
examples:
  kvserver serve --host-bytes 32GiB --disk-path /nvme/kv --disk-bytes 500GiB
  kvserver pd-proxy --prefill http://p0:8000 --decode http://d0:8000 http://d1:8000
  kvserver stats --watch
  kvserver namespaces --json
  kvserver evict 3fa91c
  kvserver role vllm-3f2a --produce off
  kvserver watch --once | grep '"event": "block"' | wc -l
  kvserver check --host-dir /dev/shm/kvserver-50051 --disk-path /nvme/kv

exit status: 0 done; 1 something bad was found or the server refused; 2 wrong usage or
configuration; 3 the server cannot be reached; 70 a server found a bug of its own and stopped
(start it again: its files are safe).
"""


class CommandError(Exception):
    """Ends the command with a message and an exit status."""

    def __init__(self, message: str, status: int = EXIT_BAD) -> None:
        self.status = status
        super().__init__(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except CommandError as error:
        print(f"kvserver: {error}", file=sys.stderr)
        return error.status
    except FieldError as error:
        print(f"kvserver: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_OK
    except BrokenPipeError:  # `kvserver stats | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


_TLS_FILES = {
    "ca": "PEM file of the authority that signed the server's certificate (default: the system's)",
    "cert": "PEM file of the certificate to show to a server with tls_client_ca",
    "key": "PEM file of that certificate's key",
}


# ---- the parser ------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvserver",
        description="A KV-cache hub for LLM serving.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvserver {kvserver.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_proxy(commands)
    stats = _add_client_command(commands, "stats", _stats, "show tiers, sessions and counters")
    stats.add_argument("--watch", action="store_true", help="repeat until interrupted")
    stats.add_argument(
        "--interval-s", type=_seconds, default=2.0, help="pause between repeats (default 2)"
    )
    _add_client_command(commands, "namespaces", _namespaces, "list the namespaces")
    evict = _add_client_command(commands, "evict", _evict, "evict the blocks of one namespace")
    evict.add_argument("namespace", help="the namespace's id, or the first 4 or more digits of it")
    evict.add_argument("--drop", action="store_true", help="forget the namespace as well")
    role = _add_client_command(
        commands, "role", _role, "have an engine stop or start producing or consuming"
    )
    role.add_argument("engine", help="its session's name (kvserver stats), or the beginning of it")
    for verb, what in (("produce", "push what it computes"), ("consume", "look up and pull")):
        role.add_argument(f"--{verb}", choices=("on", "off"), help=f"{what}; default: as it is")
    watch = _add_client_command(
        commands,
        "watch",
        _watch,
        "tell which blocks are where: one JSON object a line, without end",
        tables=False,
    )
    watch.add_argument("--namespace", help="only this one: its id, or the first 4 or more digits")
    watch.add_argument("--tenant", default="", help="whose blocks (default: the default tenant's)")
    watch.add_argument(
        "--once", action="store_true", help="end when everything that is there has been told"
    )
    check = _add_files_command(
        commands, "check", _check, "verify every block of a stopped server's files"
    )
    check.add_argument("--quick", action="store_true", help="check directories only, no payload")
    purge = _add_files_command(commands, "purge", _purge, "remove a stopped server's files")
    purge.add_argument("--yes", action="store_true", help="do it; without it, only say what")
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a server",
        description="Run a server until SIGTERM or SIGINT. Every option can also be set in the"
        ' environment (KVSERVER_HOST_BYTES) or in a TOML file (host_bytes = "32GiB"); the command'
        " line wins, then the environment, then the file.",
        epilog="example: kvserver serve --host-bytes 32GiB --disk-path /nvme/kv"
        " --disk-bytes 500GiB",
    )
    serve.set_defaults(run=_serve)
    _add_options(serve, config.option_table())


def _add_proxy(commands: Any) -> None:
    proxy = commands.add_parser(
        "pd-proxy",
        help="run an OpenAI-compatible proxy over prefill and decode engines",
        description="Serve completions and chats: a prefill engine computes the prompt, a decode"
        " engine pulls it from the hub and answers. Every option can also be set in the environment"
        " (KVSERVER_PROXY_PREFILL) or in a TOML file; the command line wins, then the environment,"
        " then the file. Needs the extra kvserver[router].",
        epilog="example: kvserver pd-proxy --listen 0.0.0.0:8000 --prefill http://p0:8000"
        " http://p1:8000 --decode http://d0:8000",
    )
    proxy.set_defaults(run=_proxy)
    _add_options(proxy, proxy_settings.option_table())


def _add_options(parser: argparse.ArgumentParser, table: Mapping[str, Mapping[str, Any]]) -> None:
    """A flag for each option of a table, and one for the file."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with options")
    groups: dict[str, Any] = {}
    for name, option in table.items():
        group = groups.setdefault(option["group"], parser.add_argument_group(option["group"]))
        default = option["default"]
        extra: dict[str, Any] = {}
        if isinstance(default, bool):
            extra = {"nargs": "?", "const": "true"}
        elif name in ("prefill", "decode"):
            extra = {"nargs": "+", "action": "extend"}
        group.add_argument(
            options.flag_of(name),
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(name, default),
            help=f"{option['help']} (default: {_shown_default(name, default)})".replace("%", "%%"),
            **extra,
        )


def _metavar(name: str, default: object) -> str:
    if isinstance(default, bool):
        return "true|false"
    if isinstance(default, int):
        return next((unit.upper() for unit in ("bytes", "ms") if unit in name.split("_")), "N")
    last = name.rpartition("_")[2]
    known = {"listen": "HOST:PORT", "tenants": "NAME,...", "prefill": "URL", "decode": "URL"}
    return known.get(last, last.upper())


def _shown_default(name: str, default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and "bytes" in name and default:
        return options.format_bytes(default).replace(" ", "")
    return str(default) if default != "" else "none"


def _add_client_command(
    commands: Any, name: str, run: Callable[..., int], text: str, *, tables: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--address",
        default=os.environ.get("KVSERVER_ADDRESS", "127.0.0.1:50051"),
        help="the server, host:port (default: $KVSERVER_ADDRESS or 127.0.0.1:50051)",
    )
    parser.add_argument(
        "--timeout-s", type=_seconds, default=10.0, help="deadline of a call (default 10)"
    )
    for name, text in _TLS_FILES.items():
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=text)
    if tables:
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _add_files_command(
    commands: Any, name: str, run: Callable[..., int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--host-dir", type=Path, help="the server's host_dir")
    parser.add_argument("--disk-path", type=Path, help="the server's disk_path")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("must be above 0 and at most 3600 seconds")
    return value


# ---- commands ----------------------------------------------------------------------------------


def _serve(parsed: argparse.Namespace) -> int:
    from kvserver import server

    flags = {k: v for k, v in vars(parsed).items() if k in config.option_table()}
    file = parsed.config or os.environ.get("KVSERVER_CONFIG") or None
    _doubt(config.unknown_variables(os.environ))
    settings = config.load(flags, environment=os.environ, file=file)
    try:
        return asyncio.run(server.run(settings))
    except server.StartError as error:
        raise CommandError(str(error)) from error


def _doubt(variables: Mapping[str, str]) -> None:
    for name, near in variables.items():
        hint = f"; did you mean {near}?" if near else ""
        print(f"kvserver: warning: {name} is set, and is no option{hint}", file=sys.stderr)


def _proxy(parsed: argparse.Namespace) -> int:
    flags = {k: v for k, v in vars(parsed).items() if k in proxy_settings.option_table()}
    file = parsed.config or os.environ.get("KVSERVER_PROXY_CONFIG") or None
    _doubt(proxy_settings.unknown_variables(os.environ))
    settings = proxy_settings.load(flags, environment=os.environ, file=file)
    try:
        from kvserver.router import app
    except ModuleNotFoundError as error:
        text = f"pd-proxy needs {error.name}: pip install 'kvserver[router]'"
        raise CommandError(text, EXIT_USAGE) from None
    try:
        return asyncio.run(app.run(settings))
    except app.StartError as error:
        raise CommandError(str(error)) from error


def _channel(parsed: argparse.Namespace) -> Any:
    """To the server; over TLS as soon as one of its files is named."""
    files = [getattr(parsed, f"tls_{name}") for name in _TLS_FILES]
    if not any(files):
        return grpc.insecure_channel(parsed.address)
    if bool(files[1]) != bool(files[2]):
        raise CommandError("--tls-cert and --tls-key are given together", EXIT_USAGE)
    try:
        ca, cert, key = (Path(file).read_bytes() if file else None for file in files)
    except OSError as error:
        raise CommandError(f"TLS: {error}", EXIT_USAGE) from None
    return grpc.secure_channel(parsed.address, grpc.ssl_channel_credentials(ca, key, cert))


def _call(parsed: argparse.Namespace, method: str, request: Any) -> Any:
    with _channel(parsed) as channel:
        stub = kvserver_pb2_grpc.AdminStub(channel)
        try:
            return getattr(stub, method)(request, timeout=parsed.timeout_s)
        except grpc.RpcError as error:
            raise _failed(parsed, error) from None


def _failed(parsed: argparse.Namespace, error: grpc.RpcError) -> CommandError:
    code, details = error.code(), error.details()
    lost = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    status = EXIT_UNREACHABLE if code in lost else EXIT_BAD
    return CommandError(f"{parsed.address}: {code.name}: {details}", status)


def _print_json(message: Any) -> None:
    fields = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    print(json.dumps(fields, indent=2))


def _stats(parsed: argparse.Namespace) -> int:
    while True:
        reply = _call(parsed, "Stats", pb.StatsRequest())
        if parsed.watch and not parsed.json and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        if parsed.json:
            _print_json(reply)
        else:
            print(tables.stats(reply))
        if not parsed.watch:
            return EXIT_OK
        sys.stdout.flush()
        time.sleep(parsed.interval_s)


def _namespaces(parsed: argparse.Namespace) -> int:
    reply = _call(parsed, "ListNamespaces", pb.ListNamespacesRequest())
    if parsed.json:
        _print_json(reply)
    else:
        print(tables.namespaces(reply.namespaces))
    return EXIT_OK


def _named_namespace(parsed: argparse.Namespace) -> bytes:
    """The id of the one namespace that `--namespace`, or `evict`'s argument, begins."""
    prefix = parsed.namespace.lower()
    if not 4 <= len(prefix) <= 64 or not set(prefix) <= set("0123456789abcdef"):
        raise CommandError(
            f"namespace {parsed.namespace!r} must be 4 to 64 hexadecimal digits", EXIT_USAGE
        )
    known = _call(parsed, "ListNamespaces", pb.ListNamespacesRequest()).namespaces
    matching = [n.namespace_id for n in known if n.namespace_id.hex().startswith(prefix)]
    if len(matching) != 1:
        found = ", ".join(m.hex()[:16] for m in matching[:8]) or "none"
        raise CommandError(f"{prefix} must name one namespace; it matches: {found}")
    namespace_id: bytes = matching[0]
    return namespace_id


def _evict(parsed: argparse.Namespace) -> int:
    namespace_id = _named_namespace(parsed)
    if parsed.drop:
        reply = _call(parsed, "DropNamespace", pb.DropNamespaceRequest(namespace_id=namespace_id))
    else:
        reply = _call(parsed, "Evict", pb.EvictRequest(namespace_id=namespace_id))
    if parsed.json:
        _print_json(reply)
    else:
        size = options.format_bytes(reply.bytes)
        left = "" if parsed.drop or not reply.in_use else f"; {reply.in_use} in use stayed"
        print(f"{namespace_id.hex()[:16]}: evicted {reply.blocks} blocks, {size}{left}")
    return EXIT_OK


def _role(parsed: argparse.Namespace) -> int:
    if not (parsed.produce or parsed.consume):
        raise CommandError("say --produce on|off, --consume on|off, or both", EXIT_USAGE)
    deadline_ms = max(1, min(60_000, int(parsed.timeout_s * 900)))
    request = pb.SetRoleRequest(engine=parsed.engine, deadline_ms=deadline_ms)
    if parsed.produce:
        request.produces = parsed.produce == "on"
    if parsed.consume:
        request.consumes = parsed.consume == "on"
    reply = _call(parsed, "SetRole", request)
    if parsed.json:
        _print_json(reply)
    else:
        print(f"{reply.engine}: {tables.role(reply.role)} (of {tables.role(reply.ceiling)})")
    return EXIT_OK


def _watch(parsed: argparse.Namespace) -> int:
    namespace_id = _named_namespace(parsed) if parsed.namespace else b""
    with _channel(parsed) as channel:
        cache = kvserver_pb2_grpc.CacheStub(channel)
        try:
            hello = cache.Hello(
                pb.HelloRequest(
                    protocol_version=PROTOCOL_VERSION,
                    client_name="kvserver watch",
                    tenant=parsed.tenant,
                ),
                timeout=parsed.timeout_s,
            )
            threading.Thread(target=_beat, args=(cache, hello), daemon=True).start()
            request = pb.WatchRequest(session=hello.session, namespace_id=namespace_id)
            for reply in cache.Watch(request):
                for told in tables.watch(reply):
                    print(json.dumps(told))
                sys.stdout.flush()
                if parsed.once and reply.kind == pb.WATCH_KIND_SYNCED:
                    cache.Goodbye(
                        pb.GoodbyeRequest(session=hello.session, client=hello.client, drained=True),
                        timeout=parsed.timeout_s,
                    )
                    return EXIT_OK
        except grpc.RpcError as error:
            raise _failed(parsed, error) from None
    raise CommandError(f"{parsed.address}: the server ended the watch", EXIT_UNREACHABLE)


def _beat(cache: Any, hello: pb.HelloReply) -> None:
    """Keeps a session until the channel is closed or the session has ended."""
    beat = pb.HeartbeatRequest(session=hello.session, client=hello.client)
    with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the channel is closed
        while True:
            time.sleep(hello.limits.heartbeat_ms / 2000)
            cache.Heartbeat(beat, timeout=hello.limits.session_ttl_ms / 1000)


def _directories(parsed: argparse.Namespace) -> tuple[Path | None, Path | None]:
    if parsed.host_dir is None and parsed.disk_path is None:
        raise CommandError("name at least one of --host-dir and --disk-path", EXIT_USAGE)
    return parsed.host_dir, parsed.disk_path


def _progress(name: str) -> Callable[[int, int], None]:
    """Says how far a check is, on stderr, at most every half second and at the end."""
    said = [time.monotonic()]

    def tell(done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - said[0] > 0.5:
            said[0] = now
            print(f"{name}: {done} of {total} blocks checked", file=sys.stderr)

    return tell


def _check(parsed: argparse.Namespace) -> int:
    from kvserver import offline

    host_dir, disk_path = _directories(parsed)
    verify = not parsed.quick
    reports = []
    try:
        if host_dir is not None:
            progress = _progress("host")
            reports.append(offline.check_host_files(host_dir, verify=verify, progress=progress))
        if disk_path is not None:
            progress = _progress("disk")
            reports.append(offline.check_disk_files(disk_path, verify=verify, progress=progress))
    except offline.OfflineError as error:
        raise CommandError(str(error)) from error
    print(offline.report_table(reports))
    return EXIT_BAD if any(report.bad for report in reports) else EXIT_OK


def _purge(parsed: argparse.Namespace) -> int:
    from kvserver import offline

    host_dir, disk_path = _directories(parsed)
    purges = [
        (host_dir, offline.refuse_host_purge, offline.purge_host_files),
        (disk_path, offline.refuse_disk_purge, offline.purge_disk_files),
    ]
    for directory, refuse, purge in purges:
        if directory is None:
            continue
        try:
            refuse(directory)
            if not parsed.yes:
                print(f"would remove the kvserver files in {directory}; say --yes to do it")
                continue
            freed = purge(directory)
        except offline.OfflineError as error:
            raise CommandError(str(error)) from error
        print(f"removed the kvserver files in {directory}: {options.format_bytes(freed)}")
    return EXIT_OK
