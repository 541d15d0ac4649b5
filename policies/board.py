"""What the scheduler's desks share: its state, the time of the event at hand, and the commands it will answer with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.candidates import Candidates
from policies.catalog import Catalog, Chunk, Copy, CopyState
from policies.fleet import Fleet
from policies.messages import Cause, ChunkKey, Command, NodeId, RestorePlan, SchedulerConfig
from policies.ordered import SortedKeys
from policies.outlook import Outlook, sessions_in
from policies.places import Place
from policies.plugins import Guard
from policies.queue import Order, WaitingQueue
from policies.sessions import Sessions
from policies.timers import Timers


@dataclass(slots=True)
class Board:
    """Shared state, and the notes one event leaves for the steps that follow it (`changed_*`, `freed_nodes`)."""

    config: SchedulerConfig
    catalog: Catalog
    queue: WaitingQueue
    fleet: Fleet
    candidates: Candidates
    guard: Guard
    sessions: Sessions
    timers: Timers = field(default_factory=Timers)
    counters: Counter[str] = field(default_factory=Counter)
    now: float = 0.0
    outbox: list[Command] = field(default_factory=list)
    changed_places: set[Place] = field(default_factory=set)  # more bytes there: look at the watermarks
    changed_chunks: set[ChunkKey] = field(default_factory=set)  # a copy came, went or failed: who waits for it?
    raised_chunks: set[ChunkKey] = field(default_factory=set)  # part of them: came to DRAM as was wanted, no more to do
    freed_nodes: set[NodeId] = field(default_factory=set)  # DRAM bytes or a fetch slot are free
    awaiting: set[Order] = field(default_factory=set)  # turns whose chunks are being brought: what came stays
    claims: dict[NodeId, SortedKeys[Order]] = field(default_factory=dict)  # who waits there for bytes or a fetch slot
    superseded: dict[ChunkKey, None] = field(default_factory=dict)  # to be dropped as soon as they are idle
    doomed: dict[ChunkKey, None] = field(default_factory=dict)  # deleted: likewise
    failed: dict[tuple[ChunkKey, Place], float] = field(default_factory=dict)  # do not try again before
    when_overdue: dict[CopyState, Callable[[Chunk, Copy], None]] = field(default_factory=dict)
    _outlook: Outlook | None = None

    def begin(self, now: float) -> None:
        """A new event: time never runs backwards."""
        self.now = max(self.now, now)
        self.outbox = []
        self._outlook = None

    def send(self, command: Command) -> None:
        self.outbox.append(command)
        self.counters[f"commands.{type(command).__name__}"] += 1

    def note_stale(self, what: str) -> None:
        """A late, repeated or out-of-order event that changes nothing."""
        self.counters[f"stale.{what}"] += 1

    def note_plan(self, plan: RestorePlan) -> None:
        """Count the prompt's tokens by where they come from, or why they are computed."""
        for step in plan.steps:
            self.counters[f"reused.{step.tier}"] += step.num_tokens
        for cause, num_tokens in plan.recomputed:
            self.counters[f"recomputed.{cause}"] += num_tokens

    def note_read(self, copy: Copy) -> None:
        """A turn is about to read this copy. The first that reads a fetched one tells how early the fetch was."""
        if copy.fetched_at is not None:
            self.counters["fetched.used"] += 1
            self.counters["fetched.lead_ms"] += round(1000 * (self.now - copy.fetched_at))
            copy.fetched_at = None

    def note_drop(self, copy: Copy, cause: Cause) -> None:
        """This copy leaves. A fetched one that nobody has read was fetched in vain."""
        self.counters[f"dropped.{cause}"] += 1
        if copy.fetched_at is not None:
            self.counters["fetched.unused"] += 1
            copy.fetched_at = None

    def outlook(self) -> Outlook:
        """The figures policies may see, as of this event."""
        if self._outlook is None:
            session_bytes = self.queue.mean_prompt_tokens * self.catalog.bytes_per_token
            budget_bytes = self.fleet.dram_budget_bytes + self.fleet.ssd_budget_bytes
            self._outlook = Outlook(
                num_waiting=len(self.queue),
                dram_budget_bytes=self.fleet.dram_budget_bytes,
                ssd_budget_bytes=self.fleet.ssd_budget_bytes,
                session_bytes=session_bytes,
                now=self.now,
                window_end=self.queue.nth(sessions_in(budget_bytes, session_bytes, len(self.queue))),
            )
        return self._outlook

    # --- deadlines of commands ----------------------------------------------------------------------------------------

    def expect(self, chunk: Chunk, copy: Copy, within_s: float) -> None:
        """The command behind this copy is to be answered in time, or `when_overdue` deals with it."""
        copy.deadline = self.now + within_s
        self.timers.at(copy.deadline, self._look_at, chunk, copy, copy.deadline)

    def _look_at(self, chunk: Chunk, copy: Copy, deadline: float) -> None:
        if chunk.copies.get(copy.place) is copy and copy.deadline == deadline and copy.state in self.when_overdue:
            self.counters[f"overdue.{copy.state}"] += 1
            self.when_overdue[copy.state](chunk, copy)

    # --- what failed a moment ago -------------------------------------------------------------------------------------

    def note_failure(self, key: ChunkKey, place: Place) -> None:
        """Bringing this chunk to this place failed: not again for `retry_s`."""
        until = self.now + self.config.retry_s
        self.failed[key, place] = until
        self.timers.at(until, self._forgive, key, place, until)

    def has_failed(self, key: ChunkKey, place: Place) -> bool:
        return (key, place) in self.failed

    def _forgive(self, key: ChunkKey, place: Place, until: float) -> None:
        if self.failed.get((key, place)) == until:
            del self.failed[key, place]
            self.changed_chunks.add(key)

    # --- who gets bytes that become free ------------------------------------------------------------------------------

    def claim(self, node_id: NodeId, order: Order) -> None:
        """DRAM bytes and fetch slots that become free there are for this order before later ones.

        Without it, bytes freed for a big chunk would go to a small one, for which room would be made again, and so on.
        """
        self.claims.setdefault(node_id, SortedKeys()).add(order)

    def disclaim(self, node_id: NodeId, order: Order) -> None:
        """No claim is fine."""
        orders = self.claims.get(node_id)
        if orders is not None and orders.discard(order) and not orders:
            del self.claims[node_id]

    def is_claimed(self, node_id: NodeId, by: Order) -> bool:
        """Whether somebody before this order waits for bytes or a slot there."""
        orders = self.claims.get(node_id)
        first = orders.lowest() if orders is not None else None
        return first is not None and first < by

    def claimants(self, node_id: NodeId, count: int) -> list[Order]:
        """The first of those who wait there."""
        orders = self.claims.get(node_id)
        return orders.first(count) if orders is not None else []
