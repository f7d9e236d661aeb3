"""The client of kvserver: push and pull KV blocks by prefix hash.

`Client` is synchronous and may be used from several threads; `AsyncClient` belongs to one event
loop. A `Client` may be built before a fork and opened after it; a process forked from one in which
a client was open has none (`kvclient.forks`). Errors are KVErrors; a pulled block is byte-exact or
a miss.
"""

from kvclient import forks  # first: it decides how gRPC is loaded
from kvclient.aio import AsyncClient
from kvclient.client import Client
from kvclient.errors import (
    Conflict,
    DeadlineExceeded,
    Gone,
    InvalidArgument,
    KVError,
    LimitExceeded,
    NotFound,
    Unavailable,
    Unsupported,
)
from kvclient.handles import SyncGranted, SyncReadStream, SyncReservation, SyncWatch
from kvclient.namespace import AsyncNamespace
from kvclient.reading import Granted, ReadStream
from kvclient.results import (
    BlockState,
    CommitVerdict,
    Limits,
    Lookup,
    Need,
    PullResult,
    PushResult,
    PushVerdict,
    ReserveVerdict,
    Role,
    Tier,
)
from kvclient.sync import Namespace
from kvclient.tls import Tls
from kvclient.transfer.direct import Pin, Registered, Scattered
from kvclient.watching import CacheMap, Residence, Watch, WatchEvent, WatchKind
from kvclient.writing import Reservation
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import prefix_hashes

__all__ = [
    "AsyncClient",
    "AsyncNamespace",
    "BlockState",
    "CacheMap",
    "Client",
    "CommitVerdict",
    "Conflict",
    "DeadlineExceeded",
    "Gone",
    "Granted",
    "InvalidArgument",
    "KVError",
    "LimitExceeded",
    "Limits",
    "Lookup",
    "Namespace",
    "NamespaceSpec",
    "Need",
    "NotFound",
    "Pin",
    "PullResult",
    "PushResult",
    "PushVerdict",
    "ReadStream",
    "Registered",
    "Reservation",
    "ReserveVerdict",
    "Residence",
    "Role",
    "Scattered",
    "SyncGranted",
    "SyncReadStream",
    "SyncReservation",
    "SyncWatch",
    "Tier",
    "Tls",
    "Unavailable",
    "Unsupported",
    "Watch",
    "WatchEvent",
    "WatchKind",
    "forks",
    "prefix_hashes",
]
