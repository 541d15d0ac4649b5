"""How fast the engine is: counts and recent rates of its steps. The clock is the caller's."""

from __future__ import annotations

_SMOOTHING = 0.1  # weight of the newest step


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
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, num_prefill_tokens / duration_s)
        else:
            self.decode_tokens_per_s = _smooth(self.decode_tokens_per_s, num_decode_tokens / duration_s)


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
