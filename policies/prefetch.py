"""Which chunks are raised to DRAM before their turn runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from policies.messages import ChunkKey, NodeId, Tier, TurnId
from policies.outlook import Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchNeed:
    """A chunk that a waiting turn will read and that is not in DRAM of the node which will probably run the turn."""

    turn_id: TurnId
    chunk: ChunkKey
    start: int
    num_bytes: int
    node_id: NodeId
    source: Tier
    source_node: NodeId


class PrefetchPolicy(Protocol):
    """Says how far to look and what to raise. The scheduler sees to the rest: at most `max_fetches_in_flight` per node,
    bytes reserved first, nothing pushed out that is needed sooner, failures not repeated at once. Changes nothing.
    """

    def window(self, outlook: Outlook) -> int:
        """How many of the first waiting turns to look at; 0 turns prefetching off."""

    def choose(self, needs: Sequence[FetchNeed]) -> Sequence[FetchNeed]:
        """Those of the needs to fetch now, most urgent first. `needs` comes in the order of the queue."""


class Off:
    """Nothing is fetched ahead; a turn reads its chunks from where they are."""

    def window(self, outlook: Outlook) -> int:  # noqa: ARG002 - the contract
        return 0

    def choose(self, needs: Sequence[FetchNeed]) -> Sequence[FetchNeed]:  # noqa: ARG002 - the contract
        return ()


class LookAhead:
    """Scheduler-aware fetching (CachedAttention, section 3.3.1): the first C_dram / S_kv turns, nearest need first."""

    def window(self, outlook: Outlook) -> int:
        return outlook.prefetch_window

    def choose(self, needs: Sequence[FetchNeed]) -> Sequence[FetchNeed]:
        return needs


class LookAheadBudget:
    """`LookAhead` with a share of the links: at most `bytes` in one pass (one call of `choose`), and at most
    `bytes_per_s` on average, with bursts of a second's worth (a token bucket).

    A need that does not fit any more is passed over and smaller ones behind it are taken; one larger than the whole
    budget is never fetched ahead, and its turn reads it from where it is.
    """

    def __init__(self, bytes: float = inf, bytes_per_s: float = inf) -> None:  # noqa: A002 - for people
        if not (bytes >= 0 and bytes_per_s >= 0):
            raise ValueError("LookAheadBudget takes bytes and bytes_per_s of 0 or more; 0 fetches nothing")
        self._pass_bytes, self._rate = bytes, bytes_per_s
        self._left_bytes, self._filled_at = bytes_per_s, 0.0

    def window(self, outlook: Outlook) -> int:
        """Also told what time it is."""
        if self._rate < inf:
            self._left_bytes = min(self._rate, self._left_bytes + (outlook.now - self._filled_at) * self._rate)
            self._filled_at = outlook.now
        return outlook.prefetch_window if self._pass_bytes and self._rate else 0

    def choose(self, needs: Sequence[FetchNeed]) -> Sequence[FetchNeed]:
        chosen: list[FetchNeed] = []
        left_bytes = min(self._pass_bytes, self._left_bytes)
        for need in needs:
            if need.num_bytes <= left_bytes:
                left_bytes -= need.num_bytes
                self._left_bytes -= need.num_bytes
                chosen.append(need)
        return chosen
