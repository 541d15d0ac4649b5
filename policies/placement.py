"""Which replica runs a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.messages import NodeId, ReplicaId, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOption:
    """A replica with room for the turn, and what running the turn there would take."""

    replica_id: ReplicaId
    node_id: NodeId
    num_running_turns: int
    max_running_turns: int
    num_running_tokens: int  # prompts and answer reserves of the turns on it
    max_running_tokens: int
    num_queued_tokens: int  # tokens that turns dispatched there have yet to compute before they start
    prefill_tokens_per_s: float
    num_reused_tokens: int  # of this turn, counting chunks that would have to come from another node
    num_uncached_tokens: int  # of this turn
    load_s: float  # moving the reused chunks to the engine from where they are


class PlacementPolicy(Protocol):
    """Chooses among replicas that have room now. Changes nothing."""

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        """One of the options' replicas; `options` is never empty."""


class LeastLoaded:
    """The replica with the smallest share of its slots, then of its tokens, in use. Blind to where the KV is."""

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:  # noqa: ARG002 - the contract
        return min(options, key=_load).replica_id


class EarliestStart:
    """The replica that would produce the first token first: queue + load from where the KV is + prefill.

    A conversation stays where its KV is until that replica is so busy that moving or recomputing the KV is faster
    (the idea of cache-aware load balancing; estimates, so ties and near-ties go to the less loaded replica).
    """

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:  # noqa: ARG002 - the contract
        return min(options, key=lambda option: (round(_start_s(option), 3), *_load(option))).replica_id


def _start_s(option: ReplicaOption) -> float:
    num_tokens = option.num_queued_tokens + option.num_uncached_tokens
    return option.load_s + num_tokens / option.prefill_tokens_per_s


def _load(option: ReplicaOption) -> tuple[float, float, ReplicaId]:
    turns = option.num_running_turns / max(1, option.max_running_turns)
    return (turns, option.num_running_tokens / max(1, option.max_running_tokens), option.replica_id)
