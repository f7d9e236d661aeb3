"""Builds the native code (proto/kvproto/*.c) into the wheel, where a C compiler is at hand.

Without one the wheel is a pure one, and Python does the same, slower. It is no extension module:
it knows nothing of Python, and one build serves every interpreter of a platform.

`python hatch_build.py` builds it in this tree, as an editable installation does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("proto", "kvproto")
SOURCES = ("cells.c", "wires.c", "bell.c")
LIBRARY = FOLDER / "_cells.so"
FLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread"]
COMPILERS = ("cc", "gcc", "clang")
SECONDS_MAX = 120


class BuildError(Exception):
    """Why there is no native code."""


def build(root: Path, library: Path) -> None:
    """Compile into `library`. What stands there is replaced at once and whole: it may be in use.
    BuildError without a compiler that can.
    """
    named = os.environ.get("CC")
    compiler = shlex.split(named) if named else [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler:
        raise BuildError(f"no C compiler: neither CC nor {', '.join(COMPILERS)}")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".cells-") as scratch:
            made = Path(scratch, library.name)
            sources = [str(root / FOLDER / name) for name in SOURCES]
            command = [*compiler, *FLAGS, "-o", str(made), *sources]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS_MAX)
            made.replace(library)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling runs before it packs a wheel, an editable one too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        try:
            build(root, root / LIBRARY)
        except BuildError as error:
            self.app.display_warning(f"kvserver is built without native code: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(LIBRARY.as_posix())


if __name__ == "__main__":
    build(Path(__file__).parent, Path(__file__).parent / LIBRARY)
