"""The scheduler's actor as a plain class: administration, full queues, turns that never came to their replica."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

import actors.scheduler as scheduler_module
from actors.scheduler import Assignment, QueueFull, SchedulerActor, SessionGone
from actors.unheard import Unheard
from policies import messages as m
from policies.messages import Tier
from tests.policies.texts import Tokens, chunks_of, key_of, marks_of, text, turn_of

A, B = text(1, 4), text(2, 4)
CONFIG = m.SchedulerConfig()


class Method:
    """As a handle's method is called."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class FakeReplica:
    """Notes what it is told, and holds the attempts it was given."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.held: set[tuple[str, int]] = set()

    def __getattr__(self, verb: str) -> Method:
        async def call(*arguments: Any) -> Any:
            self.told.append((verb, arguments))
            return arguments in self.held if verb == "holds" else None

        return Method(call)


class FakeStore:
    """Does at once as it is told."""

    async def _run(self, command: m.Command, _: list[Any]) -> list[m.Event]:
        match command:
            case m.Save():
                return [m.ChunksSaved(node_id=command.node_id, chunks=tuple(info.key for info in command.chunks))]
            case m.Drop():
                return [m.ChunkDropped(node_id=command.node_id, chunk=command.chunk, tier=command.tier)]
        raise TypeError(command)

    @property
    def run(self) -> Method:
        return Method(self._run)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def make(slots: int = 1) -> tuple[SchedulerActor, FakeReplica, Clock]:
    clock, replica = Clock(), FakeReplica()
    actor = SchedulerActor(CONFIG, silence_s=1e9, clock=clock)
    tiers = (m.TierSpec(tier=Tier.DRAM, budget_bytes=1000),)
    await actor.join_node(m.NodeJoined(node_id="n1", tiers=tiers), FakeStore())
    ready = m.ReplicaReady(replica_id="r1", node_id="n1", max_running_turns=slots, max_running_tokens=1000)
    await actor.join_replica(ready, replica, None)
    return actor, replica, clock


def submitting(
    actor: SchedulerActor, turn_id: str, tokens: Tokens, max_waiting: int | None = None
) -> asyncio.Task[Assignment]:
    return asyncio.get_running_loop().create_task(actor.submit(turn_of(turn_id, tokens), max_waiting))


async def offer(actor: SchedulerActor, tokens: Tokens, session_id: str) -> None:
    chunks = chunks_of(tokens)
    await actor.report([m.ChunksReady(replica_id="r1", node_id="n1", session_id=session_id, chunks=chunks)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)


# --- full queues ------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_further_turns() -> None:
    async def live() -> None:
        actor, _, _ = await make()
        await actor.submit(turn_of("a/1", A), 1)
        waiting = submitting(actor, "b/1", B, 1)
        await asyncio.sleep(0)
        await actor.expect(turn_of("x", A, session_id="x"), 60.0)
        with pytest.raises(QueueFull, match="1 turns wait already") as caught:
            await actor.submit(turn_of("d/1", B), 1)
        copied = pickle.loads(pickle.dumps(caught.value))
        assert (copied.num_waiting, str(copied)) == (1, str(caught.value))
        again = submitting(actor, "b/1", B, 1)  # another attempt takes the place of the first
        await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await actor.report([m.TurnFinished(turn_id="a/1", replica_id="r1")])
        assert (await again).dispatch.turn_id == "b/1"

    asyncio.run(live())


@pytest.mark.usefixtures("local_ray")
def test_a_caller_in_another_process_can_tell_a_full_queue() -> None:
    actor = ray.remote(SchedulerActor).options(num_cpus=0).remote(CONFIG, 60.0)
    assert ray.get(actor.queue_view.remote(9), timeout=60) == []  # it runs: earlier calls may overtake one another
    waiting = actor.submit.remote(turn_of("a/1", A))
    while not ray.get(actor.queue_view.remote(9), timeout=60):
        time.sleep(0.01)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(actor.submit.remote(turn_of("b/1", B), max_waiting=1), timeout=60)
    assert isinstance(caught.value.cause, QueueFull)
    assert caught.value.cause.num_waiting == 1
    assert ray.get(actor.queue_view.remote(9), timeout=60)[0].turn_id == "a/1"
    assert ray.wait([waiting], timeout=0)[0] == []
    ray.kill(actor)


# --- administration ---------------------------------------------------------------------------------------------------


def test_a_deleted_session_is_gone_everywhere() -> None:
    async def live() -> None:
        actor, replica, _ = await make()
        await offer(actor, A, "a")
        running = await actor.submit(turn_of("x/1", B))
        waiting = submitting(actor, "a/1", A)
        await asyncio.sleep(0)
        marks = [mark.key for mark in marks_of(A)]
        assert [view.key for view in await actor.where(marks)] == [key_of(A)]
        assert [view.turn_id for view in await actor.queue_view(9)] == ["a/1"]
        await actor.delete("a", marks_of(A), 60.0)
        with pytest.raises(SessionGone, match="session a was deleted"):
            await waiting
        await asyncio.sleep(0.01)
        assert await actor.where(marks) == []
        assert ("forget", ((key_of(A),),)) in replica.told
        await offer(actor, A, "a")
        assert ("drop_chunks", ((key_of(A),),)) in replica.told
        assert running.dispatch.turn_id == "x/1"
        await actor.check()

    asyncio.run(live())


def test_pins_expectations_and_closing_are_heard() -> None:
    async def live() -> None:
        actor, _, _ = await make()
        await offer(actor, A, "a")
        await actor.pin("a", marks_of(A), 60.0)
        await actor.expect(turn_of("soon", A, session_id="a"), 60.0)
        await actor.expire("a", marks_of(A))
        await actor.close_replica("r1")
        figures = await actor.snapshot()
        assert (figures["sessions_pinned"], figures["sessions_expected"]) == (1, 1)
        assert figures["fleet"][0]["closing"]
        assert figures["counters"]["events.SessionExpired"] == 1
        waiting = submitting(actor, "b/1", B)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(live())


def test_what_is_said_about_prefixes_is_heard() -> None:
    async def live() -> None:
        actor, replica, _ = await make()
        await offer(actor, A, "a")
        prefix = m.Mark(4, key_of(A))
        await actor.set_lifetime(prefix, 60.0)
        await actor.pin_prefix(prefix, 60.0)
        await actor.expire_prefix(prefix)
        figures = await actor.snapshot()
        assert (figures["prefixes_with_lifetimes"], figures["leases"]) == (1, 1)
        await actor.delete_prefix(prefix, 60.0)
        await asyncio.sleep(0.01)
        assert (await actor.snapshot())["chunks"] == 0
        assert replica.told == [("forget", ((key_of(A),),))]

    asyncio.run(live())


# --- turns that never came to their replica ---------------------------------------------------------------------------


async def pass_time(clock: Clock, seconds: float) -> None:
    clock.now += seconds
    await asyncio.sleep(3 * scheduler_module.TICK_S)


def test_the_slot_of_a_turn_whose_client_died_is_freed() -> None:
    async def live() -> None:
        actor, replica, clock = await make()
        await actor.submit(turn_of("a/1", A))
        waiting = submitting(actor, "b/1", B)
        await pass_time(clock, scheduler_module.UNHEARD_S - 1.0)
        assert not waiting.done()
        await pass_time(clock, 2.0)
        assert (await waiting).dispatch.turn_id == "b/1"
        assert replica.told == [("holds", ("a/1", 1))]

    asyncio.run(live())


def test_a_turn_that_restores_for_long_keeps_its_slot() -> None:
    async def live() -> None:
        actor, replica, clock = await make()
        replica.held.add(("a/1", 1))
        await actor.submit(turn_of("a/1", A))
        for count in (1, 2):
            await pass_time(clock, scheduler_module.UNHEARD_S + 1.0)
            assert replica.told == [("holds", ("a/1", 1))] * count
        assert (await actor.snapshot())["turns_running"] == 1
        await actor.report([m.TurnStarted(turn_id="a/1", replica_id="r1", attempt=1)])
        await pass_time(clock, scheduler_module.UNHEARD_S + 1.0)
        assert len(replica.told) == 2, "it was heard of"

    asyncio.run(live())


def dispatch(turn_id: str, attempt: int, replica_id: str = "r1") -> m.Dispatch:
    return m.Dispatch(turn_id=turn_id, replica_id=replica_id, plan=m.RestorePlan(), attempt=attempt)


def test_what_ends_the_waiting_for_a_word() -> None:
    unheard = Unheard(10.0)
    for attempt in range(1, 7):
        unheard.expect(dispatch("t", attempt, "r2" if attempt == 4 else "r1"), float(attempt))
    unheard.note(m.TurnStarted(turn_id="t", replica_id="r1", attempt=1))
    unheard.note(m.TurnFinished(turn_id="t", replica_id="r1", attempt=2))
    unheard.note(m.CommandFailed(command=dispatch("t", 3), reason="?"))
    unheard.note(m.ReplicaLost("r2"))
    unheard.note(m.Tick())
    assert unheard.overdue(14.9) == []
    assert unheard.overdue(15.0) == [dispatch("t", 5)]
    assert unheard.overdue(16.0) == [dispatch("t", 6)]
    assert unheard.overdue(25.0) == [dispatch("t", 5)], "asked for again"
    assert unheard.forget(dispatch("t", 5))
    assert not unheard.forget(dispatch("t", 5))
    assert len(unheard) == 1
