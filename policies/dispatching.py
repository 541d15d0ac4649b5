"""The way of a turn: waiting, perhaps waiting for chunks, dispatched, running, gone.

    WAITING ──> FETCHING ──> WAITING     some of its chunks are on their way to the node chosen for it
       └──────> DISPATCHED ──> RUNNING   its plan's chunks are leased until it has read them
    any state ──> gone                   finished, cancelled, or its replica is lost (its client submits it again)

Turns go in the order of the queue. One that waits for chunks steps aside until they are there, or its deadline is, and
then goes without what is missing; one that finds no room keeps those behind it waiting, so that big turns get theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from policies.board import Board
from policies.catalog import INCOMING, Chunk
from policies.fetching import Fetcher, FetchOutcome
from policies.fleet import Node, Replica
from policies.messages import (
    Cancel,
    ChunkKey,
    Dispatch,
    NodeId,
    ReplicaId,
    Turn,
    TurnFinished,
    TurnId,
    TurnStarted,
)
from policies.ordered import SortedKeys
from policies.placement import PlacementPolicy, ReplicaOption
from policies.places import Place
from policies.queue import Order
from policies.restore import Link, find_copy, find_links, plan_restore


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
    state: TurnState = TurnState.WAITING
    replica_id: ReplicaId | None = None
    node_id: NodeId | None = None
    deadline: float | None = None  # of waiting for chunks; set when it first waits for some
    awaited: set[ChunkKey] = field(default_factory=set)

    @property
    def is_waiting(self) -> bool:
        return self.state in (TurnState.WAITING, TurnState.FETCHING)

    def move_to(self, state: TurnState) -> None:
        assert state in TURN_MOVES[self.state], f"a turn cannot go from {self.state} to {state}"
        self.state = state


class Dispatcher:
    """Gives waiting turns to replicas. `ready` are the orders of the turns in state WAITING."""

    def __init__(self, board: Board, fetcher: Fetcher, policy: PlacementPolicy) -> None:
        self.turns: dict[TurnId, TurnRecord] = {}
        self.ready: SortedKeys[Order] = SortedKeys()
        self.waiting_for: dict[ChunkKey, set[TurnId]] = {}
        self.waiting_at: dict[NodeId, set[TurnId]] = {}
        self._board, self._fetcher, self._policy = board, fetcher, policy
        self._catalog, self._fleet = board.catalog, board.fleet
        self._is_due = False

    # --- coming and going ---------------------------------------------------------------------------------------------

    def submit(self, turn: Turn) -> None:
        """A new attempt: whatever is known of an earlier one is dropped, and stopped where it runs."""
        self.cancel(turn.turn_id)
        order = self._board.queue.new_order(turn.priority)
        self._enqueue(TurnRecord(turn, order))

    def cancel(self, turn_id: TurnId) -> bool:
        """Forget a turn and stop it where it runs; whether it was known."""
        record = self.turns.pop(turn_id, None)
        if record is None:
            return False
        if record.is_waiting:
            self._leave_queue(record)
        else:
            self._catalog.leases.release(turn_id)
            self._stop(record)
        return True

    def on_started(self, event: TurnStarted) -> None:
        record = self.turns.get(event.turn_id)
        if record is None or record.replica_id != event.replica_id or record.state is not TurnState.DISPATCHED:
            self._board.note_stale("TurnStarted")
            return
        record.move_to(TurnState.RUNNING)
        self._fleet.replicas[event.replica_id].start(event.turn_id)
        self._catalog.leases.release(event.turn_id)

    def on_finished(self, event: TurnFinished) -> None:
        replica = self._fleet.replicas.get(event.replica_id)
        record = self.turns.get(event.turn_id)
        if replica is not None and event.turn_id in replica.stale:
            replica.release_stale(event.turn_id)
            self._is_due = True
        elif replica is not None and record is not None and record.replica_id == event.replica_id:
            self._release(record, replica)
        else:
            self._board.note_stale("TurnFinished")

    def on_dispatch_failed(self, command: Dispatch) -> None:
        """The turn waits again, where it stood; the replica is left alone for a moment."""
        replica = self._fleet.replicas.get(command.replica_id)
        record = self.turns.get(command.turn_id)
        is_current = record is not None and record.replica_id == command.replica_id
        if replica is None or record is None or not is_current or record.state is not TurnState.DISPATCHED:
            self._board.note_stale("CommandFailed")
            return
        replica.paused = True
        self._board.timers.at(self._board.now + self._board.config.retry_s, self._resume, replica)
        self._release(record, replica)
        self._enqueue(TurnRecord(record.turn, record.order, deadline=record.deadline))

    def forget_replica(self, replica_id: ReplicaId) -> None:
        """Whatever ran there is gone; the clients of those turns submit them again. The fleet forgets it next."""
        replica = self._fleet.replicas.get(replica_id)
        for turn_id in list(replica.running) if replica is not None else ():
            del self.turns[turn_id]
            self._catalog.leases.release(turn_id)
        self._is_due = True

    def _enqueue(self, record: TurnRecord) -> None:
        turn = record.turn
        self.turns[turn.turn_id] = record
        self._board.candidates.refresh_marks(self._board.queue.add(turn, record.order))
        self.ready.add(record.order)
        if turn.reuse:
            self._fetcher.note_waiting(record.order)
        self._is_due = True

    def _leave_queue(self, record: TurnRecord) -> None:
        self._stop_awaiting(record)
        self.ready.discard(record.order)
        self._board.candidates.refresh_marks(self._board.queue.remove(record.turn.turn_id))
        self._fetcher.note_gone(record.order)
        self._is_due = True

    def _release(self, record: TurnRecord, replica: Replica) -> None:
        turn_id = record.turn.turn_id
        replica.release(turn_id)
        self._catalog.leases.release(turn_id)
        del self.turns[turn_id]
        self._is_due = True

    def _stop(self, record: TurnRecord) -> None:
        """Its slot stays taken until the replica says so, or for as long as a command may take."""
        assert record.replica_id is not None
        turn_id, replica = record.turn.turn_id, self._fleet.replicas[record.replica_id]
        replica.make_stale(turn_id)
        self._board.send(Cancel(turn_id=turn_id, replica_id=record.replica_id))
        deadline = self._board.now + self._board.config.command_deadline_s
        self._board.timers.at(deadline, self._give_up_stale, replica, turn_id)

    def _give_up_stale(self, replica: Replica, turn_id: TurnId) -> None:
        if turn_id in replica.stale and self._fleet.replicas.get(replica.spec.replica_id) is replica:
            replica.release_stale(turn_id)
            self._board.counters["overdue.cancel"] += 1
            self._is_due = True

    def _resume(self, replica: Replica) -> None:
        replica.paused = False
        self._is_due = True

    # --- waiting for chunks -------------------------------------------------------------------------------------------

    def note_chunk(self, key: ChunkKey) -> None:
        """A copy of this chunk came, went or failed: those who wait for it are looked at again."""
        for turn_id in list(self.waiting_for.get(key, ())):
            self._look_again(self.turns[turn_id])

    def note_freed(self, node_id: NodeId) -> None:
        """Bytes or fetch slots are free there: those whose chunks found none are looked at again."""
        for turn_id in list(self.waiting_at.get(node_id, ())):
            self._look_again(self.turns[turn_id])

    def note_change(self) -> None:
        """Slots, replicas or nodes changed."""
        self._is_due = True

    def _look_again(self, record: TurnRecord) -> None:
        """Try it again, if it still waits for chunks (its deadline may pass after it has gone)."""
        if record.state is TurnState.FETCHING and self.turns.get(record.turn.turn_id) is record:
            self._stop_awaiting(record)
            record.move_to(TurnState.WAITING)
            self.ready.add(record.order)
            self._is_due = True

    def _await(self, record: TurnRecord, node_id: NodeId, chunks: Iterable[ChunkKey]) -> None:
        if record.deadline is None:
            record.deadline = self._board.now + self._board.config.restore_deadline_s
            self._board.timers.at(record.deadline, self._look_again, record)
        record.node_id = node_id
        record.awaited = set(chunks)
        for key in record.awaited:
            self.waiting_for.setdefault(key, set()).add(record.turn.turn_id)
        self.waiting_at.setdefault(node_id, set()).add(record.turn.turn_id)
        record.move_to(TurnState.FETCHING)
        self.ready.discard(record.order)

    def _stop_awaiting(self, record: TurnRecord) -> None:
        for key in record.awaited:
            self.waiting_for[key].discard(record.turn.turn_id)
            if not self.waiting_for[key]:
                del self.waiting_for[key]
        record.awaited = set()
        if record.state is TurnState.FETCHING:
            assert record.node_id is not None
            self.waiting_at[record.node_id].discard(record.turn.turn_id)
            if not self.waiting_at[record.node_id]:
                del self.waiting_at[record.node_id]

    # --- dispatching --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Dispatch in order until a turn finds no room, if anything changed since the last time."""
        if not self._is_due:
            return
        self._is_due = False
        while self.ready and any(replica.is_open for replica in self._fleet.replicas.values()):
            (order,) = self.ready.first(1)
            turn_id = self._board.queue.turn_at(order)
            assert turn_id is not None, "only waiting turns are ready"
            if not self._try(self.turns[turn_id]):
                return

    def _try(self, record: TurnRecord) -> bool:
        """Dispatch the turn, or let it wait for chunks; False when no replica has room for it."""
        turn = record.turn
        is_late = record.deadline is not None and self._board.now >= record.deadline
        links = find_links(turn.prompt, self._catalog, lambda chunk: 0 if chunk.is_live else None) if turn.reuse else []
        options = self._options(record, links, stick=not is_late)
        if not options:
            return False
        replica = self._fleet.replicas[self._ask(turn, options)]
        node = self._fleet.nodes.get(replica.spec.node_id)
        missing = self._bring(record, links, node) if node is not None and not is_late else set()
        if node is not None and missing:
            self._await(record, node.node_id, missing)
        else:
            self._dispatch(record, replica)
        return True

    def _bring(self, record: TurnRecord, links: Sequence[Link], node: Node) -> set[ChunkKey]:
        """The chunks of the leading run that are not readable on the node yet but will be; fetches are sent."""
        missing: set[ChunkKey] = set()
        for link in links:
            chunk = link.chunk
            if find_copy(chunk, node.places) is not None:
                continue
            is_coming = any(place in node.places and copy.state in INCOMING for place, copy in chunk.copies.items())
            if is_coming or self._fetcher.fetch(chunk, node, record.order) is not FetchOutcome.IMPOSSIBLE:
                missing.add(chunk.key)
            elif not any(copy.state in INCOMING for copy in chunk.copies.values()):
                break  # what lies behind it is of no use
            else:
                missing.add(chunk.key)  # it is being written elsewhere, and can be fetched then
        return missing

    def _dispatch(self, record: TurnRecord, replica: Replica) -> None:
        turn, spec = record.turn, replica.spec
        restore = plan_restore(
            turn, self._catalog, self._fleet.places_of(spec.node_id), self._board.session_ends.get(turn.session_id)
        )
        self._leave_queue(record)
        for chunk, _ in restore.reads:
            self._catalog.touch(chunk, self._board.now)
        deadline = self._board.now + self._board.config.lease_s
        self._catalog.leases.grant(turn.turn_id, restore.reads, deadline)
        self._board.timers.at(deadline, self._expire_lease, turn.turn_id, deadline)
        record.move_to(TurnState.DISPATCHED)
        record.replica_id = spec.replica_id
        replica.take(turn.turn_id, self._num_tokens(turn), turn.num_prompt_tokens - restore.plan.num_reused)
        self._board.send(Dispatch(turn_id=turn.turn_id, replica_id=spec.replica_id, plan=restore.plan))

    def _expire_lease(self, owner: TurnId, deadline: float) -> None:
        lease = self._catalog.leases.by_owner.get(owner)
        if lease is not None and lease.deadline == deadline:
            self._catalog.leases.release(owner)
            self._board.counters["overdue.lease"] += 1

    def _num_tokens(self, turn: Turn) -> int:
        return turn.num_prompt_tokens + math.ceil(self._board.config.answer_reserve * turn.max_new_tokens)

    # --- placement ----------------------------------------------------------------------------------------------------

    def _options(self, record: TurnRecord, links: Sequence[Link], *, stick: bool) -> list[ReplicaOption]:
        """Replicas with room. With `stick`, only those on the node its chunks are being brought to, if any is open."""
        turn = record.turn
        open_replicas = [
            replica
            for replica in self._fleet.replicas.values()
            if turn.turn_id not in replica.stale and self._fleet.has_room(replica, self._num_tokens(turn))
        ]
        if stick and record.node_id is not None:
            there = [replica for replica in open_replicas if replica.spec.node_id == record.node_id]
            open_replicas = there or open_replicas
        estimates = {
            node_id: self._estimate(turn, links, node_id) for node_id in {r.spec.node_id for r in open_replicas}
        }
        return [_option(replica, turn, *estimates[replica.spec.node_id]) for replica in open_replicas]

    def _estimate(self, turn: Turn, links: Sequence[Link], node_id: NodeId) -> tuple[int, float]:
        """(tokens of the turn that can be reused on this node, seconds to load them)."""
        num_reused, load_s = 0, 0.0
        places = self._fleet.places_of(node_id)
        for link in links:
            num_reused = link.end
            load_s += self._load_s(link.chunk, places)
        return min(num_reused, turn.num_prompt_tokens - 1), load_s

    def _load_s(self, chunk: Chunk, places: Sequence[Place]) -> float:
        copy = find_copy(chunk, places)
        if copy is not None:
            return copy.num_bytes / self._catalog.accounts[copy.place].bytes_per_s
        if any(place in places for place in chunk.copies):
            return 0.0  # just being written there
        return chunk.num_bytes / self._board.config.network_bytes_per_s

    def _ask(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        known = {option.replica_id for option in options}
        return self._board.guard.consult(
            self._policy,
            "choose",
            ask=lambda: self._policy.choose(turn, options),
            problem=lambda chosen: None if chosen in known else f"chose {chosen!r}, which was not offered",
            default=lambda: min(options, key=lambda option: (option.num_running_turns, option.replica_id)).replica_id,
        )


def _option(replica: Replica, turn: Turn, num_reused: int, load_s: float) -> ReplicaOption:
    spec = replica.spec
    return ReplicaOption(
        replica_id=spec.replica_id,
        node_id=spec.node_id,
        num_running_turns=replica.num_turns,
        max_running_turns=spec.max_running_turns,
        num_running_tokens=replica.num_tokens,
        max_running_tokens=spec.max_running_tokens,
        num_queued_tokens=replica.num_queued_tokens,
        prefill_tokens_per_s=spec.prefill_tokens_per_s,
        num_reused_tokens=num_reused,
        num_uncached_tokens=turn.num_prompt_tokens - num_reused,
        load_s=load_s,
    )
