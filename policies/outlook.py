"""What policies may know beyond the thing they decide about: plain figures, the same for every kind of policy."""

from __future__ import annotations

from dataclasses import dataclass

from policies.queue import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The cluster at a glance. Budgets are sums over its nodes."""

    num_waiting: int  # turns, those that are only expected included
    dram_budget_bytes: int
    ssd_budget_bytes: int
    session_bytes: float  # S_kv: mean KV bytes of a waiting session; 0 while unknown
    now: float = 0.0  # seconds, of the event at hand
    window_end: Order | None = None  # of the first waiting turn outside the eviction window; None: all are inside

    @classmethod
    def without_queue(cls, now: float) -> Outlook:
        """Of a cache that stands for itself, or whose queue is not known here."""
        return cls(num_waiting=0, dram_budget_bytes=0, ssd_budget_bytes=0, session_bytes=0.0, now=now)

    @property
    def prefetch_window(self) -> int:
        """L_pw = C_dram / S_kv turns (CachedAttention, section 3.3)."""
        return sessions_in(self.dram_budget_bytes, self.session_bytes, self.num_waiting)

    @property
    def eviction_window(self) -> int:
        """(C_dram + C_ssd) / S_kv turns (CachedAttention, section 3.3)."""
        return sessions_in(self.dram_budget_bytes + self.ssd_budget_bytes, self.session_bytes, self.num_waiting)


def sessions_in(num_bytes: int, session_bytes: float, num_waiting: int) -> int:
    """How many sessions so many bytes hold; all that wait while their size is unknown."""
    return int(num_bytes / session_bytes) if session_bytes > 0 else num_waiting
