"""Which replica runs a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import Protocol

from policies.messages import NodeId, ReplicaId, SessionId, Turn, TurnId

AFFINITY_SLACK = 0.25  # of a replica's slots: it may have so many more turns than the least loaded one


class Affinity(IntEnum):
    """What speaks for a replica beyond the chunks that are known: HBM there may hold more, or soon will."""

    NONE = 0
    HINTED = 1  # the last turn that came with the same `Turn.affinity` went there
    SESSION = 2  # the session's last turn went there


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
    affinity: Affinity = Affinity.NONE


class PlacementPolicy(Protocol):
    """Chooses among replicas that have room now. Changes nothing.

    A policy that needs not see all of a big cluster has a number `enough`: then it is offered the replicas on nodes
    that hold some of the turn's chunks, those with an affinity, and the least loaded others up to that number.
    """

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        """One of the options' replicas; `options` is never empty."""


class LeastLoaded:
    """The replica with the smallest share of its slots, then of its tokens, in use. Blind to where the KV is."""

    enough = 1

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:  # noqa: ARG002 - the contract
        return min(options, key=_load).replica_id


class EarliestStart:
    """The replica that would produce the first token first: queue + load from where the KV is + prefill.

    A conversation stays where its KV is until that replica is so busy that moving or recomputing the KV is faster
    (the idea of cache-aware load balancing). These are estimates: ties and near-ties go to the replica with an
    affinity, as long as it is not much busier than another (the idea of bounded loads, Mirrokni et al. 2018), else to
    the less loaded one.
    """

    enough = 16

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:  # noqa: ARG002 - the contract
        lightest = min(_load(option)[0] for option in options)

        def rank(option: ReplicaOption) -> tuple[float, int, tuple[float, float, ReplicaId]]:
            load = _load(option)
            affinity = option.affinity if load[0] - lightest <= AFFINITY_SLACK else Affinity.NONE
            return round(_start_s(option), 3), -affinity, load

        return min(options, key=rank).replica_id


class RoundRobin:
    """The next replica by id after the one that took the turn before, as far as it has room. Blind to load and KV."""

    def __init__(self) -> None:
        self._turn_id: TurnId | None = None
        self._before: ReplicaId = ""  # who took the turn before this one
        self._chosen: ReplicaId = ""

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        if turn.turn_id != self._turn_id:
            self._turn_id, self._before = turn.turn_id, self._chosen
        ids = sorted(option.replica_id for option in options)
        self._chosen = next((replica_id for replica_id in ids if replica_id > self._before), ids[0])
        return self._chosen


class SessionAffinity:
    """A session's turns run where its hash says (rendezvous hashing, Thaler and Ravishankar 1998), KV or not.

    Of all replicas offered lately the one with the highest hash of (session, replica) is home: when one comes or goes,
    only its own sessions move. When home has no room now, the least loaded replica takes the turn.
    """

    def __init__(self, forget_after: int = 1000) -> None:
        """`forget_after`: a replica not offered for so many turns is gone, and its sessions find another home."""
        self._forget_after = forget_after
        self._turn_id: TurnId | None = None
        self._num_turns = 0
        self._last_offered: dict[ReplicaId, int] = {}

    def choose(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        self._note(turn.turn_id, options)
        home = max(self._last_offered, key=lambda replica_id: _affinity(turn.session_id, replica_id))
        if any(option.replica_id == home for option in options):
            return home
        return min(options, key=_load).replica_id

    def _note(self, turn_id: TurnId, options: Sequence[ReplicaOption]) -> None:
        if turn_id != self._turn_id:
            self._turn_id, self._num_turns = turn_id, self._num_turns + 1
        self._last_offered.update((option.replica_id, self._num_turns) for option in options)
        oldest = self._num_turns - self._forget_after
        for replica_id in [known for known, last in self._last_offered.items() if last < oldest]:
            del self._last_offered[replica_id]


def _affinity(session_id: SessionId, replica_id: ReplicaId) -> bytes:
    return sha256(f"{session_id}\n{replica_id}".encode()).digest()


def _start_s(option: ReplicaOption) -> float:
    num_tokens = option.num_queued_tokens + option.num_uncached_tokens
    return option.load_s + num_tokens / option.prefill_tokens_per_s


def _load(option: ReplicaOption) -> tuple[float, float, ReplicaId]:
    turns = option.num_running_turns / max(1, option.max_running_turns)
    return (turns, option.num_running_tokens / max(1, option.max_running_tokens), option.replica_id)
