"""How tokens are chosen, as asked, and what was chosen: values that travel between processes.

Light on purpose: clients and the actors that only pass turns on import this file, and no torch with it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a turn's tokens are chosen and when it must end. Checked at the door."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens (and ties with the last of them); 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less likely; 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has already; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken off once for every time the answer has the token; 0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    seed: int | None = None
    """The same seed draws the same tokens; None takes the row's fallback seed."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end tokens."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """No end token (eos, unless ignored, and stop_token_ids) is chosen before this many."""
    logprobs: int | None = None
    """None is off, 0 the chosen token's log-probability, n those of the n likeliest as well."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 0.7 is usual")
        _check_number("top_p", self.top_p, 0.0, 1.0, "1 switches it off")
        _check_number("min_p", self.min_p, 0.0, 1.0, "0 switches it off")
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 switches it off")
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 switches it off")
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 switches it off")
        for token_id, bias in self.logit_bias:
            _check_count("a token id in logit_bias", token_id, 0, "ids are the tokenizer's")
            _check_number("a bias in logit_bias", bias, -100.0, 100.0, "-100 all but bans a token")
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise ValueError("top_p and repetition_penalty must be above 0; 1 switches them off")
        _check_count("top_k", self.top_k, 0, "0 switches it off")
        _check_count("max_new_tokens", self.max_new_tokens, 1, "a turn generates at least one token")
        _check_count("min_new_tokens", self.min_new_tokens, 0, "0 switches it off")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens}): lower the one"
                " or raise the other"
            )
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, "None switches it off, 0 gives the chosen token only")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed must be a whole number or None, not {self.seed!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")
        ids = self.stop_token_ids
        if not isinstance(ids, tuple) or not all(isinstance(t, int) and t >= 0 for t in ids):
            raise ValueError(f"stop_token_ids must be a tuple of token ids, not {ids!r}")


def _check_number(name: str, value: float, low: float, high: float, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r} ({advice})")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value!r} ({advice})")


def _check_count(name: str, value: int, low: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, not {value!r} ({advice})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """One chosen token. `top_logprobs` are (token id, log-probability), likeliest first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def seed_of(turn_id: str) -> int:
    """A seed for turns without one: as different as their ids, and the same again when a turn is tried again."""
    return int.from_bytes(hashlib.sha256(turn_id.encode()).digest()[:8], "big")
