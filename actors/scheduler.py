"""The scheduler's Ray shell: feeds events to the pure scheduler, in order, and carries out what it says.

It decides nothing and holds no KV: it knows handles of node stores and replicas, and the futures of clients that wait
for their turn's dispatch. A command's outcome comes back as the next event. What it hears and says can be
recorded (recorder.py). If this actor dies, Ray restarts it empty; node stores and replicas notice at their next
heartbeat and register again, clients submit again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, RayError

from actors import garbage
from actors.recorder import Recorder, RecordPlan
from actors.unheard import Unheard
from policies import messages as m
from policies.inspection import ChunkView, WaitingView
from policies.places import SHARED
from policies.scheduler import Scheduler

log = logging.getLogger(__name__)

TICK_S = 0.05
SETTLE_EVERY_S = 1.0  # see garbage.py
UNHEARD_S = 10.0  # a dispatched turn of which nothing was heard for so long is asked for


class QueueFull(RuntimeError):  # noqa: N818 - named like what happened
    """As many turns wait as the submitter allows. Reaches callers in another process as a RayTaskError's `cause`."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(num_waiting)
        self.num_waiting = num_waiting

    def __str__(self) -> str:
        return f"{self.num_waiting} turns wait already; submit again later"


class SessionGone(RuntimeError):  # noqa: N818 - named like what happened
    """The turn's session was deleted while the turn waited. Reaches callers like QueueFull."""


class Draining(RuntimeError):  # noqa: N818 - named like what happens
    """The cluster is being taken down: it takes no new turns. Reaches callers like QueueFull."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The answer to a submission: run it there, by this plan."""

    dispatch: m.Dispatch
    replica: Any  # actor handle; None for those who know it: a handle takes longer than all the rest


@dataclass(slots=True)
class _Member:
    handle: Any
    last_heard: float


