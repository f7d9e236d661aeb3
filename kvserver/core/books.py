"""The books that every part of the hub shares, and the few operations that keep them in step.

Rule 1: a slot becomes free, a residence is lost, a block leaves only through this module: so pins,
        fences, children counts, eviction offers, directory instructions and wake-ups cannot be
        forgotten.
Rule 2: nothing here starts new work. What became possible is only marked (`ready`, `room`); the
        hub carries on from there when the event has been handled.
Rule 3: every slot that becomes free has its directory entry or record made INVALID, with a new
        generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvproto.grid import Grid, Region
from kvproto.namespace import NamespaceSpec
from kvserver.core.blocks import COMPLETE, Action, BlockTable, History, bit
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Tier
from kvserver.core.eviction import EvictionPolicy, PrefixLru
from kvserver.core.instructions import Answer, BlockInfo, EntryInvalid, Instruction, Refusal
from kvserver.core.limits import HubConfig
from kvserver.core.quarantine import Quarantine
from kvserver.core.slabs import slot_class_bytes
from kvserver.core.slots import COMMITTED, QUARANTINED, SlotAction, SlotTable
from kvserver.core.timers import Timers

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK
_TIERS = (DEVICE, HOST, DISK)
_EVICTED = {tier: f"evicted_{tier.name.lower()}" for tier in Tier}
_MASKS_MAX = 256

COUNTERS = (
    "hits", "misses", "commits", "completed", "expired_reservations", "expired_leases",
    "expired_sessions", "lapsed_blocks", "quarantines", "reserve_no_space", "reserve_busy",
    "evicted_device", "evicted_host", "evicted_disk", "slabs_moved",
    "spills", "spill_failed", "spill_skipped", "promotions", "promotion_failed",
    "downloads", "uploads", "verifies", "corrupt_device", "corrupt_host", "corrupt_disk",
    "restored_host", "restored_disk", "restore_dropped", "restore_namespaces_dropped",
    "restore_quarantined", "near_misses",
    "streams", "streams_starved", "blocks_granted", "blocks_missing",
    "tails_expired", "tails_displaced",
)  # fmt: skip


@dataclass(eq=False, slots=True)
class Namespace:
    """A live namespace. `blocks` counts COMPLETE ones, `bytes` their slots on all tiers."""

    handle: int
    spec: NamespaceSpec
    grid: Grid
    near: list[str]
    blocks: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    sessions: set[int] = field(default_factory=set)
    masks: dict[Region, int] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)  # by tokens

    def mask(self, region: Region) -> int:
        """Bits of a region's cells; the region must have been checked."""
        mask = self.masks.get(region)
        if mask is None:
            if len(self.masks) >= _MASKS_MAX:
                self.masks.clear()
            mask = self.masks[region] = self.grid.mask(region)
        return mask

    def slot_bytes(self, tokens: int) -> int:
        """The size class of a block of so many tokens."""
        size = self.classes.get(tokens)
        if size is None:
            size = self.classes[tokens] = slot_class_bytes(self.grid.slot_bytes(tokens))
        return size


