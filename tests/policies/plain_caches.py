"""Caches of unit objects, written as plainly as can be: what the policies are compared with, hit by hit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from random import Random

from policies.eviction import EvictionPolicy
from tests.policies.contracts import DRAM, OUTLOOK, Facts


def zipf_with_scans(seed: int, length: int) -> list[int]:
    """Popular keys, and every tenth one that is never seen again."""
    random = Random(seed)
    return [
        min(int(random.paretovariate(0.6)), 400) if random.random() < 0.9 else 1000 + number for number in range(length)
    ]


def hits_under(policy: EvictionPolicy, keys: Iterable[int], capacity: int) -> list[bool]:
    """A cache of `capacity` objects that makes room first and stores then, as the scheduler does."""
    held: dict[str, Facts] = {}
    hits = []
    for time, number in enumerate(keys, start=1):
        key = f"{number:08d}"
        old = held.get(key)
        hits.append(old is not None)
        if old is None and len(held) == capacity:
            (victim,) = policy.victims(DRAM, 1, OUTLOOK)
            policy.remove(DRAM, victim, evicted=True)
            del held[victim]
        num_uses, stored_at = (old.num_uses + 1, old.stored_at) if old is not None else (1, float(time))
        held[key] = Facts(key, num_bytes=1, stored_at=stored_at, last_used=float(time), num_uses=num_uses)
        policy.add(DRAM, held[key])
    return hits


class PlainS3Fifo:
    """S3-FIFO on ordered dicts: key to hits, oldest first.

    `as_in_libcachesim`: two liberties that library takes. Until something was evicted, what does not fit in the small
    queue enters the main one; and the ghost of what comes back is looked up before room is made, not after.
    """

    def __init__(self, capacity: int, *, as_in_libcachesim: bool = False) -> None:
        self._capacity, self._liberties = capacity, as_in_libcachesim
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._has_evicted = False

    def run(self, keys: Sequence[int]) -> list[bool]:
        return [self._use(key) for key in keys]

    def _use(self, key: int) -> bool:
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] += 1
                return True
        was_ghost = key in self._ghosts
        if self._liberties:
            self._ghosts.pop(key, None)
        while len(self._small) + len(self._main) >= self._capacity:
            self._evict()
        if not self._liberties:
            was_ghost = key in self._ghosts
        self._ghosts.pop(key, None)
        fills_up = self._liberties and not self._has_evicted and len(self._small) >= self._capacity // 10
        (self._main if was_ghost or fills_up else self._small)[key] = 0
        return False

    def _evict(self) -> None:
        self._has_evicted = True
        if len(self._main) > self._capacity - self._capacity // 10 or not self._small:
            while True:
                key, num_hits = self._main.popitem(last=False)
                if not num_hits:
                    return
                self._main[key] = min(num_hits, 3) - 1
        while self._small:
            key, num_hits = self._small.popitem(last=False)
            if num_hits < 2:
                self._ghosts[key] = None
                if len(self._ghosts) > self._capacity - self._capacity // 10:
                    self._ghosts.popitem(last=False)
                return
            self._main[key] = 0
