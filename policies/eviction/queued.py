"""What the queue-based orders share: entries that hear of uses and keep their standing while they are no candidates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from policies.eviction.contract import ChunkFacts
from policies.messages import ChunkKey
from policies.outlook import Outlook
from policies.places import Place

MAX_ABSENT = 100_000  # per place: leased (or lost) chunks whose standing is remembered


@dataclass(slots=True, eq=False)
class Entry:
    """A chunk in the queue of a place. `num_hits`: uses since it came, as far as its policy counts them."""

    key: ChunkKey
    num_bytes: int
    last_used: float
    num_uses: int
    rank: tuple[float, int, ChunkKey]  # in its queue, oldest first
    num_hits: int = 0
    is_main: bool = False

    def note(self, chunk: ChunkFacts) -> bool:
        """Take over the facts; whether they tell of a use."""
        is_use = chunk.last_used > self.last_used or chunk.num_uses > self.num_uses
        self.last_used, self.num_uses = chunk.last_used, chunk.num_uses
        return is_use


class Queue(Protocol):
    """The entries of one place."""

    def enter(self, entry: Entry) -> None:
        """It is new here."""

    def put_back(self, entry: Entry) -> None:
        """It is a candidate again, where it was."""

    def take_out(self, entry: Entry) -> None: ...

    def evicted(self, entry: Entry) -> None:
        """It was evicted; still in the queue."""

    def order(self) -> Iterator[Entry]:
        """Who goes first, if nothing happens in between. Asked twice, the order is the same."""


class Queued:
    """Candidates in queues, one per place: a policy adds how its queue works and how high hits are counted.

    An entry's age is when it came to the place: its last use then, and never before what came earlier. Among those that
    came together the deeper one is older.
    """

    max_hits = 1

    def __init__(self) -> None:
        self._queues: dict[Place, Queue] = {}
        self._listed: dict[Place, dict[ChunkKey, Entry]] = {}
        self._absent: dict[Place, OrderedDict[ChunkKey, Entry]] = {}
        self._latest: dict[Place, float] = {}

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        if place not in self._queues:
            self._queues[place], self._listed[place], self._absent[place] = self._queue(), {}, OrderedDict()
        queue, listed = self._queues[place], self._listed[place]
        entry = listed.get(chunk.key)
        if entry is None:
            entry = self._absent[place].pop(chunk.key, None)
            if entry is not None:
                entry.num_bytes = max(1, chunk.num_bytes)
                queue.put_back(entry)
            else:
                entry = self._new(place, chunk)
                queue.enter(entry)
            listed[chunk.key] = entry
        if entry.note(chunk):
            entry.num_hits = min(entry.num_hits + 1, self.max_hits)

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:
        entry, absent = self._listed[place].pop(key), self._absent[place]
        if evicted:
            self._queues[place].evicted(entry)
        self._queues[place].take_out(entry)
        if not evicted:
            absent[key] = entry
            if len(absent) > MAX_ABSENT:
                absent.popitem(last=False)

    def victims(self, place: Place, count: int, outlook: Outlook) -> Sequence[ChunkKey]:  # noqa: ARG002 - the contract
        queue = self._queues.get(place)
        return [entry.key for entry in islice(queue.order(), count)] if queue is not None else []

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return True

    def _new(self, place: Place, chunk: ChunkFacts) -> Entry:
        came_at = self._latest[place] = max(chunk.last_used, self._latest.get(place, chunk.last_used))
        rank = (came_at, -chunk.start, chunk.key)
        return Entry(chunk.key, max(1, chunk.num_bytes), chunk.last_used, chunk.num_uses, rank)

    def _queue(self) -> Queue:
        raise NotImplementedError
