"""The replica: the asynchronous front of one copy of the model.

It takes a dispatched turn, hands it to the shard with its plan, turns token ids into text, streams them to the client
(all of a client's turns in one stream: outbox.py) and keeps the account of each prompt token. Its shard lives and dies
with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.account import failed_steps, settle
from actors.engine.params import seed_of
from actors.engine.text import TextStream
from actors.engine.turns import FinishReason, ReadyChunk, StartInfo, TurnOutput
from actors.heartbeat import keep_joined
from actors.link import ReplicaEnd
from actors.node_store import chunk_info
from actors.outbox import Message, Outbox
from actors.shard import ModelInfo, Shard, ShardPlan
from actors.wire import AbortTurn, AddTurn, Delta, Harvest, Started, TurnEnd, TurnRequest
from policies import messages as m

log = logging.getLogger(__name__)

SHARD_GROUPS = {"control": 2, "io": 2}
REMEMBERED_TURNS = 4096
REMEMBERED_LISTENERS = 64


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What a replica needs to know at birth."""

    shard: ShardPlan
    num_cpus: float
    num_gpus: float
    env_vars: dict[str, str]
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class _Running:
    """One attempt of a turn on this replica. Its `name` tells it from other attempts of the same turn in the engine."""

    request: TurnRequest
    dispatch: m.Dispatch
    outbox: Outbox
    outputs: asyncio.Queue[TurnOutput]

    @property
    def name(self) -> str:
        return attempt_name(self.dispatch.turn_id, self.dispatch.attempt)

    @property
    def named_request(self) -> TurnRequest:
        """Under the attempt's name, with a seed that is the same for every attempt."""
        params = self.request.sampling
        if params.seed is None:
            params = replace(params, seed=seed_of(self.request.turn_id))
        return replace(self.request, turn_id=self.name, sampling=params)

    async def next_output(self) -> TurnOutput:
        """All that came since the last call as one: a stream read slowly has fewer and longer pieces."""
        output = await self.outputs.get()
        while not self.outputs.empty():
            output = output.followed_by(self.outputs.get_nowait())
        return output

    def finished(self, replica_id: m.ReplicaId) -> m.TurnFinished:
        return m.TurnFinished(turn_id=self.dispatch.turn_id, replica_id=replica_id, attempt=self.dispatch.attempt)


def attempt_name(turn_id: m.TurnId, attempt: int) -> str:
    return f"{turn_id}@{attempt}"


