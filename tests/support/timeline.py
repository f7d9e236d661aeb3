"""When a prompt's layers were computed and when they were at the hub, by a prefill engine's log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Timeline:
    """The last prompt of an event log, of one rank. Times are seconds of the log's clock."""

    chunks: int
    began: float
    """Its first chunk was scheduled."""
    ended: float
    """The last layer of its last chunk was computed."""
    early_share: float
    """Of the pushed cells, what was committed before that."""
    last_commit_s: float
    """From there to the last commit."""
    layer_s: float
    """Copying and committing one layer of one chunk, the median."""

    @classmethod
    def of(cls, events: Sequence[dict[str, Any]], layers: int) -> Timeline:
        """`layers` of the model."""
        steps = [e for e in events if e["event"] == "scheduled"]
        request = steps[-1]["request"]
        mine = [e for e in steps if e["request"] == request]
        began = mine[0]["t"]
        after = [e for e in events if e["t"] > began]
        commits = [e for e in after if e["event"] == "commit"]
        cells = [e["blocks"] * (e["layers"][1] - e["layers"][0]) for e in commits]
        hooks = [e["t"] for e in after if e["event"] == "save_layer" and e["layer"] == layers - 1]
        # Without hooks a chunk's pages are known to be ready when its first copy begins.
        copies = [e["t"] - e["ms"] / 1e3 for e in commits]
        ended = hooks[-1] if hooks else copies[-1]
        early = sum(n for n, e in zip(cells, commits, strict=True) if e["t"] < ended)
        single = [e["ms"] / 1e3 for e in commits if e["layers"][1] - e["layers"][0] == 1]
        return cls(
            chunks=len(mine),
            began=began,
            ended=ended,
            early_share=early / sum(cells),
            last_commit_s=max(e["t"] for e in commits) - ended,
            layer_s=median(single) if single else 0.0,
        )
