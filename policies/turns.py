"""What the scheduler knows of one turn, and the legal moves of its state.

WAITING ──> FETCHING ──> WAITING     some of its chunks are on their way to the node chosen for it
   └──────> DISPATCHED ──> RUNNING   its plan's chunks are leased until it has read them
any state ──> gone                   finished, cancelled, or its replica is lost (its client submits it again)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from policies.messages import ChunkKey, NodeId, ReplicaId, Turn
from policies.queue import Order


class TurnState(StrEnum):
    WAITING = "waiting"
    FETCHING = "fetching"
    DISPATCHED = "dispatched"
    RUNNING = "running"


TURN_MOVES: dict[TurnState, frozenset[TurnState]] = {
    TurnState.WAITING: frozenset({TurnState.FETCHING, TurnState.DISPATCHED}),
    TurnState.FETCHING: frozenset({TurnState.WAITING}),
    TurnState.DISPATCHED: frozenset({TurnState.RUNNING, TurnState.WAITING}),
    TurnState.RUNNING: frozenset(),
}
"""Legal moves of a turn, beside the one out of every state: gone."""


@dataclass(slots=True, eq=False)
class TurnRecord:
    """A turn the scheduler knows. `node_id`, `awaited`: where its chunks are being brought, and which."""

    turn: Turn
    order: Order
    submitted_at: float
    state: TurnState = TurnState.WAITING
    replica_id: ReplicaId | None = None
    attempt: int = 0  # of its Dispatch
    node_id: NodeId | None = None
    home: NodeId | None = None  # which node holds most of what it will read, as far as known
    deadline: float | None = None  # of waiting for chunks; set when it first waits for some
    awaited: set[ChunkKey] = field(default_factory=set)

    @property
    def is_waiting(self) -> bool:
        return self.state in (TurnState.WAITING, TurnState.FETCHING)

    def is_at(self, replica_id: ReplicaId, attempt: int | None) -> bool:
        """Whether this is what the replica means (None: it does not say which attempt)."""
        return self.replica_id == replica_id and attempt in (None, self.attempt)

    def move_to(self, state: TurnState) -> None:
        assert state in TURN_MOVES[self.state], f"a turn cannot go from {self.state} to {state}"
        self.state = state
