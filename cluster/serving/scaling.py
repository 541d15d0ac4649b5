"""How many replicas the load wants. Pure: figures and the time in, a number out.

    wanted = max( (running + waiting) / (slots of one replica * TARGET_SHARE),  n * share of KV in use / MAX_KV_SHARE )

More are added when more were wanted for a few seconds without a break, one is removed when fewer were for a minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TARGET_SHARE = 0.8  # of a replica's slots
MAX_KV_SHARE = 0.9  # of the replicas' KV capacity
UP_AFTER_S = 5.0
DOWN_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the replicas have to do."""

    num_replicas: int
    num_running: int
    num_waiting: int
    slots_per_replica: int
    kv_share: float
    """Tokens that running turns hold, of all the replicas can hold."""

    @property
    def wanted(self) -> int:
        by_turns = (self.num_running + self.num_waiting) / (self.slots_per_replica * TARGET_SHARE)
        by_kv = self.num_replicas * self.kv_share / MAX_KV_SHARE
        return math.ceil(max(by_turns, by_kv) - 1e-9)


class Scaler:
    """Between `low` and `high` replicas."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, max(low, high)
        self._more_since: float | None = None
        self._fewer_since: float | None = None

    def wanted(self, load: Load) -> int:
        """How many replicas this load alone would have."""
        return min(max(load.wanted, self._low), self._high)

    def target(self, load: Load, now: float) -> int:
        """How many replicas there should be, now."""
        wanted = self.wanted(load)
        current = load.num_replicas
        self._more_since = (self._more_since if self._more_since is not None else now) if wanted > current else None
        self._fewer_since = (self._fewer_since if self._fewer_since is not None else now) if wanted < current else None
        if self._more_since is not None and now - self._more_since >= UP_AFTER_S:
            self._more_since = None
            return wanted
        if self._fewer_since is not None and now - self._fewer_since >= DOWN_AFTER_S:
            self._fewer_since = now  # the next one after another minute
            return current - 1
        return current
