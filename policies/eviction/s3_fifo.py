"""S3-FIFO: a small queue on probation, a main queue, and the ghosts of what failed in the small one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from policies.eviction.queued import Entry, Queue, Queued
from policies.messages import ChunkKey
from policies.ordered import SortedKeys

Rank = tuple[float, int, ChunkKey]

MAX_HITS = 3  # two bits


class _Segment:
    """One queue: entries by rank, and their bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._ranks: SortedKeys[Rank] = SortedKeys()
        self._entries: dict[Rank, tuple[Entry, int]] = {}

    def __iter__(self) -> Iterator[Entry]:
        return (self._entries[rank][0] for rank in self._ranks)

    def add(self, entry: Entry) -> None:
        self._ranks.add(entry.rank)
        self._entries[entry.rank] = (entry, entry.num_bytes)
        self.num_bytes += entry.num_bytes

    def discard(self, entry: Entry) -> None:
        self._ranks.discard(entry.rank)
        self.num_bytes -= self._entries.pop(entry.rank)[1]

    def oldest(self) -> Entry | None:
        rank = self._ranks.lowest()
        return self._entries[rank][0] if rank is not None else None


class _Segments:
    """The three queues of a place."""

    def __init__(self, small_share: float, hits_to_move: int) -> None:
        self._small, self._main = _Segment(), _Segment()
        self._ghosts: OrderedDict[ChunkKey, int] = OrderedDict()
        self._ghost_bytes = 0
        self._num_moves = 0
        self._is_from_small = False  # it is the small queue that looks for a victim
        self._main_share, self._hits_to_move = 1.0 - small_share, hits_to_move

    def enter(self, entry: Entry) -> None:
        ghost_bytes = self._ghosts.pop(entry.key, None)
        if ghost_bytes is None:
            self._small.add(entry)
        else:
            self._ghost_bytes -= ghost_bytes
            self._to_main(entry)

    def put_back(self, entry: Entry) -> None:
        (self._main if entry.is_main else self._small).add(entry)

    def take_out(self, entry: Entry) -> None:
        (self._main if entry.is_main else self._small).discard(entry)

    def evicted(self, entry: Entry) -> None:
        self._settle()
        self._is_from_small = False
        if entry.is_main:
            return
        self._ghosts[entry.key] = entry.num_bytes
        self._ghost_bytes += entry.num_bytes
        while self._ghost_bytes > self._main_share * self._num_bytes:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    @property
    def _num_bytes(self) -> int:
        return self._small.num_bytes + self._main.num_bytes

    def order(self) -> Iterator[Entry]:
        """The algorithm run ahead on copies of the counters: hits are spent here as if time passed."""
        self._settle()
        small, main, moved = iter(self._small), iter(self._main), deque[tuple[Entry, int]]()
        small_bytes, main_bytes = self._small.num_bytes, self._main.num_bytes
        limit, is_from_small = self._main_share * self._num_bytes, self._is_from_small
        while small_bytes or main_bytes:
            if small_bytes and (is_from_small or main_bytes <= limit):
                entry = next(small)
                small_bytes -= entry.num_bytes
                is_from_small = entry.num_hits >= self._hits_to_move
                if is_from_small:
                    main_bytes += entry.num_bytes
                    moved.append((entry, 0))
                    continue
            else:
                oldest = next(main, None)
                entry, num_hits = (oldest, oldest.num_hits) if oldest is not None else moved.popleft()
                if num_hits:
                    moved.append((entry, num_hits - 1))
                    continue
                main_bytes -= entry.num_bytes
            yield entry

    def _settle(self) -> None:
        """Move what earned it, until the first victim is the oldest of its queue; the order stays as it was."""
        while (entry := self._next()) is not None:
            self._is_from_small = not entry.is_main
            if entry.num_hits < (1 if entry.is_main else self._hits_to_move):
                return
            self.take_out(entry)
            entry.num_hits = entry.num_hits - 1 if entry.is_main else 0
            self._to_main(entry)

    def _next(self) -> Entry | None:
        """The oldest of the queue whose turn it is. The small queue's lasts until one goes, however full main gets."""
        is_main_full = self._main.num_bytes > self._main_share * self._num_bytes
        if is_main_full and not self._is_from_small:
            return self._main.oldest()
        return self._small.oldest() or self._main.oldest()

    def _to_main(self, entry: Entry) -> None:
        """Behind all that is there."""
        self._num_moves += 1
        entry.is_main, entry.rank = True, (float(self._num_moves), 0, entry.key)
        self._main.add(entry)


class S3Fifo(Queued):
    """S3-FIFO (Yang et al., SOSP 2023, algorithm 1).

    What is new enters the small queue; at its end, used at least twice, it moves to the main queue; else it goes, to be
    remembered. What comes back while remembered enters the main queue at once. There a use buys another round, at most
    three. Queues are measured in bytes, ghosts too (as many as the main queue may have). A policy is not told its
    place's budget: shares are of the bytes of the candidates, which are nearly all when something must go.
    """

    max_hits = MAX_HITS

    def __init__(self, small_share: float = 0.1, hits_to_move: int = 2) -> None:
        """`small_share`: of the bytes, on probation; `hits_to_move`: uses that open the main queue."""
        if not 0.0 < small_share < 1.0 or not 1 <= hits_to_move <= MAX_HITS:
            raise ValueError("S3Fifo takes a small_share between 0 and 1 and hits_to_move of 1, 2 or 3")
        super().__init__()
        self._small_share, self._hits_to_move = small_share, hits_to_move

    def _queue(self) -> Queue:
        return _Segments(self._small_share, self._hits_to_move)
