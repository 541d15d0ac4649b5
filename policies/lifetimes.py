"""How long what is stored lives unused: one time to live for all, and others for what begins with a prefix.

    a chunk lives by   the longest prefix with a time to live that it holds,
                       else as its parent does (at the beginning of a text: as its tenant, the prefix of no tokens),
                       else as everybody

Every time to live keeps its own chunks by last use, and all of them are looked at in the order in which their oldest
chunk is due: nothing is ever searched for. Knows keys and times; what expiring means is the catalog's.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from policies.messages import ChunkKey


@dataclass(slots=True, eq=False)
class Lifetime:
    """One time to live and the chunks that live by it."""

    seconds: float
    unused: OrderedDict[ChunkKey, float] = field(default_factory=OrderedDict)  # since when; without expired chunks
    is_watched: bool = False  # it stands among those that will be due


class Lifetimes:
    """See the module's docstring. At most `max_prefixes` prefixes have one of their own."""

    def __init__(self, seconds: float, max_prefixes: int) -> None:
        self.common = Lifetime(seconds)
        self.by_prefix: OrderedDict[ChunkKey, Lifetime] = OrderedDict()  # longest known first
        self._due: list[tuple[float, int, Lifetime]] = []
        self._num_watched = 0
        self._max_prefixes = max_prefixes

    def give(self, prefix: ChunkKey, seconds: float) -> ChunkKey | None:
        """The prefix has this time to live from now on; the prefix that lost its own for that, if there was no room."""
        dropped = None
        if prefix not in self.by_prefix and len(self.by_prefix) >= self._max_prefixes:
            dropped, _ = self.by_prefix.popitem(last=False)
        self.by_prefix[prefix] = Lifetime(seconds)
        return dropped

    def take(self, prefix: ChunkKey) -> None:
        """The prefix has none of its own any more; none is fine."""
        self.by_prefix.pop(prefix, None)

    def find(self, marks: Iterable[ChunkKey], parent: ChunkKey | None, of_parent: Lifetime | None) -> Lifetime:
        """By what a chunk with these marks (ascending) lives; `of_parent`: by what its parent does, if it is known."""
        if not self.by_prefix:
            return of_parent or self.common
        own = None
        for mark in marks:
            own = self.by_prefix.get(mark, own)
        if own is not None:
            return own
        if of_parent is not None:
            return of_parent
        return self.by_prefix.get(parent, self.common) if parent is not None else self.common

    def note_use(self, lifetime: Lifetime, key: ChunkKey, now: float) -> None:
        """This chunk, which lives by it, is used."""
        lifetime.unused[key] = now
        lifetime.unused.move_to_end(key)
        if not lifetime.is_watched:
            self._watch(lifetime, now)

    def overdue(self, now: float) -> Iterator[ChunkKey]:
        """The chunks that were unused for too long, oldest first. They leave with this call."""
        while self._due and self._due[0][0] < now:
            lifetime = heapq.heappop(self._due)[2]
            lifetime.is_watched = False
            while lifetime.unused:
                key, since = next(iter(lifetime.unused.items()))
                if not since + lifetime.seconds < now:
                    self._watch(lifetime, since)
                    break
                del lifetime.unused[key]
                yield key

    def _watch(self, lifetime: Lifetime, since: float) -> None:
        self._num_watched += 1
        lifetime.is_watched = True
        heapq.heappush(self._due, (since + lifetime.seconds, self._num_watched, lifetime))
