"""What is used often, dear to compute and small stays: the order of web caches with objects of unequal size."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.messages import ChunkKey
from policies.places import Place

MAX_ABSENT = 100_000  # copies whose standing is remembered


@dataclass(slots=True)
class _Standing:
    """A copy's last use, and what the place's inflation was then."""

    last_used: float
    num_uses: int
    inflation: float


class Gdsf(Ranked):
    """Greedy-Dual-Size-Frequency (Cherkasova 1998): lowest L + uses * cost / size first; among equals the deeper chunk.

    L, the inflation, is one per place and rises to the priority of whatever is evicted; a use takes over the L of its
    time, so what is not used is overtaken. Cost is the computation of the chunk's tokens at their depth, in tokens
    without attention: n * (1 + mean depth / attention_tokens). Size is in bytes.
    """

    def __init__(self, attention_tokens: float = 30_000.0) -> None:
        """`attention_tokens`: where attention costs as much as all the rest (some 30,000 in 8B models)."""
        if not attention_tokens > 0.0:
            raise ValueError("Gdsf takes attention_tokens above 0; float('inf') leaves attention out")
        super().__init__()
        self._attention_tokens = attention_tokens
        self._inflation: dict[Place, float] = {}
        self._standings: OrderedDict[tuple[Place, ChunkKey], _Standing] = OrderedDict()

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:
        if evicted:
            self._inflation[place] = max(self._inflation.get(place, 0.0), self._ranks[place, key][0])
            self._standings.pop((place, key), None)
        super().remove(place, key, evicted=evicted)

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:
        value = max(1, chunk.num_uses) * self.cost(chunk) / max(1, chunk.num_bytes)
        return (self._standing(place, chunk).inflation + value, -chunk.start)

    def cost(self, chunk: ChunkFacts) -> float:
        """Computing it, in tokens at depth 0."""
        mean_depth = (chunk.start + chunk.end) / 2
        return (chunk.end - chunk.start) * (1.0 + mean_depth / self._attention_tokens)

    def _standing(self, place: Place, chunk: ChunkFacts) -> _Standing:
        standing = self._standings.get((place, chunk.key))
        inflation = self._inflation.get(place, 0.0)
        if standing is None:
            standing = self._standings[place, chunk.key] = _Standing(chunk.last_used, chunk.num_uses, inflation)
            if len(self._standings) > MAX_ABSENT:
                self._standings.popitem(last=False)
        elif chunk.last_used > standing.last_used or chunk.num_uses > standing.num_uses:
            standing.last_used, standing.num_uses, standing.inflation = chunk.last_used, chunk.num_uses, inflation
            self._standings.move_to_end((place, chunk.key))
        return standing
