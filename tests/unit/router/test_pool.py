"""Who is next, who is left alone and for how long."""

from __future__ import annotations

import random

from kvserver.router.pool import Engine, Pool


def pool(count: int = 3) -> Pool:
    return Pool([f"e{i}" for i in range(count)], backoff_s=1.0, backoff_s_max=5.0)


def take(pool: Pool) -> Engine:
    engine = pool.choose()
    assert engine is not None
    return engine


def test_equals_go_round() -> None:
    three = pool()
    taken = []
    for _ in range(6):
        engine = take(three)
        taken.append(engine.url)
        three.done(engine)
    assert taken == ["e0", "e1", "e2"] * 2


def test_the_least_loaded_is_next() -> None:
    three = pool()
    first, second, third = (take(three) for _ in range(3))
    three.done(second)
    assert take(three) is second
    three.done(third)
    three.done(first)
    three.done(second)
    assert take(three) is first  # as idle as the others, and longest without a turn


def test_load_stays_level_whatever_the_order() -> None:
    four, running, lots = pool(4), [], random.Random(3)
    for _ in range(500):
        if running and lots.random() < 0.45:
            four.done(running.pop(lots.randrange(len(running))))
        else:
            running.append(take(four))
        assert sum(e.outstanding for e in four.engines) == len(running)
    while len(running) < 100:
        running.append(take(four))
    loads = [e.outstanding for e in four.engines]
    assert max(loads) - min(loads) <= 1


def test_one_that_failed_is_left_alone_until_a_probe_says_well() -> None:
    two = pool(2)
    bad = two.engines[0]
    assert two.failed(bad, 10.0)
    assert {take(two).url for _ in range(4)} == {"e1"}
    assert two.probe_in_s(bad, 10.0, 2.0) == 1.0
    assert not two.probed(bad, 10.5, well=True)  # too early: its pause is not over
    assert not bad.up
    assert two.probed(bad, 11.0, well=True)
    assert take(two) is bad


def test_the_pause_doubles_up_to_its_cap() -> None:
    one = pool(1)
    (bad,) = one.engines
    one.failed(bad, 0.0)
    pauses, now = [], 0.0
    for _ in range(6):
        pauses.append(bad.retry_at - now)
        now = bad.retry_at
        one.probed(bad, now, well=False)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_failures_of_one_fall_count_once() -> None:
    one = pool(1)
    (bad,) = one.engines
    assert one.failed(bad, 0.0)
    assert not any(one.failed(bad, 0.0) for _ in range(100))
    assert bad.retry_at == 1.0


def test_health_alone_does_not_end_a_row_of_failures() -> None:
    one = pool(1)
    (bad,) = one.engines
    now = 0.0
    for pause in (1.0, 2.0, 4.0, 5.0):
        one.failed(bad, now)
        assert bad.retry_at == now + pause
        now = bad.retry_at
        assert one.probed(bad, now, well=True)
    one.succeeded(bad)
    one.failed(bad, now)
    assert bad.retry_at == now + 1.0


def test_a_failed_probe_takes_an_engine_down_before_a_request_finds_out() -> None:
    two = pool(2)
    assert two.probed(two.engines[1], 0.0, well=False)
    assert {take(two).url for _ in range(3)} == {"e0"}


def test_those_that_were_tried_are_not_tried_again() -> None:
    three = pool()
    tried: list[Engine] = []
    while (engine := three.choose(besides=tried)) is not None:
        tried.append(engine)
    assert len(tried) == 3


def test_when_all_are_down_the_desperate_get_the_one_that_is_due_first() -> None:
    three = pool()
    for engine, now in zip(three.engines, (2.0, 1.0, 3.0), strict=True):
        three.failed(engine, now)
    assert three.choose() is None
    assert not three.has_up()
    chosen = three.choose(desperate=True)
    assert chosen is three.engines[1]
    assert three.succeeded(chosen)
    assert three.has_up()
    assert not three.has_up(besides=[chosen])
