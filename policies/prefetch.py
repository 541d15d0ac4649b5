"""Which chunks are raised to DRAM before their turn runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
