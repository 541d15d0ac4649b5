"""Orders that look into the waiting queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.messages import ChunkKey
from policies.ordered import SortedKeys
from policies.outlook import Outlook
from policies.places import Place
from policies.queue import Order


def from_the_tail(order: Order) -> tuple[float, ...]:
    """Sorts waiting turns from the one that runs last to the one that runs first."""
    return tuple(-part for part in order)


class WholeQueue(Ranked):
    """Every chunk that any waiting turn needs is protected, however long the queue.

    First what no waiting turn needs, least recently used first; then by the first turn that needs it, from the tail of
    the queue to its head. What is needed is never dropped for good as long as it can be kept. Among equals the deeper
    chunk goes: the head of a conversation serves more turns.
    """

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        if chunk.next_use is None:
            return (0, chunk.last_used, -chunk.start)
        return (1, *from_the_tail(chunk.next_use), -chunk.start)

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None


class LookAhead:
    """Scheduler-aware eviction (CachedAttention, section 3.3.2).

    The paper's window is the first (C_dram + C_ssd) / S_kv waiting turns. First goes what none of them needs, least
    recently used first, needed beyond the window or not; then by the first turn that needs it, from the tail of the
    window to its head. Inside the window chunks are demoted, never dropped. Among equals the deeper chunk goes. Asking
    passes over what is needed inside the window and was used longer ago: O(n) in the worst case, unlike `WholeQueue`.
    """

    def __init__(self) -> None:
        self._by_use: dict[Place, SortedKeys[tuple[Any, ...]]] = {}  # (last use, depth, key) of all candidates
        self._needed: dict[Place, SortedKeys[tuple[Any, ...]]] = {}  # (from the tail of the queue, depth, key)
        self._ranks: dict[tuple[Place, ChunkKey], tuple[tuple[Any, ...], tuple[Any, ...] | None]] = {}

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        self._take_out(place, chunk.key)
        by_use = (chunk.last_used, -chunk.start, chunk.key)
        needed = None
        self._by_use.setdefault(place, SortedKeys()).add(by_use)
        if chunk.next_use is not None:
            needed = (from_the_tail(chunk.next_use), -chunk.start, chunk.key)
            self._needed.setdefault(place, SortedKeys()).add(needed)
        self._ranks[place, chunk.key] = (by_use, needed)

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:  # noqa: ARG002 - the contract
        self._take_out(place, key)

    def _take_out(self, place: Place, key: ChunkKey) -> None:
        by_use, needed = self._ranks.pop((place, key), (None, None))
        if by_use is not None:
            self._by_use[place].discard(by_use)
        if needed is not None:
            self._needed[place].discard(needed)

    def victims(self, place: Place, count: int, outlook: Outlook) -> Sequence[ChunkKey]:
        return list(islice(chain(self._outside(place, outlook), self._inside(place, outlook)), count))

    def _outside(self, place: Place, outlook: Outlook) -> Iterator[ChunkKey]:
        num_outside = len(self._by_use.get(place, ())) - self._num_inside(place, outlook)
        for *_, key in self._by_use.get(place, ()):
            if not num_outside:
                return
            if not self._is_inside(self._ranks[place, key][1], outlook):
                num_outside -= 1
                yield key

    def _inside(self, place: Place, outlook: Outlook) -> Iterator[ChunkKey]:
        for rank in self._needed.get(place, ()):
            if self._is_inside(rank, outlook):
                yield rank[-1]

    def _num_inside(self, place: Place, outlook: Outlook) -> int:
        needed = self._needed.get(place)
        if needed is None or outlook.window_end is None:
            return len(needed or ())
        return len(needed) - needed.position((from_the_tail(outlook.window_end), 1, ""))

    def _is_inside(self, needed: tuple[Any, ...] | None, outlook: Outlook) -> bool:
        """Whether its first need lies before the end of the window."""
        if needed is None:
            return False
        return outlook.window_end is None or needed[0] > from_the_tail(outlook.window_end)

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None or position >= outlook.eviction_window
