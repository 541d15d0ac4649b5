"""What most policies share: candidates sorted by a rank that changes only when their facts do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.messages import ChunkKey
from policies.ordered import SortedKeys
from policies.outlook import Outlook
from policies.places import Place


class Ranked:
    """Candidates sorted by `_rank`, lowest first: all a policy has to add is its rank (and whether it may drop)."""

    def __init__(self) -> None:
        self._order: dict[Place, SortedKeys[tuple[Any, ...]]] = {}
        self._ranks: dict[tuple[Place, ChunkKey], tuple[Any, ...]] = {}

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        old = self._ranks.get((place, chunk.key))
        rank = (*self._rank(place, chunk), chunk.key)
        if old == rank:
            return
        order = self._order.get(place)
        if order is None:
            order = self._order[place] = SortedKeys()
        if old is not None:
            order.discard(old)
        self._ranks[place, chunk.key] = rank
        order.add(rank)

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:  # noqa: ARG002 - the contract
        self._order[place].discard(self._ranks.pop((place, key)))

    def victims(self, place: Place, count: int, outlook: Outlook) -> Sequence[ChunkKey]:  # noqa: ARG002 - the contract
        return [rank[-1] for rank in islice(self._order.get(place, ()), count)]

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return True

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:
        raise NotImplementedError
