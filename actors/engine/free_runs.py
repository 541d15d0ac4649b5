"""Which blocks are free, as runs of neighbours; and which of them a turn had best take.

A turn whose blocks are neighbours is a slice of the pool: attention reads it in place. Any other has its whole history
gathered in every layer of every step. So a turn gets neighbours where there are some, and room behind them for what it
will write; the room is nobody's, and is given to others when nothing else is left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

Run = tuple[int, int]
"""First block and number of blocks."""


def runs_of(blocks: Iterable[int]) -> Iterator[Run]:
    """The same blocks, those that follow one another together."""
    start, length = 0, 0
    for block in blocks:
        if length and block == start + length:
            length += 1
            continue
        if length:
            yield start, length
        start, length = block, 1
    if length:
        yield start, length


class FreeRuns:
    """Free blocks among 0 .. num_blocks - 1. An operation costs the logarithm of the number of runs, and moves
    pointers of a list as long as that."""

    def __init__(self, num_blocks: int) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}  # by the block behind a run
        self._by_length: list[tuple[int, int]] = []  # (length, start), ascending
        self._insert(0, num_blocks)

    def runs(self) -> list[Run]:
        """In the order of their blocks."""
        return sorted(self._length_at.items())

    def add(self, start: int, length: int) -> None:
        """More free blocks, neighbours: they join the runs beside them."""
        behind = start + length
        if behind in self._length_at:
            length += self._length_at[behind]
            self._remove(behind)
        if start in self._start_before:
            before = self._start_before[start]
            length += start - before
            self._remove(before)
            start = before
        self._insert(start, length)

    def take(self, count: int, after: int | None = None, spare: int = 0) -> list[int]:
        """Takes `count` blocks, of which there must be so many: the neighbours behind `after`, if they are free. Else
        out of the shortest run that leaves `spare` free blocks behind them; else out of the longest one; else the
        fewest pieces."""
        if count and after is not None and self._length_at.get(after + 1, 0) >= count:
            return self._cut(after + 1, 0, count)
        taken: list[int] = []
        while count:
            longest, start = self._by_length[-1]
            if longest < count:
                taken += self._cut(start, 0, longest)
                count -= longest
                continue
            length, start = self._by_length[bisect_left(self._by_length, (min(count + spare, longest), -1))]
            taken += self._cut(start, max(0, length - count - spare), count)
            count = 0
        return taken

    def _cut(self, start: int, offset: int, count: int) -> list[int]:
        """Blocks out of the run at `start`; what is left of it on both sides stays free."""
        length = self._length_at[start]
        self._remove(start)
        first, end = start + offset, start + offset + count
        self._insert(start, offset)
        self._insert(end, start + length - end)
        return list(range(first, end))

    def _insert(self, start: int, length: int) -> None:
        if length:
            self._length_at[start], self._start_before[start + length] = length, start
            insort(self._by_length, (length, start))

    def _remove(self, start: int) -> None:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
