"""The laboratory's timed run: a virtual clock drives the real scheduler and the real policies over a trace.

    arrivals, follow-ups ──> Scheduler.handle(event, now) ──> commands ──> replicas (engine), node stores (links)
                                      ^                                          |
                                      └───────────────── events ─────────────────┘

Closed loop: a follow-up is submitted at its recorded arrival (scaled to the offered load) or `think_s` after the end of
its parent, whichever is later. Same trace, set-up, policies and seed: same result, on every machine. Nobody cancels,
nothing dies; commands may fail (`Setup.failure_share`). See `marks`, `engine` and `links` for what is modelled.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

from policies import messages as m
from policies.scheduler import Scheduler
from policies.simulator.clock import Clock
from policies.simulator.hardware import SetupError
from policies.simulator.load import arrival_scale
from policies.simulator.marks import Marker
from policies.simulator.node import NodeStore, Shelf, Surroundings
from policies.simulator.records import QueueLog, TurnRecord
from policies.simulator.replica import Replica, ReplicaHabits
from policies.simulator.result import SimulationResult, summarise
from policies.simulator.setup import Setup
from policies.simulator.trace import Request, Trace

Stopwatch = Callable[[], float]
EventSink = Callable[[float, m.Event, list[m.Command]], None]
"""Hears of every event, when it was handled, and the commands that came of it."""

Progress = Callable[[int, int], None]
"""Told now and then how many turns are over, and of how many."""

POLICY_KINDS = ("eviction", "prefetch", "placement", "admission", "serving_order")
PATIENCE_S = 600.0  # virtual seconds in which the scheduler must have found something to do for waiting turns
TOLD_EVERY = 500  # turns
SETTLE_EVERY = 10_000  # likewise
ADVICE_ENDS_S = 1.0  # after the follow-up should have come


class SimulationStuck(RuntimeError):  # noqa: N818 - named like what happened
    """Turns wait and nothing will ever happen: a fault of the scheduler or of the simulator."""


def simulate(
    trace: Trace,
    setup: Setup,
    *,
    policies: Mapping[str, object] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    event_sink: EventSink | None = None,
    stopwatch: Stopwatch | None = None,
) -> SimulationResult:
    """Run the whole trace. `policies`: import paths or objects by kind (see POLICY_KINDS), in place of the set-up's; an
    object serves one run. With a `stopwatch` (seconds) policies that are too slow are found out; then a run is as
    deterministic as they are quick. SetupError, TraceError with advice for what cannot be run."""
    simulation = Simulation(trace, setup, policies=policies, seed=seed, event_sink=event_sink, stopwatch=stopwatch)
    return simulation.run(progress)


def marker_of(trace: Trace, setup: Setup) -> Marker:
    """What the trace's requests look like to this set-up's scheduler."""
    return Marker(
        trace,
        setup.chunk_tokens,
        setup.model.kv_bytes_per_token,
        reuse=setup.reuse,
        reuse_after_truncation=setup.reuse_after_truncation,
    )


class Simulation:
    """One run. The parts can be looked at between `step`s."""

    def __init__(
        self,
        trace: Trace,
        setup: Setup,
        *,
        policies: Mapping[str, object] | None = None,
        seed: int = 0,
        event_sink: EventSink | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.trace, self.setup = trace, setup
        config, objects = _policies(setup.scheduler, policies or {})
        self.scheduler = Scheduler(config, stopwatch=stopwatch, **objects)
        self.policy_names = {kind: _name_of(objects.get(kind, getattr(config, kind))) for kind in POLICY_KINDS}
        self.clock = Clock()
        self.around = Surroundings(self.clock, Random(seed), setup.failure_share)
        self.marker = marker_of(trace, setup)
        self.records: dict[m.TurnId, TurnRecord] = {}
        self.queue = QueueLog()
        self.num_ended = 0
        self._requests: dict[m.TurnId, Request] = {}
        self._seed, self._sink = seed, event_sink
        self._scale = arrival_scale(trace, setup)
        self._next_tick = setup.tick_s
        self._idle_ticks = 0
        self._build()
        self._doers: dict[type, Callable[[Any], None]] = {
            m.Dispatch: self._dispatch,
            m.Save: self._save,
            m.Decline: lambda command: self.replicas[command.replica_id].forget(command),
            m.Fetch: lambda command: self.stores[command.node_id].fetch(command),
            m.Demote: lambda command: self.stores[command.node_id].demote(command),
            m.Drop: lambda command: self.stores[command.node_id].drop(command),
        }  # nobody cancels turns or deletes sessions here
        self._roots = (request for request in trace if self.marker.parent_of(request) is None)
        self._expect_root()

    def _build(self) -> None:
        """Nodes join, then their replicas."""
        setup, budgets = self.setup, self.setup.tier_bytes
        self.bucket = Shelf(budgets.get(m.Tier.OBJECT, 0))
        self.stores: dict[m.NodeId, NodeStore] = {}
        self.replicas: dict[m.ReplicaId, Replica] = {}
        numbers = count()
        for i in range(setup.num_nodes):
            shelves = {tier: Shelf(budget) for tier, budget in budgets.items()}
            if m.Tier.OBJECT in shelves:
                shelves[m.Tier.OBJECT] = self.bucket
            store = NodeStore(f"n{i}", shelves, setup.links, self.around, self.stores, setup.drop_s)
            self.stores[store.node_id] = store
            self.around.mail.append(m.NodeJoined(node_id=store.node_id, tiers=_tiers(setup)))
            for _ in range(setup.replicas_per_node):
                replica = self._make_replica(f"r{next(numbers)}", store)
                self.replicas[replica.spec.replica_id] = replica
                self.around.mail.append(replica.spec)

    def _make_replica(self, replica_id: m.ReplicaId, store: NodeStore) -> Replica:
        setup, speed = self.setup, self.setup.speed
        spec = m.ReplicaReady(
            replica_id=replica_id,
            node_id=store.node_id,
            max_running_turns=setup.max_running_turns,
            max_running_tokens=speed.kv_tokens,
            prefill_tokens_per_s=1 / speed.prefill_s_per_token,
        )
        habits = ReplicaHabits(
            bytes_per_token=setup.model.kv_bytes_per_token,
            num_loaders=setup.num_loaders,
            load_deadline_s=setup.load_deadline_s,
            offer_early=setup.offer_early,
            reuse=setup.reuse,
        )
        return Replica(spec, store, setup.links, speed, habits, self.marker, self.around, self._on_end)

    # --- clients ------------------------------------------------------------------------------------------------------

    def _arrival_s(self, request: Request) -> float:
        """When the request would come if nothing kept it: the first one at 0."""
        return (request.arrival_s - self.trace.requests[0].arrival_s) * self._scale

    def _expect_root(self) -> None:
        request = next(self._roots, None)
        if request is not None:
            self.clock.at(self._arrival_s(request), self._submit_root, request)

    def _submit_root(self, request: Request) -> None:
        self._expect_root()
        self._submit(request)

    def _submit(self, request: Request) -> None:
        turn, now = self.marker.turn(request), self.clock.now
        self._requests[turn.turn_id] = request
        self.records[turn.turn_id] = TurnRecord(
            request.request_id,
            request.session_id,
            request.input_tokens,
            max(1, request.output_tokens),
            now,
            self.marker.num_truncated(request),
        )
        self.queue.change(now, +1)
        self.around.mail.append(m.TurnSubmitted(turn))

    def _on_end(self, request: Request) -> None:
        """The turn is over; people think, and go on."""
        self.num_ended += 1
        del self._requests[f"t{request.request_id}"]
        for child in self.marker.children.get(request.request_id, ()):
            when = max(self.clock.now + (child.think_s or 0.0), self._arrival_s(child))
            if self.setup.advice_s:
                self.clock.at(max(self.clock.now, when - self.setup.advice_s), self._advise, child, when)
            self.clock.at(when, self._submit, child)

    def _advise(self, request: Request, when: float) -> None:
        """A client says that it is about to go on, and leaves some time for being late."""
        seconds = 2 * (when - self.clock.now) + ADVICE_ENDS_S
        self.around.mail.append(m.SessionExpected(turn=self.marker.outlook(request), seconds=seconds))

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """What was said now is heard now, in order."""
        mail = self.around.mail
        while mail:
            self._hear(mail.popleft())

    def _hear(self, event: m.Event) -> None:
        commands = self.scheduler.handle(event, self.clock.now)
        if self._sink is not None:
            self._sink(self.clock.now, event, commands)
        for command in commands:
            self._doers[type(command)](command)
        if commands:
            self._idle_ticks = 0

    def _dispatch(self, command: m.Dispatch) -> None:
        record, now = self.records[command.turn_id], self.clock.now
        record.dispatched_at, record.replica_id = now, command.replica_id
        self.queue.change(now, -1)
        self.replicas[command.replica_id].begin(command, self._requests[command.turn_id], record)

    def _save(self, command: m.Save) -> None:
        replica = self.replicas[command.replica_id]
        self.stores[command.node_id].save(command, replica.buffer, replica.save_link)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _is_pending(self) -> bool:
        """Whether time passing could matter to the scheduler."""
        return bool(self._requests) or any(replica.buffer for replica in self.replicas.values())

    def step(self) -> None:
        """Whatever comes next: an action, or a Tick. SimulationStuck when nothing ever will."""
        self._drain()
        next_at = self.clock.next_at
        if next_at is not None and next_at > self._next_tick and not self._is_pending():
            self._next_tick = next_at
        if next_at is not None and next_at <= self._next_tick:
            self.clock.run_next()
        else:
            self._tick(is_idle=next_at is None)

    def _tick(self, is_idle: bool) -> None:
        self.clock.advance(self._next_tick)
        self._next_tick += self.setup.tick_s
        self._idle_ticks = self._idle_ticks + 1 if is_idle else 0
        if self._idle_ticks * self.setup.tick_s > PATIENCE_S:
            waiting = ", ".join(list(self._requests)[:5])
            raise SimulationStuck(
                f"{self.trace.name} on {self.setup.name}: {len(self._requests)} turns wait ({waiting}, ...) and for "
                f"{PATIENCE_S:.0f} s nothing has happened; {self.num_ended} of {len(self.trace)} turns are over"
            )
        self._hear(m.Tick())

    def run(self, progress: Progress | None = None) -> SimulationResult:
        """To the end of the last turn; what is still being written then is not waited for."""
        num_turns, told, settled = len(self.trace), 0, 0
        try:
            while self.num_ended < num_turns:
                self.step()
                if progress is not None and self.num_ended >= told + TOLD_EVERY:
                    told = self.num_ended
                    progress(told, num_turns)
                if self.num_ended >= settled + SETTLE_EVERY:
                    settled = self.num_ended
                    gc.collect()
                    gc.freeze()  # what is known by now lives on: later passes of the collector need not walk over it
        finally:
            if settled:
                gc.unfreeze()
        self._drain()
        return summarise(self, self._seed)


def _tiers(setup: Setup) -> tuple[m.TierSpec, ...]:
    links = setup.links
    speeds = {m.Tier.DRAM: links.dram_load, m.Tier.SSD: links.ssd_read, m.Tier.OBJECT: links.object_read}
    return tuple(
        m.TierSpec(tier=tier, budget_bytes=budget, bytes_per_s=speeds[tier])
        for tier, budget in setup.tier_bytes.items()
    )


def _name_of(policy: object) -> str:
    return policy if isinstance(policy, str) else f"{type(policy).__module__}:{type(policy).__qualname__}"


def _policies(config: m.SchedulerConfig, given: Mapping[str, object]) -> tuple[m.SchedulerConfig, dict[str, Any]]:
    """Import paths go into the config, objects to the scheduler."""
    unknown = set(given) - set(POLICY_KINDS)
    if unknown:
        raise SetupError(f"no policy of kind {sorted(unknown)[0]!r}: choose from {', '.join(POLICY_KINDS)}")
    paths: dict[str, Any] = {kind: policy for kind, policy in given.items() if isinstance(policy, str)}
    return replace(config, **paths), {kind: policy for kind, policy in given.items() if not isinstance(policy, str)}
