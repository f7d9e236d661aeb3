"""Moving estimates: what prefilling so many tokens costs this engine, and what loading them does.

Rules:
  1. An estimate is None until something was measured; who asks decides what that means.
  2. Old measurements count less: each new one leaves `KEEP` of the weight of those before.
  3. A load costs a fixed part (steps of the engine, calls) and a part per token; both follow from a
     line through the measured loads. Where those are all of about one length, the line goes
     through the origin.
"""

from __future__ import annotations

KEEP = 0.9
PREFILL_TOKENS_MIN = 64
"""Steps with fewer tokens of prompts say nothing about prefilling: decoding outweighs them."""


class Line:
    """Seconds over tokens, fitted by least squares with forgetting."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._weight = KEEP * self._weight + 1.0
        self._tokens = KEEP * self._tokens + tokens
        self._seconds = KEEP * self._seconds + seconds
        self._squares = KEEP * self._squares + float(tokens) * tokens
        self._products = KEEP * self._products + tokens * seconds

    def at(self, tokens: int) -> float | None:
        """Estimated seconds of `tokens` tokens, at least 0."""
        if not self._tokens:
            return None
        spread = self._weight * self._squares - self._tokens**2
        if spread > 0.01 * self._tokens**2:
            slope = (self._weight * self._products - self._tokens * self._seconds) / spread
            base = (self._seconds - slope * self._tokens) / self._weight
            if slope >= 0.0 and base >= 0.0:
                return base + slope * tokens
        return self._seconds / self._tokens * tokens


class Pace:
    """Told of each step and each load; in seconds of the scheduler's clock."""

    def __init__(self) -> None:
        self._prefill = Line()
        self._load = Line()
        self._step: tuple[float, int] | None = None

    def step_begins(self, now: float, prompt_tokens: int) -> None:
        """A step that computes so many tokens of prompts goes to the ranks."""
        self._step = (now, prompt_tokens)

    def step_ends(self, now: float) -> None:
        """The ranks have reported the step."""
        if self._step is not None and self._step[1] >= PREFILL_TOKENS_MIN:
            self._prefill.add(self._step[1], now - self._step[0])
        self._step = None

    def loaded(self, tokens: int, seconds: float) -> None:
        """A load of so many tokens was ordered `seconds` ago and has arrived."""
        self._load.add(tokens, seconds)

    def prefill_s(self, tokens: int) -> float | None:
        return self._prefill.at(tokens)

    def load_s(self, tokens: int) -> float | None:
        return self._load.at(tokens)
