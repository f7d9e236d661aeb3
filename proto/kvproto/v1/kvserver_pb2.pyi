from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_STATE_ABSENT: _ClassVar[BlockState]
    BLOCK_STATE_ANNOUNCED: _ClassVar[BlockState]
    BLOCK_STATE_FILLING: _ClassVar[BlockState]
    BLOCK_STATE_COMPLETE: _ClassVar[BlockState]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_NONE: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]

class ReserveVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESERVE_VERDICT_WRITE: _ClassVar[ReserveVerdict]
    RESERVE_VERDICT_PRESENT: _ClassVar[ReserveVerdict]
    RESERVE_VERDICT_BUSY: _ClassVar[ReserveVerdict]
    RESERVE_VERDICT_NO_SPACE: _ClassVar[ReserveVerdict]

class CommitVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMIT_VERDICT_OK: _ClassVar[CommitVerdict]
    COMMIT_VERDICT_GONE: _ClassVar[CommitVerdict]
    COMMIT_VERDICT_MISMATCH: _ClassVar[CommitVerdict]
    COMMIT_VERDICT_TAKEN: _ClassVar[CommitVerdict]

class WatchKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WATCH_KIND_IDLE: _ClassVar[WatchKind]
    WATCH_KIND_RESET: _ClassVar[WatchKind]
    WATCH_KIND_BLOCKS: _ClassVar[WatchKind]
    WATCH_KIND_SYNCED: _ClassVar[WatchKind]
    WATCH_KIND_FORGOTTEN: _ClassVar[WatchKind]
BLOCK_STATE_ABSENT: BlockState
BLOCK_STATE_ANNOUNCED: BlockState
BLOCK_STATE_FILLING: BlockState
BLOCK_STATE_COMPLETE: BlockState
TIER_NONE: Tier
TIER_DEVICE: Tier
TIER_HOST: Tier
TIER_DISK: Tier
RESERVE_VERDICT_WRITE: ReserveVerdict
RESERVE_VERDICT_PRESENT: ReserveVerdict
RESERVE_VERDICT_BUSY: ReserveVerdict
RESERVE_VERDICT_NO_SPACE: ReserveVerdict
COMMIT_VERDICT_OK: CommitVerdict
COMMIT_VERDICT_GONE: CommitVerdict
COMMIT_VERDICT_MISMATCH: CommitVerdict
COMMIT_VERDICT_TAKEN: CommitVerdict
WATCH_KIND_IDLE: WatchKind
WATCH_KIND_RESET: WatchKind
WATCH_KIND_BLOCKS: WatchKind
WATCH_KIND_SYNCED: WatchKind
WATCH_KIND_FORGOTTEN: WatchKind

