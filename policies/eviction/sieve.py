"""SIEVE: a queue that nobody is moved in, and a hand that sifts out what was not used since it came by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from policies.eviction.queued import Entry, Queue, Queued
from policies.messages import ChunkKey
from policies.ordered import SortedKeys

Rank = tuple[float, int, ChunkKey]


class _Ring:
    """The entries by age. The hand goes from the oldest to the newest, then begins anew.

    passed [a b c]  hand ->  ahead [d e f]
    """

    def __init__(self) -> None:
        self._passed: SortedKeys[Rank] = SortedKeys()
        self._ahead: SortedKeys[Rank] = SortedKeys()
        self._entries: dict[Rank, Entry] = {}
        self._hand: Rank | None = None  # the last one passed; None: at the beginning

    def enter(self, entry: Entry) -> None:
        is_passed = self._hand is not None and entry.rank <= self._hand
        (self._passed if is_passed else self._ahead).add(entry.rank)
        self._entries[entry.rank] = entry

    put_back = enter

    def take_out(self, entry: Entry) -> None:
        if not self._ahead.discard(entry.rank):
            self._passed.discard(entry.rank)
        del self._entries[entry.rank]

    def evicted(self, entry: Entry) -> None:
        """If it was its turn, the hand is where it was; behind the newest it begins anew."""
        if entry is self._settle():
            self._pass(entry)

    def order(self) -> Iterator[Entry]:
        self._settle()
        spared: list[Entry] = []
        for rank in chain(self._ahead, self._passed):
            entry = self._entries[rank]
            if entry.num_hits:
                spared.append(entry)
            else:
                yield entry
        yield from spared  # in the second round all bits are cleared

    def _settle(self) -> Entry | None:
        """Move the hand up to the first victim and clear the bits on the way; the order stays as it was."""
        while self._entries:
            if not self._ahead:
                self._begin_anew()
            rank = self._ahead.lowest()
            assert rank is not None
            entry = self._entries[rank]
            if not entry.num_hits:
                return entry
            entry.num_hits = 0
            self._pass(entry)
        return None

    def _pass(self, entry: Entry) -> None:
        self._ahead.discard(entry.rank)
        self._passed.add(entry.rank)
        self._hand = entry.rank
        if not self._ahead:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._ahead, self._passed, self._hand = self._passed, self._ahead, None


class Sieve(Queued):
    """SIEVE (Zhang et al., NSDI 2024, algorithm 1). A use sets an entry's bit and moves nothing; the hand clears bits
    and evicts the first entry without one. Counts chunks, not bytes: a chunk is an object.
    """

    def _queue(self) -> Queue:
        return _Ring()
