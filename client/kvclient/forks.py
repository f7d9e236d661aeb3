"""gRPC and fork: it does not survive one, and this module keeps that from costing a process.

Importing it loads gRPC, so it comes before every other import of this package.

Rules:
 1. gRPC's own fork handlers stay out, unless the environment asks for them with
    GRPC_ENABLE_FORK_SUPPORT, or gRPC was imported before this package. With them (grpcio 1.81.1), a
    child of a process with an open channel was aborted in one fork of four to ten, though it never
    called gRPC; without them, never. The setting is read when gRPC is imported, and the environment
    is left as it was.
 2. In the child of a process in which a client was opened, nothing calls gRPC: neither the parent's
    clients nor new ones (whose channels have no threads there: they time out or crash, with the
    handlers or without). Unsupported says so at once. Fork before the first client is opened, or
    start the process afresh (multiprocessing's "spawn", subprocess).
"""

from __future__ import annotations

import os
import sys

_SETTING = "GRPC_ENABLE_FORK_SUPPORT"
_opened_in = 0  # the process in which the first client was opened


def _load_grpc() -> None:
    if _SETTING in os.environ or "grpc" in sys.modules:
        return
    os.environ[_SETTING] = "0"
    try:
        import grpc  # noqa: F401 - for what it reads at import
    finally:
        del os.environ[_SETTING]


def check() -> None:
    """A client is about to be opened here. Unsupported where the parent had opened one."""
    global _opened_in
    from kvclient.errors import Unsupported  # not above: it imports gRPC

    here = os.getpid()
    if _opened_in not in (0, here):
        raise Unsupported(
            f"process {here} was forked from one in which a client was open ({_opened_in}), and "
            "gRPC does not survive that: fork before, or start the process afresh (spawn)"
        )
    _opened_in = here


_load_grpc()