class HelloRequest(_message.Message):
    __slots__ = ("protocol_version", "client_name", "client_version", "tenant", "join_token", "rank")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    client_name: str
    client_version: str
    tenant: str
    join_token: bytes
    rank: int
    def __init__(self, protocol_version: _Optional[int] = ..., client_name: _Optional[str] = ..., client_version: _Optional[str] = ..., tenant: _Optional[str] = ..., join_token: _Optional[bytes] = ..., rank: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("keys_per_call_max", "reservation_ms_max", "lease_ms_max", "wait_ms_max", "window_bytes_max", "heartbeat_ms", "session_ttl_ms", "announce_ttl_ms_max", "writers_per_block_max", "slot_bytes_max", "commit_names")
    KEYS_PER_CALL_MAX_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    SESSION_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_TTL_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    WRITERS_PER_BLOCK_MAX_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    COMMIT_NAMES_FIELD_NUMBER: _ClassVar[int]
    keys_per_call_max: int
    reservation_ms_max: int
    lease_ms_max: int
    wait_ms_max: int
    window_bytes_max: int
    heartbeat_ms: int
    session_ttl_ms: int
    announce_ttl_ms_max: int
    writers_per_block_max: int
    slot_bytes_max: int
    commit_names: bool
    def __init__(self, keys_per_call_max: _Optional[int] = ..., reservation_ms_max: _Optional[int] = ..., lease_ms_max: _Optional[int] = ..., wait_ms_max: _Optional[int] = ..., window_bytes_max: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., session_ttl_ms: _Optional[int] = ..., announce_ttl_ms_max: _Optional[int] = ..., writers_per_block_max: _Optional[int] = ..., slot_bytes_max: _Optional[int] = ..., commit_names: bool = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("name", "address", "options")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    options: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("session", "client", "token", "epoch", "arena_id", "server_version", "protocol_version", "limits", "transports")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    token: bytes
    epoch: int
    arena_id: bytes
    server_version: str
    protocol_version: int
    limits: Limits
    transports: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., token: _Optional[bytes] = ..., epoch: _Optional[int] = ..., arena_id: _Optional[bytes] = ..., server_version: _Optional[str] = ..., protocol_version: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., transports: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("session", "client")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("epoch", "draining")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    draining: bool
    def __init__(self, epoch: _Optional[int] = ..., draining: bool = ...) -> None: ...

class GoodbyeRequest(_message.Message):
    __slots__ = ("session", "client", "drained")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    drained: bool
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., drained: bool = ...) -> None: ...

class GoodbyeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NamespaceSpec(_message.Message):
    __slots__ = ("format_version", "model", "weights", "adapter", "kv_dtype", "encoding", "block_tokens", "page_tokens", "layers", "kv_heads", "page_bytes", "tenant", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    model: str
    weights: bytes
    adapter: bytes
    kv_dtype: str
    encoding: str
    block_tokens: int
    page_tokens: int
    layers: int
    kv_heads: int
    page_bytes: int
    tenant: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, format_version: _Optional[int] = ..., model: _Optional[str] = ..., weights: _Optional[bytes] = ..., adapter: _Optional[bytes] = ..., kv_dtype: _Optional[str] = ..., encoding: _Optional[str] = ..., block_tokens: _Optional[int] = ..., page_tokens: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., page_bytes: _Optional[int] = ..., tenant: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("cell_bytes", "payload_bytes", "trailer_bytes", "slot_bytes")
    CELL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAILER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    cell_bytes: int
    payload_bytes: int
    trailer_bytes: int
    slot_bytes: int
    def __init__(self, cell_bytes: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., trailer_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("session", "spec")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    session: int
    spec: NamespaceSpec
    def __init__(self, session: _Optional[int] = ..., spec: _Optional[_Union[NamespaceSpec, _Mapping]] = ...) -> None: ...

class OpenNamespaceReply(_message.Message):
    __slots__ = ("handle", "namespace_id", "geometry", "near_misses")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    NEAR_MISSES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    namespace_id: bytes
    geometry: Geometry
    near_misses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, handle: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., near_misses: _Optional[_Iterable[str]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("layer_start", "layer_stop", "head_start", "head_stop")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_STOP_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_STOP_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_stop: _Optional[int] = ..., head_start: _Optional[int] = ..., head_stop: _Optional[int] = ...) -> None: ...

class LayerGroupNeed(_message.Message):
    __slots__ = ("kind", "blocks", "region")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        EVERY_BLOCK: _ClassVar[LayerGroupNeed.Kind]
        LAST_BLOCKS: _ClassVar[LayerGroupNeed.Kind]
        LAST_ONLY: _ClassVar[LayerGroupNeed.Kind]
    EVERY_BLOCK: LayerGroupNeed.Kind
    LAST_BLOCKS: LayerGroupNeed.Kind
    LAST_ONLY: LayerGroupNeed.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    kind: LayerGroupNeed.Kind
    blocks: int
    region: Region
    def __init__(self, kind: _Optional[_Union[LayerGroupNeed.Kind, str]] = ..., blocks: _Optional[int] = ..., region: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("session", "namespace", "hashes", "need", "pin_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    PIN_MS_FIELD_NUMBER: _ClassVar[int]
    session: int
    namespace: int
    hashes: bytes
    need: _containers.RepeatedCompositeFieldContainer[LayerGroupNeed]
    pin_ms: int
    def __init__(self, session: _Optional[int] = ..., namespace: _Optional[int] = ..., hashes: _Optional[bytes] = ..., need: _Optional[_Iterable[_Union[LayerGroupNeed, _Mapping]]] = ..., pin_ms: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("usable_blocks", "live_blocks", "states", "tiers", "lease", "lease_ms", "committed_cells")
    USABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_CELLS_FIELD_NUMBER: _ClassVar[int]
    usable_blocks: int
    live_blocks: int
    states: bytes
    tiers: bytes
    lease: int
    lease_ms: int
    committed_cells: int
    def __init__(self, usable_blocks: _Optional[int] = ..., live_blocks: _Optional[int] = ..., states: _Optional[bytes] = ..., tiers: _Optional[bytes] = ..., lease: _Optional[int] = ..., lease_ms: _Optional[int] = ..., committed_cells: _Optional[int] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("session", "namespace", "hashes", "ttl_ms", "withdraw")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    session: int
    namespace: int
    hashes: bytes
    ttl_ms: int
    withdraw: bool
    def __init__(self, session: _Optional[int] = ..., namespace: _Optional[int] = ..., hashes: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., withdraw: bool = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("announced",)
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    announced: int
    def __init__(self, announced: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session", "client", "namespace", "hashes", "parents", "tokens", "region", "ttl_ms", "wait_ms", "durable")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    namespace: int
    hashes: bytes
    parents: bytes
    tokens: bytes
    region: Region
    ttl_ms: int
    wait_ms: int
    durable: bool
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., namespace: _Optional[int] = ..., hashes: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., ttl_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., durable: bool = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("reservation", "ttl_ms", "verdicts", "offsets", "generations", "permits")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    PERMITS_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    ttl_ms: int
    verdicts: bytes
    offsets: bytes
    generations: bytes
    permits: bytes
    def __init__(self, reservation: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., verdicts: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., permits: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session", "client", "reservation", "indices", "region", "checksums", "hashes", "parents")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    reservation: int
    indices: bytes
    region: Region
    checksums: bytes
    hashes: bytes
    parents: bytes
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., reservation: _Optional[int] = ..., indices: _Optional[bytes] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., checksums: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., parents: _Optional[bytes] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("verdicts", "completed")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    verdicts: bytes
    completed: int
    def __init__(self, verdicts: _Optional[bytes] = ..., completed: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("session", "client", "reservation", "drained")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    reservation: int
    drained: bool
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., reservation: _Optional[int] = ..., drained: bool = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("session", "client", "reservation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    reservation: int
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., reservation: _Optional[int] = ...) -> None: ...

class FenceReply(_message.Message):
    __slots__ = ("slots_freed",)
    SLOTS_FREED_FIELD_NUMBER: _ClassVar[int]
    slots_freed: int
    def __init__(self, slots_freed: _Optional[int] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("session", "client", "namespace", "hashes", "region", "wait_ms", "window_bytes", "lease_ms", "inherit_lease", "release")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    INHERIT_LEASE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    namespace: int
    hashes: bytes
    region: Region
    wait_ms: int
    window_bytes: int
    lease_ms: int
    inherit_lease: int
    release: bytes
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., namespace: _Optional[int] = ..., hashes: _Optional[bytes] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., wait_ms: _Optional[int] = ..., window_bytes: _Optional[int] = ..., lease_ms: _Optional[int] = ..., inherit_lease: _Optional[int] = ..., release: _Optional[bytes] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("lease", "indices", "offsets", "generations", "tokens", "roots", "tiers", "lease_ms", "permits")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    PERMITS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    indices: bytes
    offsets: bytes
    generations: bytes
    tokens: bytes
    roots: bytes
    tiers: bytes
    lease_ms: int
    permits: bytes
    def __init__(self, lease: _Optional[int] = ..., indices: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., roots: _Optional[bytes] = ..., tiers: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., permits: _Optional[bytes] = ...) -> None: ...

class AcquireReply(_message.Message):
    __slots__ = ("grant", "missing", "done")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    grant: Grant
    missing: bytes
    done: bool
    def __init__(self, grant: _Optional[_Union[Grant, _Mapping]] = ..., missing: _Optional[bytes] = ..., done: bool = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session", "leases")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    session: int
    leases: bytes
    def __init__(self, session: _Optional[int] = ..., leases: _Optional[bytes] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("session", "client", "metadata", "extents")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    metadata: bytes
    extents: bytes
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., metadata: _Optional[bytes] = ..., extents: _Optional[bytes] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("key", "move_ms_max", "move_bytes_max")
    KEY_FIELD_NUMBER: _ClassVar[int]
    MOVE_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    MOVE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    move_ms_max: int
    move_bytes_max: int
    def __init__(self, key: _Optional[bytes] = ..., move_ms_max: _Optional[int] = ..., move_bytes_max: _Optional[int] = ...) -> None: ...

class MoveRequest(_message.Message):
    __slots__ = ("session", "client", "move", "op", "layers", "heads", "granted", "region", "holds", "offsets", "generations", "cell_bytes", "permits", "addresses", "checksums", "deadline_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CELL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PERMITS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    move: int
    op: int
    layers: int
    heads: int
    granted: Region
    region: Region
    holds: bytes
    offsets: bytes
    generations: bytes
    cell_bytes: bytes
    permits: bytes
    addresses: bytes
    checksums: bytes
    deadline_ms: int
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., move: _Optional[int] = ..., op: _Optional[int] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., granted: _Optional[_Union[Region, _Mapping]] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., holds: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., cell_bytes: _Optional[bytes] = ..., permits: _Optional[bytes] = ..., addresses: _Optional[bytes] = ..., checksums: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class MoveReply(_message.Message):
    __slots__ = ("statuses", "trailers", "terminal")
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    TRAILERS_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    statuses: bytes
    trailers: bytes
    terminal: bool
    def __init__(self, statuses: _Optional[bytes] = ..., trailers: _Optional[bytes] = ..., terminal: bool = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("session", "client", "key", "moves")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    session: int
    client: int
    key: bytes
    moves: bytes
    def __init__(self, session: _Optional[int] = ..., client: _Optional[int] = ..., key: _Optional[bytes] = ..., moves: _Optional[bytes] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ("running",)
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    running: bytes
    def __init__(self, running: _Optional[bytes] = ...) -> None: ...

class ReportCorruptRequest(_message.Message):
    __slots__ = ("session", "namespace", "hashes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    session: int
    namespace: int
    hashes: bytes
    def __init__(self, session: _Optional[int] = ..., namespace: _Optional[int] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class ReportCorruptReply(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: int
    def __init__(self, dropped: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("session", "namespace_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    session: int
    namespace_id: bytes
    def __init__(self, session: _Optional[int] = ..., namespace_id: _Optional[bytes] = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("sequence", "kind", "epoch", "tiers_up", "idle_ms", "reason", "namespace_id", "spec", "hashes", "parents", "tokens", "tiers")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_UP_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    kind: WatchKind
    epoch: int
    tiers_up: int
    idle_ms: int
    reason: str
    namespace_id: bytes
    spec: NamespaceSpec
    hashes: bytes
    parents: bytes
    tokens: bytes
    tiers: bytes
    def __init__(self, sequence: _Optional[int] = ..., kind: _Optional[_Union[WatchKind, str]] = ..., epoch: _Optional[int] = ..., tiers_up: _Optional[int] = ..., idle_ms: _Optional[int] = ..., reason: _Optional[str] = ..., namespace_id: _Optional[bytes] = ..., spec: _Optional[_Union[NamespaceSpec, _Mapping]] = ..., hashes: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., tiers: _Optional[bytes] = ...) -> None: ...

class Role(_message.Message):
    __slots__ = ("produces", "consumes")
    PRODUCES_FIELD_NUMBER: _ClassVar[int]
    CONSUMES_FIELD_NUMBER: _ClassVar[int]
    produces: bool
    consumes: bool
    def __init__(self, produces: bool = ..., consumes: bool = ...) -> None: ...

class OrdersRequest(_message.Message):
    __slots__ = ("session", "role", "ceiling")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    session: int
    role: Role
    ceiling: Role
    def __init__(self, session: _Optional[int] = ..., role: _Optional[_Union[Role, _Mapping]] = ..., ceiling: _Optional[_Union[Role, _Mapping]] = ...) -> None: ...

class OrdersReply(_message.Message):
    __slots__ = ("order", "role")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    order: int
    role: Role
    def __init__(self, order: _Optional[int] = ..., role: _Optional[_Union[Role, _Mapping]] = ...) -> None: ...

class ObeyRequest(_message.Message):
    __slots__ = ("session", "order", "role")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    session: int
    order: int
    role: Role
    def __init__(self, session: _Optional[int] = ..., order: _Optional[int] = ..., role: _Optional[_Union[Role, _Mapping]] = ...) -> None: ...

class ObeyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "bytes_total", "bytes_ready", "bytes_used", "slots", "slots_free", "slots_filling", "slots_committed", "slots_copying", "slots_quarantined", "up", "note", "medium")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_READY_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FILLING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_COPYING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    bytes_total: int
    bytes_ready: int
    bytes_used: int
    slots: int
    slots_free: int
    slots_filling: int
    slots_committed: int
    slots_copying: int
    slots_quarantined: int
    up: bool
    note: str
    medium: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., bytes_total: _Optional[int] = ..., bytes_ready: _Optional[int] = ..., bytes_used: _Optional[int] = ..., slots: _Optional[int] = ..., slots_free: _Optional[int] = ..., slots_filling: _Optional[int] = ..., slots_committed: _Optional[int] = ..., slots_copying: _Optional[int] = ..., slots_quarantined: _Optional[int] = ..., up: bool = ..., note: _Optional[str] = ..., medium: _Optional[str] = ...) -> None: ...

class SessionStats(_message.Message):
    __slots__ = ("session", "client_name", "tenant", "clients", "reservations", "leases", "idle_ms", "transports", "role", "ceiling")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    session: int
    client_name: str
    tenant: str
    clients: int
    reservations: int
    leases: int
    idle_ms: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    role: Role
    ceiling: Role
    def __init__(self, session: _Optional[int] = ..., client_name: _Optional[str] = ..., tenant: _Optional[str] = ..., clients: _Optional[int] = ..., reservations: _Optional[int] = ..., leases: _Optional[int] = ..., idle_ms: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., role: _Optional[_Union[Role, _Mapping]] = ..., ceiling: _Optional[_Union[Role, _Mapping]] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("namespace_id", "spec", "blocks", "bytes", "hits", "misses", "near_misses")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    NEAR_MISSES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    spec: NamespaceSpec
    blocks: int
    bytes: int
    hits: int
    misses: int
    near_misses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace_id: _Optional[bytes] = ..., spec: _Optional[_Union[NamespaceSpec, _Mapping]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., near_misses: _Optional[_Iterable[str]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("server_version", "epoch", "uptime_ms", "draining", "tiers", "sessions", "counters", "blocks", "blocks_filling", "blocks_announced", "spill_queue_bytes", "namespaces", "native")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FILLING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    SPILL_QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NATIVE_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    epoch: int
    uptime_ms: int
    draining: bool
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStats]
    counters: _containers.ScalarMap[str, int]
    blocks: int
    blocks_filling: int
    blocks_announced: int
    spill_queue_bytes: int
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    native: bool
    def __init__(self, server_version: _Optional[str] = ..., epoch: _Optional[int] = ..., uptime_ms: _Optional[int] = ..., draining: bool = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., sessions: _Optional[_Iterable[_Union[SessionStats, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., blocks: _Optional[int] = ..., blocks_filling: _Optional[int] = ..., blocks_announced: _Optional[int] = ..., spill_queue_bytes: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., native: bool = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNamespacesReply(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    hashes: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("blocks", "bytes", "in_use")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    in_use: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., in_use: _Optional[int] = ...) -> None: ...

class DropNamespaceRequest(_message.Message):
    __slots__ = ("namespace_id",)
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ...) -> None: ...

class DropNamespaceReply(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("engine", "produces", "consumes", "deadline_ms")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PRODUCES_FIELD_NUMBER: _ClassVar[int]
    CONSUMES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    engine: str
    produces: bool
    consumes: bool
    deadline_ms: int
    def __init__(self, engine: _Optional[str] = ..., produces: bool = ..., consumes: bool = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class SetRoleReply(_message.Message):
    __slots__ = ("engine", "role", "ceiling")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    engine: str
    role: Role
    ceiling: Role
    def __init__(self, engine: _Optional[str] = ..., role: _Optional[_Union[Role, _Mapping]] = ..., ceiling: _Optional[_Union[Role, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: bool = ...) -> None: ...
