"""KVServerConnector: vLLM's connector interface, dispatched to the two halves.

One instance lives in the scheduler, one in each worker. Nothing is decided here; scheduler.py and
worker.py hold the rules, identity.py says which engines are served.

How a namespace comes about: each rank publishes what it holds (`get_handshake_metadata`), the
scheduler's instance joins that with the weights' fingerprint, which a thread works out, and from
then on sends the namespace along with its orders.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from kvclient import Role
from kvproto.namespace import NamespaceSpec
from kvserver_vllm.config import Settings
from kvserver_vllm.cores import binds, cores_of
from kvserver_vllm.device import DEVICES
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.events import EventLog
from kvserver_vllm.figures import Figures, PromFigures
from kvserver_vllm.fingerprint import cache_path, fingerprint, process_start
from kvserver_vllm.identity import (
    Adapters,
    build_spec,
    changed_weights,
    replicas,
    require_supported,
    weights_path,
)
from kvserver_vllm.layout import has_tails
from kvserver_vllm.link import HubLink
from kvserver_vllm.marks import marks_of
from kvserver_vllm.messages import RankHolds, RankReport, Section, StepMeta
from kvserver_vllm.scheduler import SchedulerHalf
from kvserver_vllm.sections import (
    by_section,
    hold,
    section_attribute,
    section_of,
    state_dtypes,
)
from kvserver_vllm.worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.kvserver")

SCHEDULER = KVConnectorRole.SCHEDULER
LAYOUT = "LBHNC"
EPOCH_BYTES = 16


class KVServerConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Pushes computed KV to a kvserver hub and loads what the hub has."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """UnsupportedError or ConfigError, naming what it is, when this engine cannot be served."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = Settings.parse(transfer.kv_connector_extra_config)
        require_supported(vllm.__version__, vllm_config, kv_cache_config)
        name = f"vllm-{transfer.engine_id}"[:120]
        rank = {"rank": int(vllm_config.parallel_config.rank)} if role != SCHEDULER else {}
        self._log = EventLog(self._settings.event_log, engine=transfer.engine_id, **rank)
        self._link = HubLink.shared(
            self._settings.address,
            tenant=self._settings.tenant,
            name=name,
            lookup_s=max(self._settings.lookup_ms, 1) / 1e3,
            log=self._log,
            reach=self._settings.reach(),
            cores=cores_of(self._settings.cores, bound=role != SCHEDULER and binds(vllm_config)),
        )
        # What kv_role allows; an operator's orders stay within it.
        self._loads = bool(transfer.is_kv_consumer)
        self._saves = bool(transfer.is_kv_producer and self._settings.push)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._holds: RankHolds | None = None
        self._ranks: dict[tuple[int, int], RankHolds] = {}
        self._weights = b""
        self._digests = cache_path(self._settings.cache_dir)
        self._epoch = ""
        self._closed = False
        if role == SCHEDULER:
            self._scheduler = self._scheduler_half()
            self._link.follow(Role(produces=self._saves, consumes=self._loads), self._obey)
            if transfer.kv_load_failure_policy != "recompute":
                logger.warning(
                    "kvserver: kv_load_failure_policy is %r: a request whose load fails ends with "
                    "an error; set it to 'recompute'",
                    transfer.kv_load_failure_policy,
                )

    def _scheduler_half(self) -> SchedulerHalf:
        config = self._vllm_config
        return SchedulerHalf(
            self._settings,
            self._link,
            self._log,
            group_tokens=self._group_tokens(),
            ranks=int(config.parallel_config.world_size),
            loads=self._loads,
            saves=self._saves,
            prefix_caching=bool(config.cache_config.enable_prefix_caching),
            adapter_digest=Adapters(self._digests).digest,
        )

    def _obey(self, role: Role) -> None:
        """An operator's order; on the link's thread."""
        logger.info("kvserver: told to %s", role)
        self._scheduling().obey(loads=role.consumes, saves=role.produces)
        self._log.write("role", produces=role.produces, consumes=role.consumes)

    def _group_tokens(self) -> list[int]:
        """Tokens of a block of each KV cache group."""
        groups = self._kv_cache_config.kv_cache_groups
        return [int(group.kv_cache_spec.block_size) for group in groups]

    # ---- both roles --------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a dropped save is a later miss."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return LAYOUT

    def get_kv_connector_stats(self) -> Figures | None:
        half = self._scheduler or self._worker
        return half.figures.take() if half is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Figures:
        return Figures(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromFigures:
        return PromFigures(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Only where the configuration says so: vLLM's default runs prefills piecewise already, and
        a decode engine keeps its full graphs."""
        return extra_config.get("layerwise_push") is True

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            if self._worker is not None:
                self._worker.close()
            self._link.close()

    # ---- worker role -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config, parallel = self._vllm_config, self._vllm_config.parallel_config
        devices = {tensor.device for tensor in kv_caches.values()}
        for device in devices:
            if device.type not in DEVICES:
                raise UnsupportedError(f"KV cache on {device.type}, not on {' or '.join(DEVICES)}")
        stage, tp_rank = divmod(int(parallel.rank), int(parallel.tensor_parallel_size))
        stage %= int(parallel.pipeline_parallel_size)
        sections, self._holds = hold(
            config, self._kv_cache_config, kv_caches, tp_rank, self._settings.block_tokens
        )
        if self._settings.direct:
            for section in sections:
                self._link.register(section.pages.memory)
            if not all(section.pages.format.in_one_piece for section in sections):
                logger.warning("kvserver: direct is set, but pages lie in pieces: they are staged")
        self._worker = WorkerHalf(
            self._settings,
            self._link,
            self._log,
            sections,
            stage=stage,
            pushes=tp_rank % replicas(config) == 0,
            group_tokens=self._group_tokens(),
            rank=int(parallel.rank),
            marks=marks_of(devices, self._link.post),
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._holds

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        self._half().bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._half().start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a scheduled request's blocks are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._half().layer_saved(layer_name)

    def wait_for_save(self) -> None:
        self._half().step_saved()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._half().take_received()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        half = self._half()
        return KVConnectorTransferResults(
            finished_recving=half.take_received(), failed_recving=half.take_lost()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._half().take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._half().take_report()

    def _half(self) -> WorkerHalf:
        assert self._worker is not None, "register_kv_caches comes first"
        return self._worker

    # ---- scheduler role ----------------------------------------------------------------------

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, r): m for r, m in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """What the ranks hold. Errors in it stop the engine's start; weights are digested after."""
        self._ranks = {rank: held for rank, held in metadata.items() if isinstance(held, RankHolds)}
        self._sections(bytes(32))
        threading.Thread(target=self._open, name="kvserver-fingerprint", daemon=True).start()

    def _sections(self, weights: bytes) -> list[tuple[NamespaceSpec, Section]]:
        held = by_section(self._ranks)
        states = state_dtypes(held)
        attributes = self._ranks[min(self._ranks)].attributes
        found = []
        for ranks in held:
            spec = build_spec(
                self._vllm_config,
                ranks,
                weights,
                tenant=self._settings.tenant,
                block_tokens=self._settings.block_tokens,
                epoch=self._epoch,
                section=section_attribute(ranks, len(held), states),
                attributes=attributes,
            )
            found.append((spec, section_of(spec, ranks)))
        return found

    def _open(self) -> None:
        """Digest the weights, then let the scheduler half begin."""
        try:
            if not self._weights:
                self._weights = fingerprint(weights_path(self._vllm_config), self._digests)
                self._doubt_weights()
            found = self._sections(self._weights)
            sections = [section for _, section in found]
            self._scheduling().open(
                sections,
                found[0][0].page_tokens,
                tails=all(has_tails(spec.encoding) for spec, _ in found),
            )
            self._link.submit(self._link.greet([section.spec for section in sections]))
        except Exception:
            logger.exception("kvserver: no fingerprint of the weights; serving without the hub")

    def _doubt_weights(self) -> None:
        """Share with nobody when others than the digested weights may have been loaded."""
        changed = changed_weights(self._vllm_config, process_start())
        if changed is not None:
            self._epoch = os.urandom(EPOCH_BYTES).hex()
            logger.warning(
                "kvserver: %s changed after this engine began to load; it shares its KV with "
                "nobody until it is restarted",
                changed,
            )

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._scheduling().bind_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._scheduling().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduling().matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        tables = blocks.get_block_ids() if num_external_tokens else ()
        self._scheduling().after_alloc(request, tables, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._scheduling().build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        self._scheduling().ranks_reported(
            report if isinstance(report, RankReport) else None,
            connector_output.finished_recving or set(),
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        whole = request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        return False, self._scheduling().finished(request, whole=whole, tables=block_ids)

    def has_pending_push_work(self) -> bool:
        return self._scheduling().has_pending_work

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[Any, int]:
        """Tokens by the hub's tier; vLLM 0.32 and later ask."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        sources = {2: CacheHitSource.HOST, 3: CacheHitSource.DISK}
        counts: dict[Any, int] = {}
        for tier, tokens in self._scheduling().tiers_of(request).items():
            source = sources.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            counts[source] = counts.get(source, 0) + tokens
        return counts

    def take_events(self) -> Iterable[Any]:
        return ()

    def reset_cache(self) -> bool | None:
        """Leave what this engine has stored so far behind: a namespace of its own from now on.

        Nothing is deleted at the hub, and no other engine is affected. The new namespace is
        shared with nobody: after weights were changed in place, only this engine knows what it
        computes.
        """
        self._epoch = os.urandom(EPOCH_BYTES).hex()
        self._scheduling().forget()
        if self._ranks and self._weights:
            self._open()
        return True

    def _scheduling(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler
