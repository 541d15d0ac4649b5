"""The client of a running cluster: one turn in, its answer's pieces out, whatever fails in between.

It asks the scheduler for a place, streams from the replica it is given, and goes on elsewhere with what it has when
that replica preempts the turn or dies: tokens already received are part of the next attempt's prompt, so nothing is
generated twice and nothing is lost. When the whole cluster is replaced by another with the same model, turns go on
there, once `move` has said where it is. Times are read here, on the client's clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.engine.params import SampledToken
from actors.engine.turns import FinishReason
from actors.scheduler import Assignment, Draining, QueueFull, SessionGone
from actors.shard import ModelInfo
from actors.wire import Delta, Piece, Started, TurnAccount, TurnEnd, TurnRequest
from cluster.listening import Listener
from policies import messages as m
from storage import keys

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 6
RETRY_S = 0.5
MAX_KNOWN_REPLICAS = 256
ASK_AGAIN_S = 2.0


class TurnFailed(RuntimeError):  # noqa: N818 - named like the event
    """The turn could not be answered; the message says why."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """A turn's answer, its account and its times (seconds; since submission unless said)."""

    turn_id: str
    tokens: list[SampledToken] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_tokens_kept: int | None = None
    account: TurnAccount = field(default_factory=TurnAccount)
    num_attempts: int = 0
    retried_tokens: int = 0  # prompt tokens computed again because an attempt was cut short
    replica_id: str = ""
    queue_wait_s: float = 0.0
    ttft_s: float | None = None
    end_to_end_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)  # gaps between arrivals, one per further token

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


class Client:
    """Submits turns to a scheduler actor. Safe for many turns at a time in one event loop."""

    def __init__(
        self, scheduler: Any, model: ModelInfo, max_waiting: int | None = None, *, may_move: bool = False
    ) -> None:
        """`max_waiting`: with so many turns waiting, a new one raises QueueFull. `may_move`: when the scheduler takes
        no more turns, or is gone, they wait for `move` as long as their callers do."""
        self.model = model
        self._cluster = _Cluster(scheduler)
        self._max_waiting = max_waiting
        self._may_move = may_move
        self._moved = asyncio.Event()
        self._obstacle = ""

    def move(self, scheduler: Any, model: ModelInfo) -> None:
        """Another cluster, which has the same model, takes the turns from now on. Those that run end where they are."""
        self._cluster.close()
        self._cluster, self.model, self._obstacle = _Cluster(scheduler), model, ""
        self._wake()

    def give_up(self, reason: str) -> None:
        """There will be no cluster to move to: turns that wait for one, or come to it, fail."""
        self._obstacle = reason
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def run(
        self,
        request: TurnRequest,
        on_delta: Callable[[Delta], None] | None = None,
        on_started: Callable[[TurnAccount], None] | None = None,
    ) -> Answer:
        """Runs the turn to its end. Raises TurnFailed when no attempt succeeded, QueueFull or SessionGone when it may
        not wait (any longer); cancelling it cancels the turn.

        `on_started` hears once where the prompt's KV came from, before the first delta.
        """
        num_tokens, limit = len(request.token_ids), self.model.max_turn_tokens
        if num_tokens >= limit:
            raise TurnFailed(
                f"the prompt has {num_tokens} tokens but only {limit - 1} leave room for an answer (context window "
                f"{self.model.context_window}, model.kv_tokens {self.model.kv_tokens})"
            )
        progress = _Progress(request, on_delta, on_started)
        try:
            while not progress.done:
                progress.begin()
                await self._attempt(progress)
        except asyncio.CancelledError:
            if progress.cluster is not None:
                progress.cluster.scheduler.cancel.remote(request.turn_id)
            raise
        return progress.answer

    async def _attempt(self, progress: _Progress) -> None:
        replica_id = ""
        try:
            request = progress.request
            assignment = await self._submit(progress)
            replica_id = assignment.dispatch.replica_id
            progress.assigned(replica_id)
            assert progress.cluster is not None
            listener = progress.cluster.listener(replica_id, assignment.replica)
            await listener.run(request, assignment.dispatch, progress.receive)
        except RayError as error:
            await self._recover(progress, replica_id, error)

    async def _submit(self, progress: _Progress) -> Assignment:
        """Waits for the next cluster when this one is being taken down, or is gone."""
        while True:
            cluster, moved = self._cluster, self._moved
            try:
                return await self._ask(progress, cluster)
            except Draining as error:
                if not self._may_move:
                    raise TurnFailed(str(error)) from None
            except ActorDiedError:  # and not: unavailable
                if not self._may_move:
                    raise
            if self._obstacle:
                raise TurnFailed(self._obstacle)
            log.warning("turn %s waits for the next cluster: this one is taken down", progress.request.turn_id)
            with suppress(TimeoutError):  # a scheduler whose node is lost may come back
                await asyncio.wait_for(moved.wait(), ASK_AGAIN_S)

    async def _ask(self, progress: _Progress, cluster: _Cluster) -> Assignment:
        known = dict(cluster.replicas)  # another turn may lose one meanwhile
        turn = self._describe(progress.request)
        progress.cluster = cluster
        try:
            answer: Assignment = await cluster.scheduler.submit.remote(
                turn, self._max_waiting, frozenset(known), progress.is_new
            )
        except RayTaskError as error:
            if isinstance(error.cause, (QueueFull, SessionGone, Draining)):
                raise error.cause from None
            raise
        progress.is_new = False
        replica_id = answer.dispatch.replica_id
        if answer.replica is None:
            return replace(answer, replica=known[replica_id])
        cluster.note(replica_id, answer.replica)
        return answer

    async def _recover(self, progress: _Progress, replica_id: str, error: RayError) -> None:
        """An actor failed: tell the scheduler, wait a little, let the next attempt go on."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("turn %s, attempt %d: %s", progress.request.turn_id, progress.answer.num_attempts, reason)
        if progress.answer.num_attempts >= MAX_ATTEMPTS:
            raise TurnFailed(f"gave up after {MAX_ATTEMPTS} attempts: {reason}") from error
        if replica_id and isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError):
            assert progress.cluster is not None
            progress.cluster.forget(replica_id)
            progress.cluster.scheduler.replica_lost.remote(replica_id)
        await asyncio.sleep(RETRY_S * progress.answer.num_attempts)

    def _describe(self, request: TurnRequest) -> m.Turn:
        """The turn as the scheduler sees it: marks instead of tokens."""
        chain = keys.chain(
            request.root or self.model.root, request.token_ids, self.model.chunk_tokens, cuts=request.cuts
        )
        return m.Turn(
            turn_id=request.turn_id,
            session_id=request.session_id,
            prompt=tuple(m.Mark(end, key) for end, key in chain),
            num_prompt_tokens=len(request.token_ids),
            max_new_tokens=request.sampling.max_new_tokens - request.num_prior,
            priority=request.priority,
            reuse=request.reuse,
            drift_at=request.drift_at,
            affinity=request.affinity,
        )


class _Cluster:
    """A scheduler, and what is known of its replicas. Those of two clusters may have the same names."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.replicas: dict[m.ReplicaId, Any] = {}  # handles
        self._listeners: dict[m.ReplicaId, Listener] = {}

    def note(self, replica_id: m.ReplicaId, replica: Any) -> None:
        self.replicas[replica_id] = replica
        while len(self.replicas) > MAX_KNOWN_REPLICAS:
            self.forget(next(iter(self.replicas)))

    def listener(self, replica_id: m.ReplicaId, replica: Any) -> Listener:
        """An open one."""
        listener = self._listeners.get(replica_id)
        if listener is None or not listener.is_open:
            listener = self._listeners[replica_id] = Listener(replica)
        return listener

    def forget(self, replica_id: m.ReplicaId) -> None:
        self.replicas.pop(replica_id, None)
        listener = self._listeners.pop(replica_id, None)
        if listener is not None:
            listener.close()

    def close(self) -> None:
        """Its turns end where they are."""
        for replica_id in list(self._listeners):
            self.forget(replica_id)


