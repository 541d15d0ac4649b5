"""How often, but not for ever: use counts that fade."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import exp2, log1p, log2
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.messages import ChunkKey
from policies.places import Place

MAX_SCORES = 200_000  # chunks whose uses are remembered
LN_2 = 0.6931471805599453


@dataclass(slots=True)
class _Score:
    """log2 of the sum of 2 ** (time of use / half-life)."""

    value: float
    last_used: float
    num_uses: int


class Lfu(Ranked):
    """Least frequently used first, with uses that count half after every half-life; among equals the deeper chunk
    (the fading count of LRFU, Lee et al., IEEE Transactions on Computers 2001).

    The count at `now` is sum(2 ** ((t - now) / half_life)) over the uses at t. Its order is the same at every `now`, so
    a chunk's rank is log2(sum(2 ** (t / half_life))) and changes with its uses alone. A short half-life comes close to
    LRU, a long one to plain LFU, which collapses when the workload moves on. Uses outlive eviction, in bounded memory.
    """

    def __init__(self, half_life_s: float = 600.0) -> None:
        if not half_life_s > 0.0:
            raise ValueError("Lfu takes a half_life_s above 0, in seconds")
        super().__init__()
        self._half_life_s = half_life_s
        self._scores: OrderedDict[ChunkKey, _Score] = OrderedDict()

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        return (self._score(chunk), -chunk.start)

    def _score(self, chunk: ChunkFacts) -> float:
        """All uses since the last call count as of the last one."""
        score = self._scores.get(chunk.key)
        if score is None:
            value = self._uses_at(chunk.last_used, chunk.num_uses)
            self._scores[chunk.key] = _Score(value, chunk.last_used, chunk.num_uses)
            if len(self._scores) > MAX_SCORES:
                self._scores.popitem(last=False)
            return value
        num_new = max(chunk.num_uses - score.num_uses, 1 if chunk.last_used > score.last_used else 0)
        if num_new:
            score.value = _log_add(score.value, self._uses_at(chunk.last_used, num_new))
            self._scores.move_to_end(chunk.key)
        score.last_used, score.num_uses = max(score.last_used, chunk.last_used), chunk.num_uses
        return score.value

    def _uses_at(self, time: float, count: int) -> float:
        return time / self._half_life_s + log2(max(1, count))


def _log_add(one: float, other: float) -> float:
    """log2(2 ** one + 2 ** other), without the powers."""
    high, low = max(one, other), min(one, other)
    return high + log1p(exp2(low - high)) / LN_2
