"""Straight between the engine's pages and the hub, without staging (setting `direct`, nixl).

Rules:
  1. Pages that a transfer may still touch are not reported as let go of, nor is a load that reads
     into them: no deadline frees them, only the hub's word or its successor's. See
     `kvclient.transfer.direct`.
  2. A block goes this way if each of its pages is one piece of the engine's memory and all of them
     count: neither a page that is to be left alone, nor a tail whose last page must be zeroed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvclient import Scattered
from kvclient.staging import aligned
from kvserver_vllm.layout import Bytes
from kvserver_vllm.messages import BlockPages
from kvserver_vllm.rank import Rank, RankSection


class Direct:
    """The direct way of one rank, in one section."""

    def __init__(self, rank: Rank, section: RankSection) -> None:
        self._rank = rank
        self.section = section
        self._scratch = threading.local()

    @property
    def on(self) -> bool:
        """Whether the connection of now moves registered pages."""
        return self._rank.settings.direct and self._rank.link.direct

    def place(self, block: BlockPages, layer: int, stop: int) -> Scattered | None:
        """Layers [layer, stop) of a block, where they lie; None for a block that is staged."""
        pages, form = self.section.pages, self.section.pages.format
        if not self.section.whole(block.pages) or block.tokens % form.page_tokens:
            return None
        addresses = pages.addresses(layer, stop, block.pages)
        if addresses is None:
            return None

        def read(first: int, last: int) -> Bytes:
            cells = self._room(last - first, pages.count(block.pages))
            pages.gather(layer + first, layer + last, block.pages, cells)
            return cells.reshape(last - first, pages.heads, -1)

        return Scattered(addresses, form.page_bytes, read)

    def _room(self, layers: int, count: int) -> Bytes:
        """Memory to hash in, this thread's own until the next call: fresh memory is slow."""
        pages = self.section.pages
        shape = (layers, pages.heads, count, pages.format.page_bytes)
        size = int(np.prod(shape))
        kept: Bytes | None = getattr(self._scratch, "kept", None)
        if kept is None or kept.size < size:
            kept = self._scratch.kept = aligned(size)
        return kept[:size].reshape(shape)

    async def quiet(self, blocks: Sequence[BlockPages]) -> None:
        """Return when no transfer can touch these blocks' pages any more, however long that is."""
        if not self._rank.settings.direct:
            return
        layers = self.section.pages.layers
        places = [place for block in blocks if (place := self.place(block, 0, layers)) is not None]
        pin = self._rank.link.pin(places)
        if pin.done:
            return
        self._rank.count("pinned")
        self._rank.log.write("pinned", bytes=pin.nbytes)
        await pin.settled()
        self._rank.log.write("unpinned", bytes=pin.nbytes)
