"""What the agent of `nixl` is given at once: pieces of memory on both sides, cut into Posts.

Rule 1: pure arithmetic on addresses.
Rule 2: over CMA a post is copied before it returns, and nobody else's turn comes meanwhile, so it
has at most POST_BYTES. A longer piece is cut; shorter ones share a post.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import Descriptors

POST_BYTES = 8 << 20
POST_DESCRIPTORS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Post:
    """Equal numbers of local and remote descriptors (address, bytes, device), of these items."""

    local: Descriptors
    remote: Descriptors
    items: tuple[int, ...]
    nbytes: int


def cut(
    local: npt.NDArray[np.uint64], remote: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64],
    items: npt.NDArray[np.int64], *, device: int, post_bytes: int = POST_BYTES,
) -> list[Post]:  # fmt: skip
    """Posts for pieces [n] of memory: `local[i]` and `remote[i]` are addresses, `items[i]` says
    whose piece it is. Longer pieces are cut."""
    parts = ((lengths + np.uint64(post_bytes - 1)) // np.uint64(post_bytes)).astype(np.int64)
    if int(parts.max(initial=1)) > 1:
        which = np.repeat(np.arange(len(parts)), parts)
        nth = (np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64)
        start = nth * np.uint64(post_bytes)
        lengths = np.minimum(lengths[which] - start, np.uint64(post_bytes))
        local, remote, items = local[which] + start, remote[which] + start, items[which]
    posts: list[Post] = []
    ends = np.cumsum(lengths)
    at, before = 0, 0
    while at < len(lengths):
        stop = int(np.searchsorted(ends, np.uint64(before + post_bytes), side="right"))
        stop = min(max(stop, at + 1), at + POST_DESCRIPTORS_MAX)
        part = slice(at, stop)
        count = stop - at
        ours, theirs = np.zeros((count, 3), np.uint64), np.zeros((count, 3), np.uint64)
        ours[:, 0], ours[:, 1] = local[part], lengths[part]
        theirs[:, 0], theirs[:, 1], theirs[:, 2] = remote[part], lengths[part], device
        of, end = tuple(dict.fromkeys(items[part].tolist())), int(ends[stop - 1])
        posts.append(Post(ours, theirs, of, nbytes=end - before))
        at, before = stop, end
    return posts
