"""How options are described, read and checked; which options there are, `config` and others say.

A set of options is a frozen dataclass whose fields are made by `option`. A value is taken from the
command line, else from the environment (a prefix and the option's name in capitals), else from the
TOML file (flat, `name = value`), else it is the option's default. A name that is no option is
refused in a file; in the environment, which is others' too, it is told of.

Rule 1: every value is checked where it is read; an error names the option, where the value came
from, the value and what would have been accepted.
Rule 2: sizes are in bytes (`512MiB`, `1.5GB`, a plain number), durations in milliseconds; the unit
is the last word of the option's name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from kvproto.errors import FieldError

Kind = TypeVar("Kind")
MS_MAX = 3_600_000
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}{b}": 1 << (10 * i) for i, p in enumerate("KMGT", 1) for b in ("i", "iB")},
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
}
_SERVICE_LINK = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class ConfigError(FieldError):
    """An option's value cannot be right. `source` says where it came from."""

    def __init__(self, name: str, value: object, limit: str, source: str = "") -> None:
        super().__init__(name, value, limit)
        self.source = source
        if source:
            self.args = (f"{self.args[0]} (from {source})",)


def parse_bytes(value: object, name: str = "size") -> int:
    """A size in bytes: 4096, "4096", "512MiB", "1.5 GB", "2Gi". ConfigError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ConfigError(name, value, "a size such as 1048576, 512MiB or 1.5GB")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """A size for people: 1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


# ---- parsers: the option's name and what was given; the value, or ConfigError -------------------

Parser = Callable[[str, object], object]


def size(low: int, high: int = 1 << 50) -> Parser:
    def parse(name: str, value: object) -> int:
        size = parse_bytes(value, name)
        if not low <= size <= high:
            raise ConfigError(name, value, f"from {format_bytes(low)} to {format_bytes(high)}")
        return size

    return parse


def count(low: int, high: int) -> Parser:
    def parse(name: str, value: object) -> int:
        number = value
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value.strip()):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise ConfigError(name, value, f"a whole number from {low} to {high}")
        return number

    return parse


def medium(name: str, value: object) -> str:
    """`memory`, `cuda` (the first GPU) or `cuda:N`."""
    if isinstance(value, str) and re.fullmatch(r"memory|cuda(:\d{1,3})?", value.strip()):
        return value.strip()
    raise ConfigError(name, value, "memory, cuda or cuda:N")


def flag(name: str, value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "on": True}
    words |= {"false": False, "no": False, "0": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ConfigError(name, value, "true or false")


def choice(*choices: str) -> Parser:
    def parse(name: str, value: object) -> str:
        if value not in choices:
            raise ConfigError(name, value, f"one of {', '.join(choices)}")
        return str(value)

    return parse


def address(name: str, value: object, *, empty: bool = False) -> str:
    if empty and value == "":
        return ""
    limit = "host:port with a port from 0 to 65535" + (", or empty" if empty else "")
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not host or not colon or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65_535:
        raise ConfigError(name, value, limit)
    return str(value)


def optional_address(name: str, value: object) -> str:
    return address(name, value, empty=True)


def path(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(name, value, "a path")
    return str(Path(value).absolute()) if value else ""


def names(name: str, value: object) -> tuple[str, ...]:
    items = (value.split(",") if value else []) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
        raise ConfigError(name, value, "a list of names, separated by commas")
    return tuple(item.strip() for item in items)


def word(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w{1,64}", value):
        raise ConfigError(name, value, "a name of letters, digits and underscores")
    return value


def pairs(name: str, value: object) -> tuple[str, ...]:
    items = tuple(item for item in names(name, value) if item)
    for item in items:
        if not re.fullmatch(r"\w+=.*", item):
            raise ConfigError(name, item, "name=value")
    return items


def option(default: Any, help_text: str, parse: Parser, group: str) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse, "group": group})


# ---- a whole set --------------------------------------------------------------------------------


def table_of(kind: type[Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> metadata (help, parse, group, default) of every option, in order of definition."""
    return {f.name: {**f.metadata, "default": f.default} for f in fields(kind)}


def check(settings: Any) -> None:
    """Parse every field in place; for `__post_init__` of a frozen set."""
    for name, meta in table_of(type(settings)).items():
        object.__setattr__(settings, name, meta["parse"](name, getattr(settings, name)))


def load(
    kind: type[Kind],
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    prefix: str,
    file: str | Path | None = None,
) -> Kind:
    """A `kind` from flags > environment > file > defaults. ConfigError names what is wrong."""
    options = table_of(kind)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}

    def take(name: str, value: object, source: str) -> None:
        try:
            values[name] = options[name]["parse"](name, value)
        except ConfigError as error:
            raise ConfigError(name, error.value, error.limit, source) from None
        sources[name] = source

    if file is not None:
        for name, value in _read_file(Path(file), options).items():
            take(name, value, str(file))
    for name in options:
        variable = prefix + name.upper()
        if environment is not None and variable in environment:
            take(name, environment[variable], f"the environment, {variable}")
    for name, value in (flags or {}).items():
        take(name, value, f"the command line, {flag_of(name)}")
    try:
        return kind(**values)
    except ConfigError as error:
        source = sources.get(error.field, "")
        raise ConfigError(error.field, error.value, error.limit, source) from None


def unknown_variables(
    kind: type[Any], environment: Mapping[str, str], *, prefix: str, others: Iterable[str] = ()
) -> dict[str, str]:
    """Variables that begin like those of `kind`, and are none of its options, each with the nearest
    that is or "". `others` are known too: what follows the prefix, or, where it ends in `_`, how
    that begins. What Kubernetes sets in every pod beside a service of such a name is no mistake."""
    known = [name.upper() for name in table_of(kind)]
    known += [other for other in others if not other.endswith("_")]
    foreign = tuple(other for other in others if other.endswith("_"))
    found = {}
    for variable in sorted(environment):
        name = variable.removeprefix(prefix)
        if name in (variable, *known) or name.startswith(foreign):
            continue
        if not _SERVICE_LINK.fullmatch(variable):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            found[variable] = prefix + near[0] if near else ""
    return found


def read_file(name: str, path: str) -> bytes | None:
    """What the file holds that the option `name` names; None where it names none."""
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigError(name, path, f"a readable file: {error.strerror}") from error


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_file(path: Path, known: Mapping[str, object]) -> dict[str, object]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", str(path), f"a readable TOML file: {error}") from error
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"an option; did you mean {close[0]}?" if close else "an option"
            raise ConfigError(name, content[name], hint, str(path))
    return content
