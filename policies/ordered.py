"""A set of comparable keys kept in order. Knows nothing of what the keys mean."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=tuple[Any, ...])

RUN_LENGTH = 512  # a run is split when it is twice as long


class SortedKeys(Generic[K]):
    """A sorted set as a list of short sorted runs: adding and removing cost one bisection and one short shift.

        runs   [a b c] [d f] [g h]      lasts  [c, f, h]

    `nth` and `position` walk over the runs; everything else is O(log n) in practice.
    """

    __slots__ = ("_lasts", "_num_keys", "_runs")

    def __init__(self, keys: Iterable[K] = ()) -> None:
        self._runs: list[list[K]] = []
        self._lasts: list[K] = []
        self._num_keys = 0
        for key in keys:
            self.add(key)

    def __len__(self) -> int:
        return self._num_keys

    def __iter__(self) -> Iterator[K]:
        for run in self._runs:
            yield from run

    def __contains__(self, key: K) -> bool:
        at = bisect_left(self._lasts, key)
        if at == len(self._runs):
            return False
        run = self._runs[at]
        return run[bisect_left(run, key)] == key

    def add(self, key: K) -> bool:
        """Put the key in its place; False when it was there already."""
        if not self._runs:
            self._runs, self._lasts, self._num_keys = [[key]], [key], 1
            return True
        at = min(bisect_left(self._lasts, key), len(self._runs) - 1)
        run = self._runs[at]
        within = bisect_left(run, key)
        if within < len(run) and run[within] == key:
            return False
        run.insert(within, key)
        self._lasts[at] = run[-1]
        self._num_keys += 1
        if len(run) > 2 * RUN_LENGTH:
            self._runs[at : at + 1] = [run[:RUN_LENGTH], run[RUN_LENGTH:]]
            self._lasts[at : at + 1] = [run[RUN_LENGTH - 1], run[-1]]
        return True

    def discard(self, key: K) -> bool:
        """Take the key out; False when it was not there."""
        at = bisect_left(self._lasts, key)
        if at == len(self._runs):
            return False
        run = self._runs[at]
        within = bisect_left(run, key)
        if run[within] != key:
            return False
        del run[within]
        self._num_keys -= 1
        if run:
            self._lasts[at] = run[-1]
        else:
            del self._runs[at], self._lasts[at]
        return True

    def lowest(self) -> K | None:
        return self._runs[0][0] if self._runs else None

    def first(self, count: int) -> list[K]:
        """The lowest `count` keys, in order."""
        return list(islice(self, count))

    def nth(self, position: int) -> K | None:
        """The key with exactly `position` keys below it; None when there are not that many."""
        for run in self._runs:
            if position < len(run):
                return run[position]
            position -= len(run)
        return None

    def position(self, key: K) -> int:
        """How many keys are lower than this one (which need not be in the set)."""
        at = bisect_left(self._lasts, key)
        below = sum(len(run) for run in self._runs[:at])
        return below + (bisect_left(self._runs[at], key) if at < len(self._runs) else 0)
