"""Blocks in columns are the blocks that they were made of, in less room."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import BlockPages, SaveJob, StepMeta
from kvserver_vllm.runs import Blocks, Run, jobs_of

WIDTH, TOKENS, TAIL = 4, 128, 70
ROOT = bytes(32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def blocks(
    count: int, *, tail: bool = False, first: int = 1, request: str = "cmpl-7-0-9f3c2a1b"
) -> list[BlockPages]:
    found = []
    for at in range(first, first + count):
        pages = [at * WIDTH + n for n in range(WIDTH)]
        if at == first:
            pages[:2] = SKIP, SKIP
        parent = key(at - 1) if at > 1 else ROOT
        found.append(BlockPages(key(at), parent, tuple(pages), request, TOKENS))
    if tail:
        found[-1] = found[-1]._replace(pages=found[-1].pages[:3], tokens=TAIL)
    return found


def run(of: Sequence[BlockPages]) -> Run:
    return Run(
        of[0].request,
        of[0].parent,
        [block.hash for block in of],
        [page for block in of for page in block.pages],
        WIDTH,
        TOKENS,
        of[-1].tokens,
    )


@pytest.mark.parametrize("tail", [False, True])
def test_a_run_is_its_blocks(tail: bool) -> None:
    made = blocks(5, tail=tail)
    assert list(run(made).blocks()) == made
    assert list(run(made).cut(1, 3).blocks()) == made[1:3]
    assert list(run(made).cut(3, 5).blocks()) == made[3:]
    chosen = run(made).stretches(lambda at: at not in (0, 2))
    assert [list(part.blocks()) for part in chosen] == [made[1:2], made[3:]]
    assert run(made).stretches(lambda at: False) == []


@pytest.mark.parametrize("first", [1, 20_000])
def test_another_process_gets_the_same_blocks(first: int) -> None:
    """With page ids of two bytes and of four."""
    made = [blocks(3, first=first), blocks(2, tail=True, first=first + 9, request="other")]
    sent = Blocks([run(part) for part in made])
    for got in (sent, pickle.loads(pickle.dumps(sent)), pickle.loads(pickle.dumps(sent))):
        again = pickle.loads(pickle.dumps(got))
        assert len(got) == len(again) == 5
        assert list(got) == list(again) == [*made[0], *made[1]]
        assert got[-1] == made[1][-1]
        assert got[1:3] == made[0][1:3]
        assert list(pickle.loads(pickle.dumps(got))) == list(got)


@pytest.mark.parametrize("first", [1, 200, 20_000])
@pytest.mark.parametrize("count", [1, 16, 62])
def test_what_goes_to_the_ranks_is_no_larger_than_a_list_of_blocks(count: int, first: int) -> None:
    made = blocks(count, first=first)

    def size(of: Sequence[BlockPages]) -> int:
        return len(pickle.dumps(StepMeta(saves=[SaveJob(1, of)]), pickle.HIGHEST_PROTOCOL))

    assert size(Blocks([run(made)])) <= size(tuple(made)) + 60
    if count >= 16:
        assert size(Blocks([run(made)])) < 0.8 * size(tuple(made))


def test_jobs_take_runs_in_order_and_cut_what_is_too_long() -> None:
    runs = [run(blocks(3)), run(blocks(7, tail=True, first=10)), run(blocks(1, first=30))]
    jobs = list(jobs_of(runs, 4))
    assert [len(Blocks(job)) for job in jobs] == [4, 4, 3]
    together = [block for job in jobs for block in Blocks(job)]
    assert together == [block for part in runs for block in part.blocks()]
    assert list(jobs_of([], 4)) == []