class Books:
    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self.now = 0.0  # on the hub's own clock, which does not run while the server stands still
        self.stamp = 1  # grows with each call that writes or uses blocks
        self.out: list[Instruction] = []
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.timers = Timers()
        self.history = History(config.history_max)
        self.blocks = BlockTable(self.history)
        sizes = {DEVICE: config.device_bytes, HOST: config.host_bytes, DISK: config.disk_bytes}
        self.slots: dict[Tier, SlotTable] = {
            tier: SlotTable(tier, size, 0 if tier == HOST else size) for tier, size in sizes.items()
        }
        self.host = self.slots[HOST]
        self.policy: dict[Tier, EvictionPolicy] = {
            tier: PrefixLru(self.blocks, table, config.eviction_scan_max)
            for tier, table in self.slots.items()
        }
        self.quarantine = Quarantine()
        self.namespaces: dict[int, Namespace] = {}
        self.up_bits = bit(DEVICE) | bit(HOST) | bit(DISK)
        self.before_leave: list[Callable[[int], None]] = []
        self.before_corrupt_host: list[Callable[[int], None]] = []
        self.host_left: list[Callable[[int], None]] = []  # a block has given its host slot up
        self.watchers: dict[int, dict[int, None]] = {}  # row -> streams that wait for it
        self.ready: dict[int, None] = {}  # streams to be looked at again
        self.room = False  # something became free or evictable
        # Of this event, for `residences`: blocks that moved, by namespace and key; None while
        # nobody watches. And namespaces that are forgotten.
        self.moved: dict[tuple[int, bytes], None] | None = None
        self.forgotten: list[NamespaceSpec] = []

    # ---- answers

    def answer(self, ticket: int, result: object = None) -> None:
        self.out.append(Answer(ticket, result))

    def refuse(self, ticket: int, error: CoreError) -> None:
        self.out.append(Refusal(ticket, error))

    def limit(self, name: str, count: int) -> None:
        """CoreError LIMIT when there are `count` already and the limit `name` allows no more."""
        allowed = getattr(self.config, name)
        if count >= allowed:
            raise CoreError(
                ErrorKind.LIMIT, f"{name} is {allowed} and reached", field=name, limit=allowed
            )

    def clamp(self, name: str, wanted: float) -> float:
        """A duration, at most what the limit `name` allows, which is also what 0 means."""
        allowed: float = getattr(self.config, name)
        return min(wanted, allowed) if wanted > 0 else allowed

    def info(self, row: int) -> BlockInfo:
        blocks = self.blocks
        return BlockInfo(
            blocks.namespace[row],
            blocks.keys[row],
            blocks.keys[blocks.parent[row]],
            blocks.tokens[row],
        )

    # ---- pins and slots

    def pin(self, tier: Tier, slot: int) -> None:
        self.slots[tier].pin(slot)

    def unpin(self, tier: Tier, slot: int) -> None:
        """Someone needs the slot's bytes no longer; the last one lets it be evicted or freed."""
        table = self.slots[tier]
        if not table.unpin(slot):
            return
        if table.state[slot] == COMMITTED:
            self.offer(tier, slot)
        elif table.state[slot] == QUARANTINED:
            self.unhold(tier, slot)

    def offer(self, tier: Tier, slot: int, *, front: bool = False) -> None:
        """A slot may have become evictable."""
        table = self.slots[tier]
        if table.evictable(slot):
            self.room = True
            if table.closing(slot):
                self.evict(tier, slot)
            else:
                self.policy[tier].offer(slot, front=front)

    def unhold(self, tier: Tier, slot: int) -> bool:
        """Free a quarantined slot if nobody touches it any more."""
        table = self.slots[tier]
        if table.state[slot] != QUARANTINED or table.pins[slot]:
            return False
        if tier == HOST and self.quarantine.holds(slot):
            return False
        self._free(tier, slot)
        return True

    def vacate(self, tier: Tier, slot: int) -> None:
        """A slot belongs to no block any more: free, or quarantined while someone touches it.

        What is only read on keeps its generation, so that its readers finish, but no restart may
        find the block again.
        """
        table = self.slots[tier]
        table.row[slot] = 0
        if table.pins[slot] or (tier == HOST and self.quarantine.holds(slot)):
            if tier != DEVICE and table.state[slot] == COMMITTED:
                self.out.append(EntryInvalid(table.place(slot)))
            table.move(slot, SlotAction.HOLD)
            self.counters["quarantines"] += 1
        else:
            self._free(tier, slot)

    def _free(self, tier: Tier, slot: int) -> None:
        table = self.slots[tier]
        table.next_generation(slot)
        if tier != DEVICE:
            self.out.append(EntryInvalid(table.place(slot)))
        table.give(slot)
        self.room = True

    # ---- residences and blocks

    def attach(self, row: int, tier: Tier, slot: int) -> None:
        self.blocks.attach(row, tier, slot)
        self.slots[tier].row[slot] = row

    def settle(self, row: int, tier: Tier) -> None:
        """The block's slot on a tier holds all of it."""
        blocks, table = self.blocks, self.slots[tier]
        slot = blocks.slot[tier][row]
        table.move(slot, SlotAction.COMPLETE)
        self.hold(row, tier, slot)

    def hold(self, row: int, tier: Tier, slot: int) -> None:
        """A COMMITTED slot counts as a residence of its block from now on."""
        self.blocks.resident[row] |= bit(tier)
        self.namespaces[self.blocks.namespace[row]].bytes += self.slots[tier].bytes_of(slot)
        self.note(row)
        self.offer(tier, slot)

    def note(self, row: int) -> None:
        """The block's residences change. Beyond `moved_max` only that there were more counts."""
        moved = self.moved
        if moved is not None and len(moved) <= self.config.moved_max:
            moved[self.blocks.namespace[row], self.blocks.keys[row]] = None

    def detach(self, row: int, tier: Tier) -> None:
        """The block gives its slot on a tier up; its parent may have become a leaf there."""
        blocks = self.blocks
        parent = blocks.parent[row]
        if blocks.resident[row] & bit(tier):
            slot_bytes = self.slots[tier].bytes_of(blocks.slot[tier][row])
            self.namespaces[blocks.namespace[row]].bytes -= slot_bytes
            self.note(row)
        self.vacate(tier, blocks.detach(row, tier))
        if tier == HOST:
            for hook in self.host_left:
                hook(row)
        self._leaf(row, parent, tier)

    def give_over(self, row: int, tier: Tier) -> int:
        """The block leaves its slot, which holds nothing yet, to another one. Returns the slot."""
        parent = self.blocks.parent[row]
        slot = self.blocks.detach(row, tier)
        self._leaf(row, parent, tier)
        return slot

    def _leaf(self, row: int, parent: int, tier: Tier) -> None:
        """A block has left a tier: its parent may have become a leaf there."""
        blocks = self.blocks
        if parent and not blocks.kids[tier][parent] and blocks.slot[tier][parent]:
            front = blocks.stamp[parent] <= blocks.stamp[row]
            self.offer(tier, blocks.slot[tier][parent], front=front)

    def evict(self, tier: Tier, slot: int) -> None:
        """Empty an evictable slot; a block that is nowhere else leaves the table."""
        self.counters[_EVICTED[tier]] += 1
        self.lose(self.slots[tier].row[slot], tier)

    def lose(self, row: int, tier: Tier) -> None:
        """A COMPLETE block is on this tier no longer."""
        if self.blocks.resident[row] == bit(tier):
            self.leave(row, Action.LOSE)
        else:
            self.detach(row, tier)
            self.wake(row)

    def corrupt(self, row: int, tier: Tier) -> None:
        """A block's bytes on this tier are wrong: readers find a new generation at once."""
        self.counters[f"corrupt_{tier.name.lower()}"] += 1
        table, slot = self.slots[tier], self.blocks.slot[tier][row]
        table.next_generation(slot)
        if tier != DEVICE:
            self.out.append(EntryInvalid(table.place(slot)))
        if tier == HOST:
            for hook in self.before_corrupt_host:
                hook(row)
        self.lose(row, tier)

    def leave(self, row: int, action: Action) -> None:
        """The block leaves the table, and all its slots."""
        blocks = self.blocks
        for hook in self.before_leave:
            hook(row)
        for tier in _TIERS:
            if blocks.slot[tier][row]:
                self.detach(row, tier)
        if blocks.state[row] == COMPLETE:
            self.namespaces[blocks.namespace[row]].blocks -= 1
        self.wake(row)
        blocks.move(row, action)
        blocks.release(row)

    # ---- wake-ups

    def watch(self, row: int, stream: int) -> None:
        self.watchers.setdefault(row, {})[stream] = None

    def wake(self, row: int) -> None:
        """Something happened to a block: the streams that wait for it look again."""
        streams = self.watchers.pop(row, None)
        if streams:
            self.ready.update(streams)
