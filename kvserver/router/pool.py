"""Which engine is next. Pure: the clock is an argument.

    up ── a request or a probe fails ──▶ down, left alone until `retry_at`
    down ── a probe at or after `retry_at` succeeds ──▶ up

Rule 1: the engine with the fewest requests outstanding is next; among equals it goes round.
Rule 2: each failure in a row doubles the pause, up to a cap. Only a request that succeeds ends the
row: an engine whose /health is well and whose requests fail is asked ever more rarely.
Rule 3: failures while an engine is down are of the same fall and count once; failed probes, which
come one after another, count each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Engine:
    """One engine as the pool sees it. Only the pool changes it."""

    def __init__(self, url: str, order: int) -> None:
        self.url = url
        self.up = True
        self.outstanding = 0
        self.failures = 0
        self.retry_at = 0.0
        self.turn = order

    def __repr__(self) -> str:
        return f"Engine({self.url}, {'up' if self.up else 'down'})"


class Pool:
    """The engines of one leg."""

    def __init__(self, urls: Sequence[str], *, backoff_s: float, backoff_s_max: float) -> None:
        self.engines = tuple(Engine(url, order) for order, url in enumerate(urls))
        self._backoff_s = backoff_s
        self._backoff_s_max = backoff_s_max
        self._turns = len(urls)

    def choose(self, *, besides: Collection[Engine] = (), desperate: bool = False) -> Engine | None:
        """The next engine, with one request more; `done` takes it back. None when none is up,
        unless `desperate`: then the one that may be tried soonest."""
        left = [engine for engine in self.engines if engine not in besides]
        ready = [engine for engine in left if engine.up]
        if ready:
            chosen = min(ready, key=lambda engine: (engine.outstanding, engine.turn))
        elif left and desperate:
            chosen = min(left, key=lambda engine: engine.retry_at)
        else:
            return None
        self._turns += 1
        chosen.turn = self._turns
        chosen.outstanding += 1
        return chosen

    def has_up(self, *, besides: Collection[Engine] = ()) -> bool:
        return any(engine.up and engine not in besides for engine in self.engines)

    def done(self, engine: Engine) -> None:
        """A request that `choose` gave to it has ended, in whatever way."""
        assert engine.outstanding > 0, engine
        engine.outstanding -= 1

    def succeeded(self, engine: Engine) -> bool:
        """A request succeeded; true when that brought the engine up."""
        engine.failures = 0
        was_down, engine.up = not engine.up, True
        return was_down

    def failed(self, engine: Engine, now: float) -> bool:
        """A request failed by the engine's fault; true when that took it down."""
        if not engine.up:
            return False
        self._pause(engine, now)
        return True

    def probed(self, engine: Engine, now: float, *, well: bool) -> bool:
        """What /health said; true when that changed the engine's state."""
        was_up = engine.up
        if not well and (was_up or now >= engine.retry_at):
            self._pause(engine, now)
        elif well and now >= engine.retry_at:
            engine.up = True
        return was_up != engine.up

    def probe_in_s(self, engine: Engine, now: float, interval_s: float) -> float:
        """Seconds until /health should be asked."""
        return interval_s if engine.up else min(interval_s, max(engine.retry_at - now, 0.0))

    def _pause(self, engine: Engine, now: float) -> None:
        doubled = self._backoff_s * 2 ** min(engine.failures, 32)
        engine.failures += 1
        engine.up = False
        engine.retry_at = now + min(doubled, self._backoff_s_max)