class _Progress:
    """One turn over its attempts."""

    def __init__(
        self,
        request: TurnRequest,
        on_delta: Callable[[Delta], None] | None,
        on_started: Callable[[TurnAccount], None] | None,
    ) -> None:
        self.cluster: _Cluster | None = None  # that the last attempt asked
        self.is_new = True  # no scheduler has taken it yet
        self.request = request
        self.answer = Answer(turn_id=request.turn_id)
        self.done = False
        self._prompt = request.token_ids
        self._on_delta = on_delta
        self._on_started = on_started
        self._submitted = time.monotonic()
        self._attempt_began = self._submitted
        self._last_token: float | None = None

    def begin(self) -> None:
        self.answer.num_attempts += 1
        self._attempt_began = time.monotonic()
        if self.answer.tokens:
            generated = self.answer.token_ids
            self.request = replace(self.request, token_ids=self._prompt + generated, num_prior=len(generated))

    def assigned(self, replica_id: str) -> None:
        self.answer.replica_id = replica_id
        if self._last_token is None:  # waiting after the first token is no part of TTFT
            self.answer.queue_wait_s += time.monotonic() - self._attempt_began

    def receive(self, piece: Piece) -> None:
        match piece:
            case Started():
                self._settle(piece.account)
            case Delta():
                self._take(piece.tokens, piece.text)
            case TurnEnd():
                self._take(piece.tokens, piece.text)
                self._end(piece)

    def _end(self, piece: TurnEnd) -> None:
        if piece.finish_reason == FinishReason.PREEMPTED:
            return
        if piece.finish_reason == FinishReason.FAILED:
            if piece.may_retry and self.answer.num_attempts < MAX_ATTEMPTS:
                return
            raise TurnFailed(piece.error)
        self.answer.finish_reason = piece.finish_reason
        self.answer.num_tokens_kept = piece.num_tokens_kept
        self.answer.end_to_end_s = time.monotonic() - self._submitted
        self.done = True

    def _take(self, tokens: tuple[SampledToken, ...], text: str) -> None:
        now = time.monotonic()
        for _ in tokens:
            if self._last_token is None:
                self.answer.ttft_s = now - self._submitted
            else:
                self.answer.itl_s.append(now - self._last_token)
            self._last_token = now
        self.answer.tokens += tokens
        self.answer.text += text
        if self._on_delta is not None and (tokens or text):
            self._on_delta(Delta(tokens, text))

    def _settle(self, account: TurnAccount) -> None:
        """The first attempt that started accounts for the prompt; what later ones compute again is counted apart."""
        if not self.answer.account.num_prompt_tokens:
            self.answer.account = account
            if self._on_started is not None:
                self._on_started(account)
        else:
            self.answer.retried_tokens += Counter(account.recomputed).total()
