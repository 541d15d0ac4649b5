"""What policies may know beyond the thing they decide about: plain figures, the same for every kind of policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The cluster at a glance. Budgets are sums over its nodes."""

    num_waiting: int
    dram_budget_bytes: int
    ssd_budget_bytes: int
    session_bytes: float  # S_kv: mean KV bytes of a waiting session; 0 while unknown

    @property
    def prefetch_window(self) -> int:
        """L_pw = C_dram / S_kv turns (CachedAttention, section 3.3)."""
        return self._sessions_in(self.dram_budget_bytes)

    @property
    def eviction_window(self) -> int:
        """(C_dram + C_ssd) / S_kv turns (CachedAttention, section 3.3)."""
        return self._sessions_in(self.dram_budget_bytes + self.ssd_budget_bytes)

    def _sessions_in(self, num_bytes: int) -> int:
        return int(num_bytes / self.session_bytes) if self.session_bytes > 0 else self.num_waiting
