"""A replica: takes a dispatched turn, loads what its plan names, computes the rest, offers the new chunks.

Says what the live one says, in the same order: TurnStarted when the restore is over, ChunksReady before TurnFinished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from policies import messages as m
from policies.simulator.engine import Engine, Job
from policies.simulator.hardware import EngineSpeed, LinkSpeeds
from policies.simulator.links import Link
from policies.simulator.marks import Marker
from policies.simulator.node import NodeStore, Surroundings, WriteBuffer
from policies.simulator.records import TurnRecord
from policies.simulator.restores import Load, Restores
from policies.simulator.trace import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHabits:
    """See the fields of these names in `Setup`; bytes_per_token is the model's."""

    bytes_per_token: float
    num_loaders: int
    load_deadline_s: float
    offer_early: bool
    reuse: bool


@dataclass(slots=True, eq=False)
class _Running:
    """One turn on a replica. `num_in_place`: tokens whose chunks are stored."""

    request: Request
    record: TurnRecord
    dispatch: m.Dispatch
    num_in_place: int = 0
    job: Job | None = None
    is_late: bool = False
    """Part of its restore was given up."""


class Replica:
    """`on_end` is called when a turn has left, after everything it said."""

    def __init__(
        self,
        spec: m.ReplicaReady,
        store: NodeStore,
        links: LinkSpeeds,
        speed: EngineSpeed,
        habits: ReplicaHabits,
        marker: Marker,
        surroundings: Surroundings,
        on_end: Callable[[Request], None],
    ) -> None:
        self.spec = spec
        self.engine = Engine(surroundings.clock, speed)
        self.buffer: WriteBuffer = {}
        self.save_link = Link(links.dram_save)
        self._restores = Restores(
            store,
            Link(links.dram_load),
            habits.bytes_per_token,
            habits.num_loaders,
            habits.load_deadline_s,
            surroundings,
        )
        self._speed, self._habits, self._marker = speed, habits, marker
        self._around, self._on_end = surroundings, on_end

    # --- from the Dispatch to the first token -------------------------------------------------------------------------

    def begin(self, command: m.Dispatch, request: Request, record: TurnRecord) -> None:
        """Computing begins with the restore, and after it if part of that is late."""
        running = _Running(request, record, command)
        self._restores.add(command.plan, partial(self._begun, running), partial(self._restored, running))

    def _begun(self, running: _Running, load: Load) -> None:
        """It is known what the restore brings, so what is to be computed."""
        request, plan = running.request, running.dispatch.plan
        running.record.take_plan(plan, load.num_tokens, load.missed)
        running.num_in_place = load.num_tokens
        running.job = Job(
            num_prompt_tokens=request.input_tokens,
            num_answer_tokens=max(1, request.output_tokens),
            work_s=self._speed.prefill_s(load.num_tokens, request.input_tokens),
            on_first_token=partial(self._first_token, running),
            on_end=partial(self._end, running),
            is_loaded=False,
        )
        running.is_late = load.num_tokens < plan.num_reused
        if not running.is_late:
            self.engine.add(running.job)

    def _restored(self, running: _Running) -> None:
        command = running.dispatch
        running.record.started_at = self._around.clock.now
        self._around.mail.append(
            m.TurnStarted(turn_id=command.turn_id, replica_id=command.replica_id, attempt=command.attempt)
        )
        assert running.job is not None, "a restore begins before it ends"
        if running.is_late:
            self.engine.add(running.job)
        self.engine.loaded(running.job)

    # --- chunks and the end -------------------------------------------------------------------------------------------

    def _first_token(self, running: _Running) -> None:
        running.record.first_token_at = self._around.clock.now
        if self._habits.reuse and self._habits.offer_early:
            self._offer(running, self._marker.full_chunks(running.request, running.num_in_place))

    def _offer(self, running: _Running, chunks: tuple[m.ChunkInfo, ...]) -> None:
        """What the plan restored is stored; a part-filled chunk that was gone on with is a new one."""
        known = {step.chunk for step in running.dispatch.plan.steps}
        new = tuple(info for info in chunks if info.key not in known)
        if chunks:
            running.num_in_place = max(running.num_in_place, chunks[-1].end)
        if not new:
            return
        for info in new:
            self.buffer[info.key] = info
        self._around.mail.append(
            m.ChunksReady(
                replica_id=self.spec.replica_id,
                node_id=self.spec.node_id,
                session_id=f"s{running.request.session_id}",
                chunks=new,
            )
        )

    def _end(self, running: _Running) -> None:
        request, command = running.request, running.dispatch
        running.record.ended_at = self._around.clock.now
        if self._habits.reuse:
            rest = self._marker.chunks(request, running.num_in_place)
            self._offer(running, self._marker.kept_chunks(request))
            self._offer(running, rest)  # at last, since a session's last offer says how far it went
        self._around.mail.append(
            m.TurnFinished(turn_id=command.turn_id, replica_id=command.replica_id, attempt=command.attempt)
        )
        running.job = None  # they held each other
        self._marker.ended(request)
        self._on_end(request)

    def forget(self, command: m.Decline) -> None:
        for key in command.chunks:
            self.buffer.pop(key, None)
