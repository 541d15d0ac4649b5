"""Which chunk goes first. The scheduler says which copies are candidates; a policy only puts them in order.

The scheduler sees to what holds for every policy: leased and busy copies are never candidates, leaves of the prefix
tree become candidates before their parents, chunks beyond a session's time to live go before anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

from policies.messages import ChunkKey
from policies.ordered import SortedKeys
from policies.outlook import Outlook
from policies.places import Place
from policies.queue import Order


class ChunkFacts(Protocol):
    """What is known of a candidate. Read it, do not keep it: it changes under your hands."""

    @property
    def key(self) -> ChunkKey: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def stored_at(self) -> float: ...  # seconds, when the chunk became known
    @property
    def last_used(self) -> float: ...  # seconds: saved, raised or read
    @property
    def next_use(self) -> Order | None: ...  # (priority, arrival) of the first waiting turn that needs it


class EvictionPolicy(Protocol):
    """An order over the candidates of each place, kept up to date by `add` and `remove`.

    Aim at O(log n) for each verb. No clock, no randomness, no I/O: the same calls give the same answers.
    """

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        """The copy in `place` may be evicted from now on; again for the same copy: its facts changed."""

    def remove(self, place: Place, key: ChunkKey) -> None:
        """The copy is no candidate any more (evicted, leased, busy, lost). It was added before."""

    def victims(self, place: Place, count: int) -> Sequence[ChunkKey]:
        """The `count` candidates that go first, in order; all of them when there are fewer. Changes nothing."""

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:
        """Whether a victim's last copy may be given up when no lower tier takes it. Changes nothing.

        `position` counts the waiting turns before the first one that needs the chunk; None: none needs it.
        """


class _Ranked:
    """Candidates sorted by `_rank`, lowest first: all a policy has to add is its rank (and whether it may drop)."""

    def __init__(self) -> None:
        self._order: dict[Place, SortedKeys[tuple[Any, ...]]] = {}
        self._ranks: dict[tuple[Place, ChunkKey], tuple[Any, ...]] = {}

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        rank = (*self._rank(chunk), chunk.key)
        old = self._ranks.get((place, chunk.key))
        if old == rank:
            return
        order = self._order.setdefault(place, SortedKeys())
        if old is not None:
            order.discard(old)
        self._ranks[place, chunk.key] = rank
        order.add(rank)

    def remove(self, place: Place, key: ChunkKey) -> None:
        self._order[place].discard(self._ranks.pop((place, key)))

    def victims(self, place: Place, count: int) -> Sequence[ChunkKey]:
        return [rank[-1] for rank in islice(self._order.get(place, ()), count)]

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return True

    def _rank(self, chunk: ChunkFacts) -> tuple[Any, ...]:
        raise NotImplementedError


class Fifo(_Ranked):
    """First stored, first out; among equals the deeper chunk."""

    def _rank(self, chunk: ChunkFacts) -> tuple[Any, ...]:
        return (chunk.stored_at, -chunk.start)


class Lru(_Ranked):
    """Least recently used first; among equals the deeper chunk."""

    def _rank(self, chunk: ChunkFacts) -> tuple[Any, ...]:
        return (chunk.last_used, -chunk.start)


class LookAhead(_Ranked):
    """Scheduler-aware eviction (CachedAttention, section 3.3.2).

    First what no waiting turn needs, least recently used first; then by the position of the first turn that needs it,
    from the tail of the queue to its head. Chunks needed inside the window of (C_dram + C_ssd) / S_kv turns are
    demoted, never dropped. Among equals the deeper chunk goes: the head of a conversation serves more turns.
    """

    def _rank(self, chunk: ChunkFacts) -> tuple[Any, ...]:
        if chunk.next_use is None:
            return (0, chunk.last_used, 0, -chunk.start)
        priority, arrival = chunk.next_use
        return (1, -priority, -arrival, -chunk.start)

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None or position >= outlook.eviction_window