class Replica:
    """Plain class, made where an event loop runs; becomes an async actor in cluster/bringup.py. Ray may start it anew
    at any time: it loads its model and joins by itself."""

    def __init__(
        self, replica_id: m.ReplicaId, plan: ReplicaPlan, scheduler: str, store: str, node_id: m.NodeId
    ) -> None:
        """`scheduler` and `store` are actors' names: handles in its arguments would keep Ray from starting it anew."""
        from actors.engine.tokenizer import load_tokenizer  # whoever holds a handle imports this file: no torch above

        self.replica_id = replica_id
        self._node_id = node_id
        self._plan = plan
        self._scheduler = ray.get_actor(scheduler)
        self._tokenizer = load_tokenizer(plan.shard.engine.model)
        self._link = ReplicaEnd()
        self._shard = create_shard(plan, self._link.address, store)
        self._running: dict[str, _Running] = {}  # by the attempt's name
        self._cancelled: set[str] = set()  # of those that wait for the model
        self._outboxes: dict[str, Outbox] = {}  # by their listeners
        self._sessions: OrderedDict[str, m.SessionId] = OrderedDict()  # of recent attempts, for their chunks
        self._background: list[asyncio.Task[None]] = []
        self._offers: set[asyncio.Task[None]] = set()  # whoever waits holds its task: asyncio does not
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> ModelInfo:
        """Returns when this replica takes turns. Raises what its model could not do."""
        return await self._started

    async def _start(self) -> ModelInfo:
        try:
            info: ModelInfo = await self._shard.info.remote()
            await self._link.connect()
        except BaseException as error:
            self._link.close()
            # Nobody waits in `ready` who could hear of it.
            if ray.get_runtime_context().was_current_actor_reconstructed:
                log.error("this replica ends, its shard did not start: %s", error)
                os._exit(1)
            raise
        loop = asyncio.get_running_loop()
        self._background = [
            loop.create_task(self._deliver()),
            loop.create_task(
                keep_joined(self._scheduler, self.replica_id, lambda: self._join(info), self._plan.heartbeat_s)
            ),
        ]
        await self._join(info)
        return info

    async def _join(self, info: ModelInfo) -> None:
        event = m.ReplicaReady(
            replica_id=self.replica_id,
            node_id=self._node_id,
            max_running_turns=self._plan.shard.engine.max_running_turns,
            max_running_tokens=info.kv_tokens,
            prefill_tokens_per_s=info.prefill_tokens_per_s,
        )
        await self._scheduler.join_replica.remote(event, ray.get_runtime_context().current_actor, self._shard)

    # --- one turn -----------------------------------------------------------------------------------------------------

    async def listen(self, listener: str) -> AsyncIterator[Message]:
        """Streams the pieces of all attempts that name this listener, until it leaves. Then they end."""
        outbox = self._outbox(listener)
        try:
            async for message in outbox.messages():
                yield message
        finally:
            outbox.leave()
            for running in self._running.values():
                if running.outbox is outbox:
                    self._abort(running.name)

    async def leave(self, listener: str) -> None:
        """The listener wants to hear no more."""
        self._outbox(listener).leave()

    async def generate(self, request: TurnRequest, dispatch: m.Dispatch, listener: str) -> None:
        """Runs one attempt; its pieces go to the listener, the last one is a TurnEnd. RuntimeError if it has left."""
        outbox = self._outbox(listener)
        running = _Running(request, dispatch, outbox, asyncio.Queue())
        name = running.name
        self._running[name] = running
        self._remember(name, request.session_id)
        done = False
        news: list[m.Event] = []
        try:
            await asyncio.shield(self._started)  # Ray calls an actor alive that loads its model again
            if outbox.is_left or name in self._cancelled:
                raise RuntimeError(f"nobody waits for turn {dispatch.turn_id} any more")
            self._link.send(AddTurn(running.named_request, dispatch.plan.steps))
            text = self._text_stream(request)
            while not done:
                output = await running.next_output()
                if output.started is not None:
                    outbox.put(name, Started(settle(dispatch.plan, output.started)))
                    news = self._start_events(running, output.started)
                if output.finish_reason is not None:
                    done = True
                    outbox.put(name, await self._turn_ended(running, output, text, news))
                elif output.tokens:
                    words = "".join([text.push(token.token_id) for token in output.tokens])
                    outbox.put(name, Delta(output.tokens, words))
                if news and not done:
                    self._tell(*news)  # the first token does not wait for it
                    news = []
        finally:
            del self._running[name]
            self._cancelled.discard(name)
            if not done:
                self._abort(name)
                self._tell(*news, running.finished(self.replica_id))

    def _outbox(self, listener: str) -> Outbox:
        """Listeners and their turns may come in any order. Of those that left the last ones are known."""
        outbox = self._outboxes.setdefault(listener, Outbox())
        left = [name for name, other in self._outboxes.items() if other.is_left]
        for name in left[:-REMEMBERED_LISTENERS]:
            del self._outboxes[name]
        return outbox

    def _abort(self, name: str) -> None:
        """One that waits until the model is loaded ends then."""
        if self._started.done():
            self._link.send(AbortTurn(name))
        elif name in self._running:
            self._cancelled.add(name)

    def _remember(self, name: str, session_id: m.SessionId) -> None:
        self._sessions[name] = session_id
        while len(self._sessions) > REMEMBERED_TURNS:
            self._sessions.popitem(last=False)

    def _text_stream(self, request: TurnRequest) -> TextStream:
        """The answer's text, from its first token on even when an earlier attempt generated the beginning."""
        text = TextStream(self._tokenizer, request.sampling.stop)
        prior = request.token_ids[len(request.token_ids) - request.num_prior :]
        for token_id in prior:
            text.push(token_id)
        return text

    def _start_events(self, running: _Running, started: StartInfo) -> list[m.Event]:
        turn_id, attempt = running.dispatch.turn_id, running.dispatch.attempt
        return [
            *(
                m.ChunkLost(node_id=step.node_id, chunk=step.chunk, tier=step.tier, cause=cause)
                for step, cause in failed_steps(running.dispatch.plan, started)
            ),
            m.TurnStarted(turn_id=turn_id, replica_id=self.replica_id, attempt=attempt),
        ]

    async def _turn_ended(
        self, running: _Running, output: TurnOutput, text: TextStream, news: Iterable[m.Event]
    ) -> TurnEnd:
        """The scheduler hears of it first, behind what is new: the client's next turn must find the slot free."""
        assert output.finish_reason is not None
        pieces = "".join(text.push(token.token_id) for token in output.tokens)
        await self._tell(*news, running.finished(self.replica_id))
        return TurnEnd(
            finish_reason=output.finish_reason,
            tokens=output.tokens,
            text=pieces if output.finish_reason == FinishReason.PREEMPTED else pieces + text.finish(),
            num_tokens_kept=text.num_tokens_kept if text.stopped else None,
            error=output.error or "",
            may_retry=output.finish_reason == FinishReason.FAILED and not output.is_refused,
        )

    def _tell(self, *events: m.Event) -> Any:
        """On its way to the scheduler, behind all that was told before. Awaited: it has heard it, or RayError."""
        return self._scheduler.report.remote(list(events))

    # --- the shard's outputs ------------------------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Brings the shard's outputs to the turns that wait for them: tokens at once; ends behind the offer of new
        chunks, because the session's next turn must find them known. Nobody waits until the scheduler has heard.

        Without its shard this replica ends; Ray starts both anew."""
        try:
            while True:
                harvest: Harvest = await self._link.receive()
                self._pass_on(output for output in harvest.outputs if output.finish_reason is None)
                if harvest.chunks:
                    await asyncio.sleep(0)  # streams go first
                    self._offer(harvest.chunks)
                self._pass_on(output for output in harvest.outputs if output.finish_reason is not None)
        except OSError as error:
            log.error("this replica ends: %s", error)
        except Exception:
            log.exception("outputs cannot be delivered; this replica ends")
        os._exit(1)

    def _pass_on(self, outputs: Iterable[TurnOutput]) -> None:
        for output in outputs:
            running = self._running.get(output.turn_id)
            if running is not None:
                running.outputs.put_nowait(output)

    def _offer(self, chunks: list[ReadyChunk]) -> None:
        by_session: dict[str, list[m.ChunkInfo]] = {}
        for chunk in chunks:
            by_session.setdefault(self._sessions.get(chunk.turn_id, chunk.turn_id), []).append(
                chunk_info(chunk.header, chunk.num_bytes)
            )
        events: list[m.Event] = [
            m.ChunksReady(replica_id=self.replica_id, node_id=self._node_id, session_id=session_id, chunks=tuple(infos))
            for session_id, infos in by_session.items()
        ]
        offer = asyncio.get_running_loop().create_task(self._settle_offer(self._tell(*events), chunks))
        self._offers.add(offer)
        offer.add_done_callback(self._offers.discard)

    async def _settle_offer(self, told: Any, chunks: list[ReadyChunk]) -> None:
        """Without a scheduler to offer them to, chunks are forgotten: they are computed again when they are needed."""
        try:
            await told
        except RayError as error:
            log.warning("%d chunks were not offered: %s", len(chunks), error)
            await self._shard.drop_chunks.remote(tuple(chunk.header.key for chunk in chunks))

    # --- the scheduler's commands -------------------------------------------------------------------------------------

    async def cancel(self, command: m.Cancel) -> None:
        """The attempt's stream ends with ABORTED; one that is not here (any more) is reported as over."""
        name = attempt_name(command.turn_id, command.attempt)
        if name in self._running:
            self._abort(name)
        else:
            finished = m.TurnFinished(turn_id=command.turn_id, replica_id=self.replica_id, attempt=command.attempt)
            await self._tell(finished)

    async def drop_chunks(self, chunk_keys: tuple[m.ChunkKey, ...]) -> None:
        await self._shard.drop_chunks.remote(chunk_keys)

    async def forget(self, marks: tuple[m.ChunkKey, ...]) -> None:
        """What begins with one of these prefixes leaves HBM and the write buffer."""
        await self._shard.forget.remote(marks)

    async def holds(self, turn_id: m.TurnId, attempt: int) -> bool:
        """Whether this attempt of the turn is here."""
        return attempt_name(turn_id, attempt) in self._running

    async def kept(self, keys: tuple[m.ChunkKey, ...]) -> list[m.ChunkKey]:
        """Which of these chunks are in HBM. The answer may be old by the time it is read."""
        held: list[m.ChunkKey] = await self._shard.kept.remote(keys)
        return held

    async def stats(self) -> dict[str, Any]:
        listeners = sum(not outbox.is_left for outbox in self._outboxes.values())
        return {"replica_id": self.replica_id, "listeners": listeners, **await self._shard.stats.remote()}


def create_shard(plan: ReplicaPlan, link: str, store: str) -> Any:
    """The shard's actor, on this process's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(concurrency_groups=SHARD_GROUPS)(Shard)
        .options(
            num_cpus=plan.num_cpus,
            num_gpus=plan.num_gpus,
            scheduling_strategy=here,
            runtime_env={"env_vars": plan.env_vars},
        )
        .remote(plan.shard, link, store)
    )
