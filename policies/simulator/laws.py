"""Laws of chance that traces are made with, and checks of their parameters. Randomness is always an argument.

The figures of chat are those of ShareGPT as CachedAttention (USENIX ATC '24) and its published lengths have them:
5.75 turns a conversation in the mean, 27 % with one turn only, messages of some 50 tokens, answers of some 220.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

MESSAGE_TOKENS = (47.0, 1.08, 1500)
"""Of a user's message: median, sigma and maximum of a log-normal law."""
ANSWER_TOKENS = (217.0, 0.77, 1200)
"""Of an answer, likewise."""
SINGLE_SHARE = 0.27
"""Share of conversations that end after one turn."""


def length(chance: random.Random, median: float, sigma: float, maximum: int) -> int:
    """Log-normal, whole, between 1 and `maximum`."""
    return min(max(1, round(median * chance.lognormvariate(0.0, sigma))), maximum)


def message_tokens(chance: random.Random) -> int:
    return length(chance, *MESSAGE_TOKENS)


def answer_tokens(chance: random.Random) -> int:
    return length(chance, *ANSWER_TOKENS)


def num_turns(chance: random.Random, mean: float, maximum: int) -> int:
    """Turns of a conversation: one in SINGLE_SHARE of them, else geometric from two on, so that the mean is `mean`.

    A mean below 2 leaves no room for that; then it is geometric from one on.
    """
    if mean < 2:
        return min(geometric(chance, mean), maximum)
    if chance.random() < SINGLE_SHARE:
        return 1
    return min(1 + geometric(chance, (mean - SINGLE_SHARE) / (1 - SINGLE_SHARE) - 1), maximum)


def geometric(chance: random.Random, mean: float) -> int:
    """From 1 on, with this mean: after each one there is another with the same probability."""
    if mean <= 1:
        return 1
    return 1 + int(math.log(1.0 - chance.random()) / math.log1p(-1.0 / mean))


def pause_s(chance: random.Random, mean_s: float) -> float:
    """Exponential; 0 if the mean is."""
    return chance.expovariate(1.0 / mean_s) if mean_s > 0 else 0.0


def arrivals_s(chance: random.Random, count: int, per_s: float) -> Iterator[float]:
    """`count` arrivals of a Poisson process."""
    now = 0.0
    for _ in range(count):
        now += chance.expovariate(per_s)
        yield now


class Zipf:
    """Draws 0 … count-1, the k-th (from 1) with a probability proportional to 1 / k ** exponent."""

    def __init__(self, count: int, exponent: float) -> None:
        self._up_to = list(accumulate(1.0 / k**exponent for k in range(1, count + 1)))

    def draw(self, chance: random.Random) -> int:
        return bisect_left(self._up_to, chance.random() * self._up_to[-1])


# --- parameters -------------------------------------------------------------------------------------------------------


def at_least(minimum: float, **values: float) -> None:
    """ValueError naming the first value that is below `minimum`, or not a finite number."""
    for name, value in values.items():
        if not minimum <= value < math.inf:
            raise ValueError(f"{name} is {value}: choose {minimum} or more")


def above_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: choose a number above 0")


def shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: choose a share between 0 and 1")