class SchedulerActor:
    """Plain class; becomes an async actor in cluster/bringup.py."""

    def __init__(
        self,
        config: m.SchedulerConfig,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
        record: RecordPlan | None = None,
    ) -> None:
        self._scheduler = Scheduler(config, stopwatch=time.perf_counter)
        self._recorder = Recorder(record, config, time.time()) if record is not None else None
        self._silence_s = silence_s
        self._clock = clock
        self._stores: dict[m.NodeId, _Member] = {}
        self._replicas: dict[m.ReplicaId, _Member] = {}
        self._exporters: dict[m.ReplicaId, Any] = {}  # shards, from which node stores pull new chunks
        self._waiting: dict[m.TurnId, asyncio.Future[Assignment]] = {}
        self._unheard = Unheard(UNHEARD_S)
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None

    # --- members ------------------------------------------------------------------------------------------------------

    async def join_node(self, event: m.NodeJoined, store: Any) -> None:
        self._stores[event.node_id] = _Member(store, self._clock())
        self._hear([event])

    async def join_replica(self, event: m.ReplicaReady, replica: Any, exporter: Any) -> None:
        self._replicas[event.replica_id] = _Member(replica, self._clock())
        self._exporters[event.replica_id] = exporter
        self._hear([event])

    async def heartbeat(self, member_id: str) -> bool:
        """False: this scheduler does not know the caller, which must join again."""
        member = self._stores.get(member_id) or self._replicas.get(member_id)
        if member is None:
            return False
        member.last_heard = self._clock()
        return True

    async def replica_lost(self, replica_id: m.ReplicaId) -> None:
        """A client saw the replica die."""
        self._lose_replica(replica_id)

    # --- turns --------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        turn: m.Turn,
        max_waiting: int | None = None,
        known: frozenset[m.ReplicaId] = frozenset(),
        is_new: bool = True,
    ) -> Assignment:
        """Returns when the turn may run. The same turn_id again replaces an earlier attempt. `known` are the replicas
        whose handles the caller has.

        QueueFull when `max_waiting` turns wait already, Draining when no more are taken: neither of them for a turn
        that was taken once and is not new. SessionGone when its session is deleted meanwhile.
        """
        num_waiting = self._scheduler.num_waiting
        is_new = is_new and turn.turn_id not in self._waiting
        if is_new and self._is_draining:
            raise Draining("this cluster is being taken down")
        if is_new and max_waiting is not None and num_waiting >= max_waiting:
            raise QueueFull(num_waiting)
        earlier = self._waiting.pop(turn.turn_id, None)
        if earlier is not None:
            earlier.cancel()
        future: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        self._waiting[turn.turn_id] = future
        self._hear([m.TurnSubmitted(turn)])
        try:
            assignment = await future
        finally:
            if self._waiting.get(turn.turn_id) is future:
                del self._waiting[turn.turn_id]
        return replace(assignment, replica=None) if assignment.dispatch.replica_id in known else assignment

    async def drain(self) -> None:
        """From now on no new turns are taken."""
        self._is_draining = True

    async def cancel(self, turn_id: m.TurnId) -> None:
        future = self._waiting.pop(turn_id, None)
        if future is not None:
            future.cancel()
        self._hear([m.TurnCancelled(turn_id)])

    # --- sessions, prefixes, replicas, looking in ---------------------------------------------------------------------

    async def expect(self, turn: m.Turn, seconds: float) -> None:
        """The turn's session will speak soon. See SessionExpected."""
        self._hear([m.SessionExpected(turn=turn, seconds=seconds)])

    async def pin(self, session_id: m.SessionId, prompt: tuple[m.Mark, ...], seconds: float) -> None:
        """What is stored of this prompt stays stored. See SessionPinned."""
        self._hear([m.SessionPinned(session_id=session_id, prompt=prompt, seconds=seconds)])

    async def expire(self, session_id: m.SessionId, prompt: tuple[m.Mark, ...]) -> None:
        """The session is over. See SessionExpired."""
        self._hear([m.SessionExpired(session_id=session_id, prompt=prompt)])

    async def delete(self, session_id: m.SessionId, prompt: tuple[m.Mark, ...], seconds: float) -> None:
        """Nothing of the session is kept anywhere. See SessionDeleted. Returns before it is gone: `where` tells."""
        for turn_id in self._scheduler.turns_of(session_id):
            future = self._waiting.pop(turn_id, None)
            if future is not None and not future.done():
                future.set_exception(SessionGone(f"session {session_id} was deleted"))
        self._hear([m.SessionDeleted(session_id=session_id, prompt=prompt, seconds=seconds)])

    async def set_lifetime(self, prefix: m.Mark, seconds: float | None) -> None:
        """How long what begins with it lives unused. See PrefixLifetimeSet."""
        self._hear([m.PrefixLifetimeSet(prefix=prefix, seconds=seconds)])

    async def pin_prefix(self, prefix: m.Mark, seconds: float) -> None:
        """What is stored of it stays stored. See PrefixPinned."""
        self._hear([m.PrefixPinned(prefix=prefix, seconds=seconds)])

    async def expire_prefix(self, prefix: m.Mark) -> None:
        """What is stored of it goes first. See PrefixExpired."""
        self._hear([m.PrefixExpired(prefix=prefix)])

    async def delete_prefix(self, prefix: m.Mark, seconds: float) -> None:
        """Nothing of it is kept anywhere. See PrefixDeleted. Returns before it is gone."""
        self._hear([m.PrefixDeleted(prefix=prefix, seconds=seconds)])

    async def close_replica(self, replica_id: m.ReplicaId) -> None:
        """It gets no further turns; `snapshot` tells what still runs there."""
        self._hear([m.ReplicaClosing(replica_id)])

    async def where(self, marks: Sequence[m.ChunkKey]) -> list[ChunkView]:
        """The chunks that hold these marks, and all their copies."""
        return self._scheduler.where(marks)

    async def queue_view(self, limit: int) -> list[WaitingView]:
        """The first turns that wait."""
        return self._scheduler.queue_view(limit)

    async def report(self, events: list[m.Event]) -> None:
        """Events from a replica or node store, in the order they happened."""
        self._hear(events)

    async def snapshot(self) -> dict[str, Any]:
        recording = self._recorder.state if self._recorder is not None else None
        return {**self._scheduler.snapshot(), "recording": recording}

    async def check(self) -> None:
        """Raises if the scheduler's indices contradict each other."""
        self._scheduler.check()

    async def stop_recording(self) -> None:
        """When this returns, everything that was heard so far is in the event log, and nothing more will be."""
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)

    # --- the loop: events in, commands out ----------------------------------------------------------------------------

    def _hear(self, events: Iterable[m.Event]) -> None:
        """A scheduler that contradicts itself ends here, and starts empty: that costs time, not an answer."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        try:
            for event in events:
                self._unheard.note(event)
                for command in self._answer(event, self._clock()):
                    self._do(command)
        except Exception:
            log.exception("the scheduler broke; it starts anew")
            if self._recorder is not None:
                self._recorder.close()
            os._exit(1)

    def _answer(self, event: m.Event, now: float) -> list[m.Command]:
        recorder = self._recorder
        if recorder is None:
            return self._scheduler.handle(event, now)
        try:
            commands = self._scheduler.handle(event, now)
        except Exception as error:
            recorder.note(now, event, (), error=f"{type(error).__name__}: {error}")
            raise
        recorder.note(now, event, commands, self._scheduler.board.guard.last_benched)
        return commands

    async def _tick(self) -> None:
        settled_at = self._clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            if now - settled_at > SETTLE_EVERY_S:
                garbage.settle()
                settled_at = now
            for node_id in [i for i, member in self._stores.items() if now - member.last_heard > self._silence_s]:
                self._lose_node(node_id)
            for replica_id in [i for i, member in self._replicas.items() if now - member.last_heard > self._silence_s]:
                self._lose_replica(replica_id)
            self._hear([m.Tick()])
            for dispatch in self._unheard.overdue(now):
                self._spawn(self._look_for(dispatch))
            if self._recorder is not None:
                self._spawn(asyncio.to_thread(self._recorder.flush))

    def _do(self, command: m.Command) -> None:
        match command:
            case m.Dispatch():
                self._dispatch(command)
            case m.Cancel():
                self._spawn(self._tell_replica(command.replica_id, "cancel", command))
            case m.Decline():
                self._spawn(self._tell_replica(command.replica_id, "drop_chunks", command.chunks))
            case m.Forget():
                self._spawn(self._tell_replica(command.replica_id, "forget", command.marks))
            case m.Save():
                self._spawn(self._run_on_store(command, self._exporters.get(command.replica_id)))
            case m.Fetch():
                is_elsewhere = command.source_node not in (command.node_id, SHARED)
                peer = self._stores.get(command.source_node) if is_elsewhere else None
                self._spawn(self._run_on_store(command, peer.handle if peer else None))
            case m.Demote() | m.Drop():
                self._spawn(self._run_on_store(command, None))

    def _dispatch(self, command: m.Dispatch) -> None:
        future = self._waiting.get(command.turn_id)
        member = self._replicas.get(command.replica_id)
        if member is None:
            self._later([m.CommandFailed(command=command, reason="the replica is gone")])
        elif future is None or future.done():  # its client is gone: give the slot back
            self._later([m.TurnCancelled(command.turn_id)])
        else:
            self._unheard.expect(command, self._clock())
            future.set_result(Assignment(command, member.handle))

    def _later(self, events: list[m.Event]) -> None:
        asyncio.get_running_loop().call_soon(self._hear, events)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_on_store(self, command: m.Save | m.Fetch | m.Demote | m.Drop, helper: Any) -> None:
        """`helper` is the actor that has the bytes: a shard (Save) or another node's store (Fetch)."""
        member = self._stores.get(command.node_id)
        if member is None:
            self._later([m.CommandFailed(command=command, reason="its node is gone")])
            return
        try:
            events: list[m.Event] = await member.handle.run.remote(command, [helper])
        except RayError as error:
            events = [m.CommandFailed(command=command, reason=str(error).splitlines()[0])]
            if isinstance(error, RayActorError) and self._stores.get(command.node_id) is member:
                self._lose_node(command.node_id)
        self._hear(events)

    async def _tell_replica(self, replica_id: m.ReplicaId, verb: str, argument: Any) -> None:
        member = self._replicas.get(replica_id)
        if member is None:
            return
        try:
            await getattr(member.handle, verb).remote(argument)
        except RayActorError:
            if self._replicas.get(replica_id) is member:
                self._lose_replica(replica_id)

    async def _look_for(self, dispatch: m.Dispatch) -> None:
        """A turn whose client died on the way to the replica never gets there: its slot is free."""
        member = self._replicas.get(dispatch.replica_id)
        if member is None:
            return
        turn_id, replica_id, attempt = dispatch.turn_id, dispatch.replica_id, dispatch.attempt
        try:
            is_there: bool = await member.handle.holds.remote(turn_id, attempt)
        except RayActorError:
            if self._replicas.get(replica_id) is member:
                self._lose_replica(replica_id)
        except RayError as error:  # it is asked for again
            log.warning("replica %s does not say whether it holds turn %s: %s", replica_id, turn_id, error)
        else:
            if not is_there and self._unheard.forget(dispatch):
                log.warning("turn %s never came to replica %s: its slot is free", turn_id, replica_id)
                self._hear([m.TurnFinished(turn_id=turn_id, replica_id=replica_id, attempt=attempt)])

    def _lose_node(self, node_id: m.NodeId) -> None:
        if self._stores.pop(node_id, None) is not None:
            log.warning("node store %s is lost", node_id)
            self._hear([m.NodeLost(node_id)])

    def _lose_replica(self, replica_id: m.ReplicaId) -> None:
        if self._replicas.pop(replica_id, None) is not None:
            self._exporters.pop(replica_id, None)
            log.warning("replica %s is lost", replica_id)
            self._hear([m.ReplicaLost(replica_id)])
