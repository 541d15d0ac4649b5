"""How fast the engine is: counts and recent rates of its steps. The clock is the caller's."""

from __future__ import annotations

from math import exp

_SMOOTHING = 0.1  # weight of the newest step
_MEMORY_TOKENS = 2048  # of the rate of prefill: a step weighs as much as it computes


class Meter:
    """Counts and seconds since the start, and rates as moving averages.

    A rate takes a step for what most of its tokens were; seconds are shared out by the tokens of either kind.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0
        self.step_s = 0.0

    @property
    def prefill_s_per_token(self) -> float | None:
        """None before the first prefill."""
        return 1.0 / self.prefill_tokens_per_s if self.prefill_tokens_per_s else None

    def expected_s(self, num_prefill_tokens: int, num_decode_tokens: int) -> float:
        """What these tokens take at the rates so far; nothing where there is none yet."""
        prefill_s = num_prefill_tokens * (self.prefill_s_per_token or 0.0)
        return prefill_s + (num_decode_tokens / self.decode_tokens_per_s if self.decode_tokens_per_s else 0.0)

    def record(self, num_prefill_tokens: int, num_decode_tokens: int, duration_s: float) -> None:
        self.num_steps += 1
        self.num_prefill_tokens += num_prefill_tokens
        self.num_decode_tokens += num_decode_tokens
        duration_s = max(duration_s, 1e-9)
        self.step_s = _smooth(self.step_s, duration_s)
        prefill_s = duration_s * num_prefill_tokens / max(1, num_prefill_tokens + num_decode_tokens)
        self.prefill_s += prefill_s
        self.decode_s += duration_s - prefill_s
        if num_prefill_tokens > num_decode_tokens:
            self._record_prefill(num_prefill_tokens, duration_s)
        else:
            self.decode_tokens_per_s = _smooth(self.decode_tokens_per_s, num_decode_tokens / duration_s)

    def _record_prefill(self, num_tokens: int, duration_s: float) -> None:
        """A step of few tokens takes longer for each, and says little of what a long one will take."""
        new_s = duration_s / num_tokens
        old_s = self.prefill_s_per_token
        weight = 1.0 - exp(-num_tokens / _MEMORY_TOKENS)
        self.prefill_tokens_per_s = 1.0 / (new_s if old_s is None else old_s + weight * (new_s - old_s))


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
