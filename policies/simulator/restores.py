"""A replica's restores: so many at a time, over its link to DRAM and, besides, over its node's link to SSD or bucket.

As in the live engine a restore waits for a loader, in order, and is given up `deadline_s` after its turn came. When one
begins it is known what will be in time: chunks from the first late or missing one on are not read. Knows no turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from policies import messages as m
from policies.simulator.links import Link
from policies.simulator.node import NodeStore, Surroundings


@dataclass(frozen=True, slots=True)
class Load:
    """What a plan's restore brings: its first `num_tokens` tokens, by `done_at`. The rest is missed for this cause."""

    num_tokens: int
    done_at: float
    missed: m.Cause = m.Cause.LATE


@dataclass(slots=True, eq=False)
class _Wanted:
    plan: m.RestorePlan
    deadline: float
    on_begin: Callable[[Load], None]
    on_end: Callable[[], None]


class Restores:
    """Each restore's `on_begin` says what it will bring, `on_end` when it is over. Without steps that is at once."""

    def __init__(
        self,
        store: NodeStore,
        link: Link,
        bytes_per_token: float,
        num_loaders: int,
        deadline_s: float,
        surroundings: Surroundings,
    ) -> None:
        self._store, self._link, self._bytes_per_token = store, link, bytes_per_token
        self._num_free, self._deadline_s, self._around = num_loaders, deadline_s, surroundings
        self._waiting: deque[_Wanted] = deque()

    def add(self, plan: m.RestorePlan, on_begin: Callable[[Load], None], on_end: Callable[[], None]) -> None:
        now = self._around.clock.now
        wanted = _Wanted(plan, now + self._deadline_s, on_begin, on_end)
        if not plan.steps:
            self._skip(wanted)
        elif self._num_free:
            self._begin(wanted)
        else:
            self._waiting.append(wanted)
            self._around.clock.at(wanted.deadline, self._give_up, wanted)

    def _skip(self, wanted: _Wanted) -> None:
        """Nothing is brought."""
        wanted.on_begin(Load(0, self._around.clock.now))
        wanted.on_end()

    def _give_up(self, wanted: _Wanted) -> None:
        """It still waits for a loader."""
        if wanted in self._waiting:
            self._waiting.remove(wanted)
            self._skip(wanted)

    def _begin(self, wanted: _Wanted) -> None:
        self._num_free -= 1
        load = self._read(wanted)
        wanted.on_begin(load)
        self._around.clock.at(load.done_at, self._end, wanted)

    def _end(self, wanted: _Wanted) -> None:
        self._num_free += 1
        if self._waiting:
            self._begin(self._waiting.popleft())
        wanted.on_end()

    def _read(self, wanted: _Wanted) -> Load:
        """Use the links."""
        around = self._around
        now = done_at = around.clock.now
        num_tokens = 0
        for step in wanted.plan.steps:
            num_bytes = round(step.num_tokens * self._bytes_per_token)
            if step.chunk not in self._store.shelves[step.tier].chunks:
                lost = m.ChunkLost(node_id=step.node_id, chunk=step.chunk, tier=step.tier, cause=m.Cause.LOST)
                around.mail.append(lost)
                return Load(num_tokens, done_at, m.Cause.LOST)
            if self._would_end(step.tier, now, num_bytes) > wanted.deadline:
                return Load(num_tokens, wanted.deadline)
            done_at = max(done_at, self._link.send(now, num_bytes), self._store.read(step.tier, now, num_bytes))
            around.traffic[f"loaded.{step.tier}"] += num_bytes
            num_tokens += step.num_tokens
        return Load(num_tokens, done_at)

    def _would_end(self, tier: m.Tier, now: float, num_bytes: int) -> float:
        end = self._link.would_end(now, num_bytes)
        if tier is m.Tier.SSD:
            return max(end, self._store.ssd_read.would_end(now, num_bytes))
        return max(end, self._store.object_read.would_end(now, num_bytes)) if tier is m.Tier.OBJECT else end
