"""A small cluster that carries out the scheduler's commands badly.

Commands wait until they are executed in any order; answers wait until they are heard in any order. In an unreliable
world commands and answers are also lost, repeated and late, nodes and replicas die and come back, copies rot. What is
really stored where is kept here, byte by byte, with the budgets that real stores would enforce. All choices come from a
byte string, so a failing run can be repeated and shrunk.
"""

from __future__ import annotations

from collections import Counter

from policies import messages as m
from policies.places import SHARED
from policies.scheduler import Scheduler
from tests.policies.parts import Choices, Deletion, Job, ReplicaSim, Setup, StoreSim, Talk, Task
from tests.policies.texts import C, Tokens, chunk_of, marks_of, tokens_of, turn_of

NUM_SYSTEM = 6  # tokens of the system prompt, which all conversations share


class World:
    """Feeds one scheduler and checks, after every event, both its indexes and what is really stored."""

    def __init__(self, setup: Setup, data: bytes, **policies: object) -> None:
        self.setup, self.choices = setup, Choices(data)
        self.scheduler = Scheduler(setup.config, **policies)  # type: ignore[arg-type]
        self.now = 0.0
        self.bucket: dict[str, m.ChunkInfo] = {}
        self.tasks: list[Task] = []
        self.mail: list[m.Event] = []
        self.talks: list[Talk] = []
        self.deletions: list[Deletion] = []
        self.stores = [self._make_store(f"n{number}") for number in range(setup.num_nodes)]
        self.replicas = [self._make_replica(number) for number in range(setup.num_replicas)]
        self.refusals: Counter[str] = Counter()  # commands a store could not carry out
        self.causes: Counter[m.Cause] = Counter()
        self.num_reused = 0
        for store in self.stores:
            self.mail.append(self.joined(store))
        for replica in self.replicas:
            self.mail.append(replica.spec)

    def _make_store(self, node_id: str) -> StoreSim:
        budgets = {m.Tier.DRAM: self.setup.dram_bytes, m.Tier.SSD: self.setup.ssd_bytes}
        content: dict[m.Tier, dict[str, m.ChunkInfo]] = {m.Tier.DRAM: {}, m.Tier.SSD: {}}
        budgets = {tier: budget for tier, budget in budgets.items() if budget}
        if self.setup.object_bytes:
            budgets[m.Tier.OBJECT] = self.setup.object_bytes
            content[m.Tier.OBJECT] = self.bucket
        return StoreSim(node_id, budgets, content)

    def _make_replica(self, number: int) -> ReplicaSim:
        node = self.stores[number % len(self.stores)].node_id
        return ReplicaSim(
            m.ReplicaReady(
                replica_id=f"r{number}",
                node_id=node,
                max_running_turns=self.setup.max_running_turns,
                max_running_tokens=self.setup.max_running_tokens,
            )
        )

    def joined(self, store: StoreSim) -> m.NodeJoined:
        tiers = tuple(m.TierSpec(tier=tier, budget_bytes=budget) for tier, budget in store.budgets.items())
        inventory = tuple(
            m.StoredChunk(info=info, tier=tier) for tier in store.budgets for info in store.content[tier].values()
        )
        return m.NodeJoined(node_id=store.node_id, tiers=tiers, inventory=inventory)

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def hear(self, event: m.Event) -> None:
        if isinstance(event, m.ChunksReady):
            self._void_deletions(event)
        for command in self.scheduler.handle(event, self.now):
            self._take(command)
        self.scheduler.check()
        self._check_stores()

    def _void_deletions(self, event: m.ChunksReady) -> None:
        """What others offer, or the session after a while, may be saved again."""
        self.deletions = [
            one
            for one in self.deletions
            if (one.session_id == event.session_id and self.now < one.until)
            or not any(one.covers(info) for info in event.chunks)
        ]

    def _check_stores(self) -> None:
        for store in self.stores:
            for tier, budget in store.budgets.items():
                assert store.used(tier) <= budget, f"{tier} of {store.node_id} is over its budget"

    def _take(self, command: m.Command) -> None:
        life, attempt = 0, 0
        match command:
            case m.Dispatch():
                talk = self._talk_of(command.turn_id)
                assert talk is not None, "a turn nobody waits for was dispatched"
                self._check_plan(talk, command)
                attempt, life = talk.attempt, self._replica(command.replica_id).life
            case m.Cancel() | m.Decline() | m.Forget():
                life = self._replica(command.replica_id).life
            case m.Save() | m.Fetch() | m.Demote() | m.Drop():
                life = self._store(command.node_id).life
        self.tasks.append(Task(command, life, attempt, self.now))

    def _check_plan(self, talk: Talk, command: m.Dispatch) -> None:
        """Steps follow each other, hold the prompt's own tokens, and leave every other token with a cause."""
        assert talk.turn is not None
        plan, prompt = command.plan, talk.tokens
        position = 0
        for step in plan.steps:
            assert step.start == position
            assert step.start % C == 0
            position += step.num_tokens
            stored = tokens_of(step.chunk)
            assert not self.scheduler.board.catalog.chunks[step.chunk].is_doomed, "deleted chunks are not read any more"
            assert position <= len(stored)
            assert stored[:position] == prompt[:position], "other tokens than the prompt's"
            node_id = self._replica(command.replica_id).spec.node_id
            assert step.node_id == (SHARED if step.tier is m.Tier.OBJECT else node_id)
        num_recomputed = sum(count for _, count in plan.recomputed)
        assert all(count > 0 for _, count in plan.recomputed)
        assert num_recomputed >= 1
        assert plan.num_reused + num_recomputed == talk.turn.num_prompt_tokens == len(prompt)
        self.causes.update(dict(plan.recomputed))
        self.num_reused += plan.num_reused

    # --- actors -------------------------------------------------------------------------------------------------------

    def execute(self, task: Task) -> list[m.Event]:
        """Carry out a command as its actor would; the answers."""
        command = task.command
        match command:
            case m.Dispatch():
                return self._begin_job(command, task)
            case m.Cancel():
                replica = self._replica(command.replica_id)
                if self.has_died(task):
                    return []
                job = replica.jobs.get(command.turn_id)
                if job is not None and job.dispatch.attempt == command.attempt:
                    del replica.jobs[command.turn_id]
                return [_finished(command)]
            case m.Decline():
                replica = self._replica(command.replica_id)
                for key in command.chunks if replica.life == task.life else ():
                    replica.buffer.pop(key, None)
                return []
            case m.Forget():
                self._forget(self._replica(command.replica_id), command, task)
                return []
            case _:
                store = self._store(command.node_id)
                if store.life != task.life or not store.is_alive:
                    return [m.CommandFailed(command=command, reason="its node is gone")]
                return self._work_at(store, command)

    def _forget(self, replica: ReplicaSim, command: m.Forget, task: Task) -> None:
        marks = set(command.marks)
        for key, info in list(replica.buffer.items()) if replica.life == task.life else ():
            if info.parent in marks or any(mark.key in marks for mark in info.marks):
                marks.add(key)
                replica.forgotten.add(key)
                del replica.buffer[key]

    def _work_at(self, store: StoreSim, command: m.Command) -> list[m.Event]:
        node_id = store.node_id
        match command:
            case m.Save():
                return self._save(store, command)
            case m.Fetch():
                source = store if command.source is m.Tier.OBJECT else self._store(command.source_node)
                info = source.content[command.source].get(command.chunk) if source.is_alive else None
                if info is None:
                    lost = m.ChunkLost(
                        node_id=command.source_node, chunk=command.chunk, tier=command.source, cause=m.Cause.LOST
                    )
                    return [lost, self.refuse(command, "missing")]
                if not store.put(m.Tier.DRAM, info):
                    return [self.refuse(command, "full")]
                return [m.ChunkFetched(node_id=node_id, chunk=command.chunk)]
            case m.Demote():
                for tier in (m.Tier.DRAM, m.Tier.SSD):
                    info = store.content[tier].get(command.chunk)
                    if info is not None and tier is not command.tier:
                        break
                if info is None:
                    return [self.refuse(command, "missing")]
                if not store.put(command.tier, info):
                    return [self.refuse(command, "full")]
                return [
                    m.ChunkDemoted(node_id=node_id, chunk=command.chunk, tier=command.tier, num_bytes=info.num_bytes)
                ]
            case m.Drop():
                store.content[command.tier].pop(command.chunk, None)
                return [m.ChunkDropped(node_id=node_id, chunk=command.chunk, tier=command.tier)]
        raise TypeError(command)

    def _save(self, store: StoreSim, command: m.Save) -> list[m.Event]:
        replica = self._replica(command.replica_id)
        saved, events = [], []
        for info in command.chunks:
            reason = "missing" if not replica.is_alive or info.key not in replica.buffer else ""
            if info.key not in store.content[m.Tier.DRAM] and reason:
                pass
            elif store.put(m.Tier.DRAM, info):
                replica.buffer.pop(info.key, None)
                saved.append(info.key)
                continue
            else:
                reason = "full"
            failed = m.Save(node_id=command.node_id, replica_id=command.replica_id, chunks=(info,))
            events.append(self.refuse(failed, reason))
        if saved:
            events.insert(0, m.ChunksSaved(node_id=store.node_id, chunks=tuple(saved)))
        return events

    def refuse(self, command: m.Command, reason: str) -> m.CommandFailed:
        is_forgotten = isinstance(command, m.Save) and any(
            info.key in self._replica(command.replica_id).forgotten for info in command.chunks
        )
        if not is_forgotten:
            self.refusals[f"{type(command).__name__}: {reason}"] += 1
        return m.CommandFailed(command=command, reason=reason)

    def has_died(self, task: Task) -> bool:
        """Whether the replica of this Dispatch or Cancel is not the one it was sent to any more."""
        assert isinstance(task.command, m.Dispatch | m.Cancel)
        replica = self._replica(task.command.replica_id)
        return replica.life != task.life or not replica.is_alive

    # --- turns on replicas --------------------------------------------------------------------------------------------

    def _begin_job(self, command: m.Dispatch, task: Task) -> list[m.Event]:
        talk, replica = self._talk_of(command.turn_id), self._replica(command.replica_id)
        if talk is None or talk.turn is None or talk.attempt != task.attempt:
            return []  # cancelled or asked again: the scheduler sent a Cancel, and that is answered
        if self.has_died(task):
            self.ask_again(talk)
            return []
        if command.turn_id in replica.jobs:  # an earlier attempt whose Cancel is late
            assert not self.setup.is_reliable, "two attempts of one turn on one replica"
            self.hear(self.refuse(command, "busy"))
            return []
        replica.jobs[command.turn_id] = Job(talk, talk.turn, talk.attempt, talk.tokens, command, task.sent)
        return []

    def progress(self, replica: ReplicaSim, turn_id: str) -> list[m.Event]:
        """The turn restores, then generates and offers chunks, then ends."""
        job = replica.jobs[turn_id]
        if not job.has_started:
            job.has_started = True
            lost = self._restore(replica, job)
            started = m.TurnStarted(turn_id=turn_id, replica_id=replica.spec.replica_id, attempt=job.dispatch.attempt)
            return [*lost, started]
        if job.num_answered < 3:
            job.num_answered += 1 + self.choices.below(3)
            answer = tuple(job.talk.name * 1000 + 500 + number for number in range(job.num_answered))
            return self._offer(replica, job, job.tokens + answer)
        del replica.jobs[turn_id]
        talk = job.talk
        finished = _finished(job.dispatch)
        if job.is_wanted:
            if self.choices.once_in(8):  # preempted: its client asks again once the slot is free
                self.hear(finished)
                self.ask_again(talk)
                return []
            talk.cuts.append(len(talk.tokens))
            talk.tokens += tuple(talk.name * 1000 + 500 + number for number in range(job.num_answered))
            talk.cuts.append(len(talk.tokens))
            talk.turn, talk.num_done = None, talk.num_done + 1
        return [finished]

    def _restore(self, replica: ReplicaSim, job: Job) -> list[m.Event]:
        events: list[m.Event] = []
        store = self._store(replica.spec.node_id)
        for step in job.dispatch.plan.steps:
            if not store.is_alive or step.chunk not in store.content[step.tier]:
                if self.now - job.began < self.setup.config.lease_s and job.is_wanted:
                    self.refusals[f"restore: missing {step.chunk} {step.tier} {job.turn.turn_id}"] += 1
                events.append(m.ChunkLost(node_id=step.node_id, chunk=step.chunk, tier=step.tier, cause=m.Cause.LOST))
        return events

    def _offer(self, replica: ReplicaSim, job: Job, tokens: Tokens) -> list[m.Event]:
        start = job.dispatch.plan.num_reused - job.dispatch.plan.num_reused % C
        cuts = (*job.talk.cuts, len(job.tokens))
        infos = [chunk_of(tokens, at, cuts) for at in range(start, len(tokens), C)]
        infos = [info for info in infos if info.key not in replica.buffer]
        replica.buffer.update({info.key: info for info in infos})
        if not infos:
            return []
        return [
            m.ChunksReady(
                replica_id=replica.spec.replica_id,
                node_id=replica.spec.node_id,
                session_id=f"s{job.talk.name}",
                chunks=tuple(infos),
            )
        ]

    # --- clients ------------------------------------------------------------------------------------------------------

    def speak(self) -> None:
        """A conversation goes on, or a new one begins: afresh, or where another one is."""
        silent = [talk for talk in self.talks if talk.turn is None and not talk.is_deleted and len(talk.tokens) < 40]
        if silent and not self.choices.once_in(3):
            talk = self.choices.pick(silent)
        else:
            name = len(self.talks) + 1
            others = [other for other in self.talks if other.tokens and not other.is_deleted]
            if others and self.choices.once_in(3):
                other = self.choices.pick(others)
                talk = Talk(name, other.tokens[: 1 + self.choices.below(len(other.tokens))], list(other.cuts))
                talk.cuts.append(len(talk.tokens))
            else:
                talk = Talk(name, tuple(range(NUM_SYSTEM)), [NUM_SYSTEM])
            self.talks.append(talk)
        length = len(talk.tokens) + 1 + self.choices.below(7)
        talk.tokens += tuple(talk.name * 1000 + position for position in range(len(talk.tokens), length))
        talk.num_turns += 1
        talk.turn = turn_of(
            f"s{talk.name}/{talk.num_turns}",
            talk.tokens,
            cuts=talk.cuts,
            max_new_tokens=1 + self.choices.below(12),
            priority=self.choices.below(2),
            reuse=not self.choices.once_in(12),
            drift_at=3 if self.choices.once_in(12) else None,
        )
        self.mail.append(m.TurnSubmitted(talk.turn))

    def ask_again(self, talk: Talk, *, is_now: bool = True) -> None:
        """A new attempt of the same turn."""
        assert talk.turn is not None
        self._withdraw(talk)
        if is_now:
            self.hear(m.TurnSubmitted(talk.turn))
        else:
            self.mail.append(m.TurnSubmitted(talk.turn))

    def hang_up(self, talk: Talk) -> None:
        """The client cancels; the conversation goes on from where it was."""
        assert talk.turn is not None
        self._withdraw(talk)
        turn_id, talk.turn = talk.turn.turn_id, None
        self.hear(m.TurnCancelled(turn_id))

    # --- administration -----------------------------------------------------------------------------------------------

    def expect(self, talk: Talk) -> None:
        turn = turn_of("soon", talk.tokens, session_id=f"s{talk.name}", cuts=talk.cuts)
        self.mail.append(m.SessionExpected(turn=turn, seconds=self.choices.pick((10.0, 0.0, 1.0, 100.0))))

    def pin(self, talk: Talk) -> None:
        marks = marks_of(talk.tokens, talk.cuts)
        seconds = self.choices.pick((10.0, 0.0, 1.0, 100.0))
        self.mail.append(m.SessionPinned(session_id=f"s{talk.name}", prompt=marks, seconds=seconds))

    def expire(self, talk: Talk) -> None:
        self.mail.append(m.SessionExpired(session_id=f"s{talk.name}", prompt=marks_of(talk.tokens, talk.cuts)))

    def delete(self, talk: Talk) -> None:
        """The conversation is over for good; its client knows. The system prompt stays."""
        if talk.turn is not None:
            self._withdraw(talk)
            talk.turn = None
        talk.is_deleted = True
        session_id, seconds = f"s{talk.name}", self.choices.pick((60.0, 600.0))
        marks = tuple(mark for mark in marks_of(talk.tokens, talk.cuts) if mark.end > NUM_SYSTEM)
        self.deletions.append(Deletion(session_id, self.now + seconds, {mark.key for mark in marks}))
        self.hear(m.SessionDeleted(session_id=session_id, prompt=marks, seconds=seconds))

    def steer(self, talk: Talk) -> None:
        """Something is said about all that begins as this conversation does, up to some mark."""
        prefix = self.choices.pick(marks_of(talk.tokens, (*talk.cuts, NUM_SYSTEM)))
        seconds = self.choices.pick((10.0, 0.5, 100.0))
        event = self.choices.pick(
            (
                m.PrefixLifetimeSet(prefix=prefix, seconds=seconds),
                m.PrefixLifetimeSet(prefix=prefix, seconds=None),
                m.PrefixPinned(prefix=prefix, seconds=seconds),
                m.PrefixExpired(prefix=prefix),
                m.PrefixDeleted(prefix=prefix, seconds=seconds),
            )
        )
        self.hear(event)

    def close(self, replica: ReplicaSim) -> None:
        replica.is_closing = True
        self.hear(m.ReplicaClosing(replica.spec.replica_id))

    def _withdraw(self, talk: Talk) -> None:
        """What is on its way of this attempt is not heard any more."""
        assert talk.turn is not None
        talk.attempt += 1
        self.recall(m.TurnSubmitted(talk.turn))

    def recall(self, said: m.Event) -> None:
        """What one actor says is heard in the order in which it says it, or, as here, not at all."""
        self.mail = [event for event in self.mail if event != said]

    # --- looking up ---------------------------------------------------------------------------------------------------

    def _talk_of(self, turn_id: str) -> Talk | None:
        return next((talk for talk in self.talks if talk.turn is not None and talk.turn.turn_id == turn_id), None)

    def _store(self, node_id: str) -> StoreSim:
        return next(store for store in self.stores if store.node_id == node_id)

    def _replica(self, replica_id: str) -> ReplicaSim:
        return next(replica for replica in self.replicas if replica.spec.replica_id == replica_id)

    def running(self) -> list[tuple[ReplicaSim, str]]:
        return [(replica, turn_id) for replica in self.replicas if replica.is_alive for turn_id in replica.jobs]


def _finished(command: m.Dispatch | m.Cancel) -> m.TurnFinished:
    return m.TurnFinished(turn_id=command.turn_id, replica_id=command.replica_id, attempt=command.attempt)
