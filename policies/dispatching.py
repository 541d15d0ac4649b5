"""The way of a turn: waiting, perhaps waiting for chunks, dispatched, running, gone.

Turns go in the order of the queue. One that waits for chunks steps aside until they are there, or its deadline is, and
then goes without what is missing; one that finds no room keeps those behind it waiting, so that big turns get theirs.
When only replicas far from a turn's chunks are free, turns that came little later and have theirs there go before it
(delay scheduling, Zaharia et al. 2010, without its idling: if there is none of those, it goes at once).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from math import isfinite

from policies.board import Board
from policies.catalog import INCOMING
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
from policies.placing import Placer
from policies.queue import LAST_CLASS, Order, QueuePlace
from policies.restore import Link, find_copy, find_links, live, plan_restore
from policies.serving_order import ServingOrderPolicy, Submission
from policies.turns import TurnRecord, TurnState

MAX_ASIDE = 64  # turns that wait for chunks at a time; more keep those behind them waiting
MAX_LOCAL = 8  # open replicas for which a turn at home is looked for
WAITS_AVERAGED = 64
WOKEN_PER_NODE = 4  # of the turns that wait for bytes or fetch slots there, after one event


class Dispatcher:
    """Gives waiting turns to replicas. `ready` are the orders of the turns in state WAITING."""

    def __init__(self, board: Board, fetcher: Fetcher, placer: Placer, serving_order: ServingOrderPolicy) -> None:
        self.turns: dict[TurnId, TurnRecord] = {}
        self.ready: SortedKeys[Order] = SortedKeys()
        self.ready_at: dict[NodeId | None, SortedKeys[Order]] = {}  # the same by their homes
        self.waiting_for: dict[ChunkKey, set[TurnId]] = {}
        self._board, self._fetcher, self._placer, self._serving_order = board, fetcher, placer, serving_order
        self._catalog, self._fleet = board.catalog, board.fleet
        self._is_due = False
        self._num_attempts = 0
        self._recent_wait_s = 0.0  # a moving mean over the turns dispatched last

    # --- coming and going ---------------------------------------------------------------------------------------------

    def submit(self, turn: Turn) -> None:
        """A new attempt: whatever is known of an earlier one is dropped, and stopped where it runs."""
        self.cancel(turn.turn_id)
        links = self._find_links(turn)
        order = self._board.queue.new_order(self._ask_place(turn, links))
        self._enqueue(TurnRecord(turn, order, self._board.now), links)

    def _find_links(self, turn: Turn) -> list[Link]:
        return find_links(turn.prompt, self._catalog, live) if turn.reuse else []

    def _ask_place(self, turn: Turn, links: Sequence[Link]) -> QueuePlace:
        policy, now = self._serving_order, self._board.now
        submission = Submission(
            turn=turn,
            now=now,
            mean_prompt_tokens=self._board.queue.mean_prompt_tokens or turn.num_prompt_tokens,
            recent_wait_s=self._recent_wait_s,
            num_cached_tokens=min(links[-1].end, turn.num_prompt_tokens) if links else 0,
        )
        return self._board.guard.consult(
            policy,
            "place",
            ask=lambda: policy.place(submission),
            problem=_problem_with,
            default=lambda: (turn.priority, now),
        )

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
        is_current = record is not None and record.is_at(event.replica_id, event.attempt)
        if record is None or not is_current or record.state is not TurnState.DISPATCHED:
            self._board.note_stale("TurnStarted")
            return
        record.move_to(TurnState.RUNNING)
        replica = self._fleet.replicas[event.replica_id]
        replica.start(event.turn_id)
        self._catalog.leases.release(event.turn_id)
        self._board.freed_nodes.add(replica.spec.node_id)  # what it read may go

    def on_finished(self, event: TurnFinished) -> Turn | None:
        """Its slot is free; the turn, if this was its current attempt."""
        replica = self._fleet.replicas.get(event.replica_id)
        record = self.turns.get(event.turn_id)
        if replica is not None and replica.release_stale(event.turn_id, event.attempt):
            self._is_due = True
        elif replica is not None and record is not None and record.is_at(event.replica_id, event.attempt):
            self._release(record, replica)
            return record.turn
        else:
            self._board.note_stale("TurnFinished")
        return None

    def on_dispatch_failed(self, command: Dispatch) -> None:
        """The turn waits again, where it stood; the replica is left alone for a moment."""
        replica = self._fleet.replicas.get(command.replica_id)
        record = self.turns.get(command.turn_id)
        if replica is not None and replica.release_stale(command.turn_id, command.attempt):
            self._is_due = True
            return
        is_current = record is not None and record.is_at(command.replica_id, command.attempt)
        if replica is None or record is None or not is_current or record.state is not TurnState.DISPATCHED:
            self._board.note_stale("CommandFailed")
            return
        replica.pause(True)
        self._board.timers.at(self._board.now + self._board.config.retry_s, self._resume, replica)
        self._release(record, replica)
        again = TurnRecord(record.turn, record.order, record.submitted_at, deadline=record.deadline)
        self._enqueue(again, self._find_links(record.turn))

    def forget_replica(self, replica_id: ReplicaId) -> None:
        """Whatever ran there is gone; the clients of those turns submit them again. The fleet forgets it next."""
        replica = self._fleet.replicas.get(replica_id)
        for turn_id in list(replica.running) if replica is not None else ():
            del self.turns[turn_id]
            self._catalog.leases.release(turn_id)
        self._is_due = True

    def _enqueue(self, record: TurnRecord, links: Sequence[Link]) -> None:
        turn = record.turn
        self.turns[turn.turn_id] = record
        self._board.candidates.note_marks(self._board.queue.add(turn, record.order))
        self._make_ready(record, links)
        if turn.reuse:
            self._fetcher.note_waiting(record.order)
        self._is_due = True

    def _leave_queue(self, record: TurnRecord) -> None:
        self._stop_awaiting(record)
        self._make_unready(record)
        marks = self._board.queue.remove(record.turn.turn_id)
        self._board.candidates.note_marks(marks)
        self._fetcher.note_gone(record.order, marks)
        if record.node_id is not None:  # bytes that it had claimed there are for others
            self._board.freed_nodes.add(record.node_id)
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
        replica.make_stale(turn_id, record.attempt)
        self._board.send(Cancel(turn_id=turn_id, replica_id=record.replica_id, attempt=record.attempt))
        deadline = self._board.now + self._board.config.command_deadline_s
        self._board.timers.at(deadline, self._give_up_stale, replica, turn_id, record.attempt)

    def _give_up_stale(self, replica: Replica, turn_id: TurnId, attempt: int) -> None:
        if replica.release_stale(turn_id, attempt) and self._fleet.replicas.get(replica.spec.replica_id) is replica:
            self._board.counters["overdue.cancel"] += 1
            self._is_due = True

    def _resume(self, replica: Replica) -> None:
        replica.pause(False)
        self._is_due = True

    # --- waiting for chunks -------------------------------------------------------------------------------------------

    def note_chunk(self, key: ChunkKey) -> None:
        """A copy of this chunk came, went or failed: who now lacks nothing, or cannot have it, is looked at again."""
        waiting = self.waiting_for.get(key)
        if waiting is None:
            return
        chunk = self._catalog.chunks.get(key)
        for turn_id in list(waiting):
            record = self.turns[turn_id]
            assert record.node_id is not None, "it is brought somewhere"
            is_there = chunk is not None and find_copy(chunk, self._fleet.places_of(record.node_id)) is not None
            if is_there and len(record.awaited) > 1:
                self._await_no_more(record, key)
            else:
                self._look_again(record)

    def note_freed(self, node_id: NodeId) -> None:
        """Bytes or fetch slots are free there: the first of those who found none are looked at again."""
        self._wake(node_id, WOKEN_PER_NODE)

    def note_lost(self, node_id: NodeId) -> None:
        """The node is gone, and with it what turns waited for there."""
        self._wake(node_id, len(self.turns))
        for order in list(self.ready_at.get(node_id, ())):
            record = self._ready_turn(order)
            self._make_unready(record)
            self._make_ready(record, self._find_links(record.turn))

    def _wake(self, node_id: NodeId, count: int) -> None:
        for order in self._board.claimants(node_id, count):
            turn_id = self._board.queue.turn_at(order)
            if turn_id is not None:
                self._look_again(self.turns[turn_id])

    def note_change(self) -> None:
        """Slots, replicas or nodes changed."""
        self._is_due = True

    def _look_again(self, record: TurnRecord) -> None:
        """Try it again, if it still waits for chunks (its deadline may pass after it has gone)."""
        if record.state is TurnState.FETCHING and self.turns.get(record.turn.turn_id) is record:
            self._stop_awaiting(record)
            record.move_to(TurnState.WAITING)
            self._make_ready(record, self._find_links(record.turn))
            self._is_due = True

    def _make_ready(self, record: TurnRecord, links: Sequence[Link]) -> None:
        self.ready.add(record.order)
        home = self._fetcher.likely_node([link.chunk for link in links]) if len(self._fleet.hosts) > 1 else None
        record.home = home.node_id if home is not None else None
        self.ready_at.setdefault(record.home, SortedKeys()).add(record.order)

    def _make_unready(self, record: TurnRecord) -> None:
        """It may be so already."""
        if not self.ready.discard(record.order):
            return
        orders = self.ready_at[record.home]
        orders.discard(record.order)
        if not orders:
            del self.ready_at[record.home]

    def _await(self, record: TurnRecord, node_id: NodeId, chunks: Iterable[ChunkKey]) -> None:
        if record.deadline is None:
            record.deadline = self._board.now + self._board.config.restore_deadline_s
            self._board.timers.at(record.deadline, self._look_again, record)
        record.node_id = node_id
        record.awaited = set(chunks)
        self._board.awaiting.add(record.order)
        for key in record.awaited:
            self.waiting_for.setdefault(key, set()).add(record.turn.turn_id)
        record.move_to(TurnState.FETCHING)
        self._make_unready(record)

    def _await_no_more(self, record: TurnRecord, key: ChunkKey) -> None:
        record.awaited.remove(key)
        waiting = self.waiting_for[key]
        waiting.remove(record.turn.turn_id)
        if not waiting:
            del self.waiting_for[key]

    def _stop_awaiting(self, record: TurnRecord) -> None:
        for key in list(record.awaited):
            self._await_no_more(record, key)
        if record.state is TurnState.FETCHING:
            assert record.node_id is not None
            self._board.awaiting.discard(record.order)
            self._board.disclaim(record.node_id, record.order)

    # --- dispatching --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Dispatch in order until a turn finds no room, if anything changed since the last time."""
        if not self._is_due:
            return
        self._is_due = False
        num_held_up = 0
        while self._may_go_on():
            orders = self.ready.first(num_held_up + 1)
            if len(orders) <= num_held_up:
                return
            first = orders[-1]
            local = self._find_local(first)
            if (local is not None and self._try(self._ready_turn(local))) or self._try(self._ready_turn(first)):
                continue
            if not self._is_stale(self._ready_turn(first).turn.turn_id):
                return
            num_held_up += 1  # by its own earlier attempt, for which those behind it need not wait

    def _ready_turn(self, order: Order) -> TurnRecord:
        turn_id = self._board.queue.turn_at(order)
        assert turn_id is not None, "only waiting turns are ready"
        return self.turns[turn_id]

    def _find_local(self, first: Order) -> Order | None:
        """Who goes before the first turn in the queue, because it has its chunks where a replica is free, or none."""
        home = self._ready_turn(first).home
        if home is None or any(replica.is_open for replica in self._fleet.on_node.get(home, {}).values()):
            return None
        nodes = {replica.spec.node_id for replica in islice(self._fleet.open_replicas(), MAX_LOCAL)}
        lowest = [orders.lowest() for node in (None, *nodes) if (orders := self.ready_at.get(node)) is not None]
        local = min((order for order in lowest if order is not None), default=None)
        latest = (first[0], first[1] + self._board.config.locality_s)
        return local if local is not None and local[:2] <= latest else None

    def _may_go_on(self) -> bool:
        return bool(self._fleet.open) and len(self._board.awaiting) < MAX_ASIDE

    def _is_stale(self, turn_id: TurnId) -> bool:
        return any(turn_id in replica.stale for replica in self._fleet.replicas.values())

    def _try(self, record: TurnRecord) -> bool:
        """Dispatch the turn, or let it wait for chunks; False when no replica has room for it."""
        turn = record.turn
        is_late = record.deadline is not None and self._board.now >= record.deadline
        links = self._find_links(turn)
        replica = self._placer.find(turn, links, None if is_late else record.node_id)
        if replica is None:
            return False
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
            outcome = FetchOutcome.ON_ITS_WAY if is_coming else self._fetcher.fetch(chunk, node, record.order)
            if outcome in (FetchOutcome.NO_BYTES, FetchOutcome.NO_SLOT):
                self._board.claim(node.node_id, record.order)
            if outcome is not FetchOutcome.IMPOSSIBLE:
                missing.add(chunk.key)
            elif not any(copy.state in INCOMING for copy in chunk.copies.values()):
                break  # what lies behind it is of no use
            else:
                missing.add(chunk.key)  # it is being written elsewhere, and can be fetched then
        return missing

    def _dispatch(self, record: TurnRecord, replica: Replica) -> None:
        turn, spec = record.turn, replica.spec
        restore = plan_restore(
            turn, self._catalog, self._fleet.places_of(spec.node_id), self._board.sessions.offered_end(turn.session_id)
        )
        self._leave_queue(record)
        self._recent_wait_s += (self._board.now - record.submitted_at - self._recent_wait_s) / WAITS_AVERAGED
        session = self._board.sessions.get(turn.session_id)
        for chunk, copy in restore.reads:
            self._catalog.use(chunk, session, self._board.now)
            self._board.note_read(copy)
        deadline = self._board.now + self._board.config.lease_s
        self._catalog.leases.grant(turn.turn_id, restore.reads, deadline)
        self._board.timers.at(deadline, self._expire_lease, turn.turn_id, deadline)
        record.move_to(TurnState.DISPATCHED)
        record.replica_id = spec.replica_id
        self._num_attempts += 1
        record.attempt = self._num_attempts
        self._board.sessions.note_dispatch(turn, spec.replica_id)
        replica.take(turn.turn_id, self._placer.num_tokens(turn), turn.num_prompt_tokens - restore.plan.num_reused)
        self._board.note_plan(restore.plan)
        self._board.send(
            Dispatch(turn_id=turn.turn_id, replica_id=spec.replica_id, plan=restore.plan, attempt=record.attempt)
        )

    def _expire_lease(self, owner: TurnId, deadline: float) -> None:
        lease = self._catalog.leases.by_owner.get(owner)
        if lease is not None and lease.deadline == deadline:
            self._catalog.leases.release(owner)
            self._board.counters["overdue.lease"] += 1


def _problem_with(place: QueuePlace) -> str | None:
    kind, arrival = place
    is_good = (
        isinstance(kind, int) and isinstance(arrival, int | float) and abs(kind) < LAST_CLASS and isfinite(arrival)
    )
    return None if is_good else f"answered {place!r}, not (class, seconds)"
