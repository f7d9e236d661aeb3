"""Frames between the hub and its nixl worker, however a stream cuts them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvserver.transfer.nixl.messages import (
    Attach,
    Attached,
    End,
    Ended,
    Frames,
    Kind,
    Totals,
    frame,
    number_of,
    of_number,
)

FRAMES = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=50)), max_size=8)


@given(FRAMES, st.data())
def test_frames_come_whole_and_in_order(
    sent: list[tuple[Kind, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frame(kind, payload) for kind, payload in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames, came = Frames(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        came += frames.feed(stream[start:stop])
    assert came == sent


def test_what_is_said_is_what_is_heard() -> None:
    attach = Attach(7, 3, "kvclient-\u00e9-", b"meta\0data")
    assert Attach.decode(attach.encode()) == attach
    for reason in ("", "refused: \u00e9"):
        assert Attached.decode(Attached(1 << 40, reason).encode()) == (1 << 40, reason)
    outcomes = np.array([Ended.OK, Ended.CORRUPT, Ended.STALE], np.uint8)
    end = End.decode(End(5, Totals(1, 2, 3, 1 << 50), outcomes).encode())
    assert (end.number, end.totals) == (5, (1, 2, 3, 1 << 50))
    assert end.outcomes.tolist() == outcomes.tolist()
    assert number_of(of_number((1 << 64) - 1)) == (1 << 64) - 1
