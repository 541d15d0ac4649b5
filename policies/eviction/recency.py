"""The two oldest orders: by age, and by last use."""

from __future__ import annotations

from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.places import Place


class Fifo(Ranked):
    """First stored, first out (Belady, IBM Systems Journal 1966); among equals the deeper chunk."""

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        return (chunk.stored_at, -chunk.start)


class Lru(Ranked):
    """Least recently used first (Mattson et al., IBM Systems Journal 1970); among equals the deeper chunk."""

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        return (chunk.last_used, -chunk.start)
