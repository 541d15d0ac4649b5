"""The scheduler: one door. `handle(event, now)` takes what happened and the time, and returns what is to be done.

A pure state machine: no clock, no randomness, no I/O, no tokens. Its work is shared by desks over one Board:

    Dispatcher  turns: waiting, chunks on their way, dispatched, running
    Saver       offers of new chunks: Save or Decline, write-through
    Fetcher     raising chunks to DRAM, on demand and ahead of need
    Evictor     watermarks, making room, copies that leave or are lost
    Administrator   sessions that are expected, pinned, over or deleted
    Steward     the same for all that begins with a prefix, and how long it lives

Every event is handled by one desk; then the desks settle what follows from it until nothing changes. Events may come
late, twice or out of order (actors die and answers cross): what does not fit the state is counted as stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from policies import inspection
from policies import messages as m
from policies.administration import Administrator
from policies.admission import AdmissionPolicy
from policies.board import Board
from policies.candidates import Candidates
from policies.catalog import Catalog
from policies.dispatching import Dispatcher
from policies.evicting import Evictor
from policies.eviction import EvictionPolicy
from policies.fetching import Fetcher
from policies.fleet import Fleet
from policies.lifetimes import Lifetimes
from policies.placement import PlacementPolicy
from policies.places import Account
from policies.placing import Placer
from policies.plugins import Guard, load_policy, require_verbs
from policies.prefetch import PrefetchPolicy
from policies.prefixes import SLICE, TICK_SLICE, Steward
from policies.queue import WaitingQueue
from policies.saving import Saver
from policies.serving_order import ServingOrderPolicy
from policies.sessions import Sessions

MAX_ROUNDS = 8  # of settling after one event; what is left over waits for the next

_VERBS = {
    "eviction": ("add", "remove", "victims", "may_drop"),
    "prefetch": ("window", "choose"),
    "placement": ("choose",),
    "admission": ("admit",),
    "serving_order": ("place",),
}


class Scheduler:
    """See the module's docstring. Policies may be given as objects; otherwise the config's import paths are used."""

    def __init__(
        self,
        config: m.SchedulerConfig | None = None,
        *,
        eviction: EvictionPolicy | None = None,
        prefetch: PrefetchPolicy | None = None,
        placement: PlacementPolicy | None = None,
        admission: AdmissionPolicy | None = None,
        serving_order: ServingOrderPolicy | None = None,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:
        """ValueError, with advice, for a policy that cannot be found or lacks a verb.

        With a stopwatch (seconds) slow policies are found out, see `plugins.Guard`.
        """
        self.config = config or m.SchedulerConfig()
        guard = Guard(self.config.policy_limit_s, self.config.strict_policies, stopwatch)
        lifetimes = Lifetimes(self.config.session_ttl_s, self.config.ghosts)
        catalog, queue, fleet = Catalog(self.config.ghosts, lifetimes), WaitingQueue(), Fleet()
        order_of_eviction = cast(EvictionPolicy, self._policy("eviction", eviction))
        candidates = Candidates(catalog, queue, fleet, order_of_eviction, guard)
        catalog.watch, catalog.unlist = candidates.note, candidates.unlist
        sessions = Sessions(self.config.ghosts)
        self.board = Board(self.config, catalog, queue, fleet, candidates, guard, sessions)
        self.evictor = Evictor(self.board)
        self.saver = Saver(self.board, self.evictor, cast(AdmissionPolicy, self._policy("admission", admission)))
        self.fetcher = Fetcher(self.board, self.evictor, cast(PrefetchPolicy, self._policy("prefetch", prefetch)))
        placer = Placer(self.board, cast(PlacementPolicy, self._policy("placement", placement)))
        order = cast(ServingOrderPolicy, self._policy("serving_order", serving_order))
        self.dispatcher = Dispatcher(self.board, self.fetcher, placer, order)
        self.administrator = Administrator(self.board, self.dispatcher, self.saver, self.fetcher, self.evictor)
        self.steward = Steward(self.board, self.administrator)
        self._handlers: dict[type, Callable[[Any], None]] = {
            m.TurnSubmitted: lambda event: self._on_submitted(event.turn),
            m.TurnCancelled: self._on_cancelled,
            m.TurnStarted: self.dispatcher.on_started,
            m.TurnFinished: self._on_finished,
            m.ChunksReady: self.saver.on_ready,
            m.ChunksSaved: self.saver.on_saved,
            m.ChunkFetched: self.fetcher.on_fetched,
            m.ChunkDemoted: self.evictor.on_demoted,
            m.ChunkDropped: self.evictor.on_dropped,
            m.ChunkLost: self.evictor.on_lost,
            m.CommandFailed: self._on_failed,
            m.NodeJoined: self._on_node_joined,
            m.NodeLost: self._on_node_lost,
            m.ReplicaReady: self._on_replica_ready,
            m.ReplicaLost: self._on_replica_lost,
            m.ReplicaClosing: self._on_replica_closing,
            m.SessionExpected: self.administrator.on_expected,
            m.SessionPinned: self.administrator.on_pinned,
            m.SessionExpired: self.administrator.on_expired,
            m.SessionDeleted: self.administrator.on_deleted,
            m.PrefixLifetimeSet: self.steward.on_lifetime_set,
            m.PrefixPinned: self.steward.on_pinned,
            m.PrefixExpired: self.steward.on_expired,
            m.PrefixDeleted: self.steward.on_deleted,
            m.Tick: self._on_tick,
        }
        self._counter_names = {kind: f"events.{kind.__name__}" for kind in self._handlers}

    def _policy(self, kind: str, given: object | None) -> object:
        policy = load_policy(kind, getattr(self.config, kind)) if given is None else given
        require_verbs(kind, policy, _VERBS[kind])
        return policy

    # --- the door -----------------------------------------------------------------------------------------------------

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """One event at the time `now` (seconds, any origin; never backwards). Returns the commands, in order."""
        board = self.board
        board.begin(now)
        board.counters[self._counter_names[type(event)]] += 1
        board.timers.run_due(board.now)
        self._handlers[type(event)](event)
        self.steward.proceed(SLICE)
        self._settle()
        board.candidates.settle()
        board.guard.settle()
        return board.outbox

    def _settle(self) -> None:
        """What follows from the event: watermarks, offers that fit now, turns that can go, fetches ahead."""
        for _ in range(MAX_ROUNDS):
            self._settle_places()
            self._settle_chunks()
            self._settle_nodes()
            self.dispatcher.run()
            self.fetcher.prefetch()
            board = self.board
            if not (board.changed_places or board.changed_chunks or board.freed_nodes):
                return

    def _settle_places(self) -> None:
        self.evictor.retire_superseded()
        self.administrator.retire_doomed()
        places, self.board.changed_places = self.board.changed_places, set()
        for place in sorted(places):
            self.evictor.relieve(place)

    def _settle_chunks(self) -> None:
        self.board.candidates.settle()
        keys, self.board.changed_chunks = self.board.changed_chunks, set()
        raised, self.board.raised_chunks = self.board.raised_chunks, set()
        for key in sorted(keys):
            self.dispatcher.note_chunk(key)
            chunk = self.board.catalog.chunks.get(key)
            if chunk is not None:
                self.administrator.note_chunk(chunk)
            if chunk is not None and chunk.next_use is not None and key not in raised:
                self.fetcher.note_waiting(chunk.next_use)

    def _settle_nodes(self) -> None:
        nodes, self.board.freed_nodes = self.board.freed_nodes, set()
        for node_id in sorted(nodes):
            self.saver.retry(node_id)
            self.dispatcher.note_freed(node_id)
            self.fetcher.note_freed(node_id)

    # --- events that concern several desks ----------------------------------------------------------------------------

    def _on_submitted(self, turn: m.Turn) -> None:
        is_new = self.board.sessions.note_turn(turn.session_id, turn.turn_id, turn.num_prompt_tokens)
        if is_new and turn.reuse:
            self.board.candidates.note_prompt(turn.prompt, self.board.now)
        self.administrator.note_submitted(turn)
        self.dispatcher.submit(turn)

    def _on_finished(self, event: m.TurnFinished) -> None:
        turn = self.dispatcher.on_finished(event)
        session = self.board.sessions.get(turn.session_id) if turn is not None else None
        if turn is not None and session is not None and turn.reuse:
            self.board.candidates.note_answer(turn.prompt, session.turn, session.answer_tokens, self.board.now)

    def _on_cancelled(self, event: m.TurnCancelled) -> None:
        if not self.dispatcher.cancel(event.turn_id):
            self.board.note_stale("TurnCancelled")

    def _on_failed(self, event: m.CommandFailed) -> None:
        command = event.command
        match command:
            case m.Dispatch():
                self.dispatcher.on_dispatch_failed(command)
            case m.Save():
                self.saver.on_save_failed(command)
            case m.Fetch():
                self.fetcher.on_fetch_failed(command)
            case m.Demote():
                self.evictor.on_demote_failed(command)
            case m.Drop():
                self.evictor.on_drop_failed(command)
            case m.Decline() | m.Cancel() | m.Forget():
                pass  # a Cancel has its own deadline, the others need no answer

    def _on_node_joined(self, event: m.NodeJoined) -> None:
        """The same node again replaces what was known of it: its shared place and its replicas stay."""
        if event.node_id in self.board.fleet.nodes:
            self._forget_node(event.node_id)
        node = self.board.fleet.add_node(event)
        for place in node.places:
            spec = node.tiers[place.tier]
            account = self.board.catalog.accounts.get(place)
            if account is None:
                self.board.catalog.accounts[place] = Account(spec.budget_bytes, spec.bytes_per_s)
            else:
                account.revise(spec)
        deleted = self.administrator.find_deleted(event.inventory)
        self.saver.adopt_inventory(event)
        self.administrator.doom(deleted)
        self.board.changed_places.update(node.places)
        self.board.freed_nodes.add(event.node_id)
        self.dispatcher.note_change()
        self.fetcher.note_fleet()

    def _on_node_lost(self, event: m.NodeLost) -> None:
        if event.node_id not in self.board.fleet.nodes:
            self.board.note_stale("NodeLost")
            return
        self._forget_node(event.node_id)
        self.dispatcher.note_lost(event.node_id)

    def _forget_node(self, node_id: m.NodeId) -> None:
        self.saver.forget_node(node_id)
        self.evictor.lose_places(node_id)
        self.board.fleet.remove_node(node_id)
        self.fetcher.note_fleet()

    def _on_replica_ready(self, event: m.ReplicaReady) -> None:
        """The same replica again: it restarted, and what ran on it and lay in its write buffer is gone."""
        if event.replica_id in self.board.fleet.replicas:
            self._forget_replica(event.replica_id)
        self.board.fleet.add_replica(event)
        self.dispatcher.note_change()
        self.fetcher.note_fleet()

    def _on_replica_lost(self, event: m.ReplicaLost) -> None:
        if event.replica_id not in self.board.fleet.replicas:
            self.board.note_stale("ReplicaLost")
            return
        self._forget_replica(event.replica_id)

    def _on_replica_closing(self, event: m.ReplicaClosing) -> None:
        if event.replica_id not in self.board.fleet.replicas:
            self.board.note_stale("ReplicaClosing")
            return
        self.board.fleet.close_replica(event.replica_id)
        self.dispatcher.note_change()
        self.fetcher.note_fleet()

    def _forget_replica(self, replica_id: m.ReplicaId) -> None:
        self.dispatcher.forget_replica(replica_id)
        self.saver.forget_replica(replica_id)
        self.board.fleet.remove_replica(replica_id)
        self.fetcher.note_fleet()

    def _on_tick(self, _: m.Tick) -> None:
        self.board.catalog.expire(self.board.now)
        self.steward.proceed(TICK_SLICE)
        self.board.changed_places.update(self.board.catalog.accounts)
        self.fetcher.note_time()

    # --- looking in ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """AssertionError unless every index agrees with every other (see invariants.py). Slow: for tests and doubts."""
        from policies.invariants import check

        check(self)

    @property
    def num_waiting(self) -> int:
        """Turns in the queue; without those that are only expected."""
        return len(self.board.queue) - len(self.administrator.expected)

    def turns_of(self, session_id: m.SessionId) -> list[m.TurnId]:
        """The session's turns that wait or run."""
        return self.administrator.turns_of(session_id)

    def where(self, marks: Sequence[m.ChunkKey]) -> list[inspection.ChunkView]:
        """The chunks that hold these marks (ascending), in order, each once, with their copies in any state."""
        return inspection.where(self.board.catalog, marks)

    def queue_view(self, limit: int) -> list[inspection.WaitingView]:
        """The first `limit` turns that wait, in order."""
        return inspection.queue_view(self, limit)

    def snapshot(self) -> dict[str, Any]:
        """Plain numbers, for metrics."""
        return inspection.snapshot(self)
