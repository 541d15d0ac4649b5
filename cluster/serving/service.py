"""What a front process does with a request: whose it is, which conversation, what to run, what to remember.

    request -> caller -> recollection: prompt -> quota -> generation -> answer -> recollection, book, metrics

HTTP is `api`'s, the cluster's parts are reached through a `Connection`. One Service serves one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any
from weakref import WeakValueDictionary

from ray.exceptions import RayError

from actors.engine.params import SamplingParams, seed_of
from actors.engine.turns import FinishReason
from actors.scheduler import QueueFull, SessionGone
from actors.wire import TurnRequest
from cluster.chat import ChatFormat, TemplateError
from cluster.client import Answer, TurnFailed
from cluster.config import ServingSection
from cluster.serving.administration import Administration
from cluster.serving.connection import OUTDATED, Connection
from cluster.serving.errors import ApiError, refuse
from cluster.serving.generation import Generation, Job
from cluster.serving.metrics import Metrics
from cluster.serving.openai_bodies import Speller
from cluster.serving.protocol import ChatRequest, CommonRequest, CompletionRequest, check_session_id
from cluster.serving.quotas import Admission, QuotaExceeded, Quotas
from cluster.serving.recollection import Recalled, Recollection
from cluster.serving.sessions import LastTurn, Session, SessionBook, last_turn, scheduler_session
from cluster.serving.tenants import KeyRing, Tenant
from policies.messages import Mark
from storage import keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks, and what they said of themselves."""

    tenant: Tenant
    scope: str
    """The root key under which everything of this tenant is stored."""
    request_id: str
    session_id: str | None = None
    user_id: str | None = None
    timeout_s: float | None = None


@dataclass
class Service:
    """See the module's docstring."""

    section: ServingSection
    connection: Connection
    chat: ChatFormat
    keyring: KeyRing
    metrics: Metrics
    version: str = field(default_factory=lambda: metadata.version("reprise"))
    started_at: float = field(default_factory=time.time)
    others: dict[str, str] = field(default_factory=dict)
    """What the other front processes have counted, by their names."""

    def __post_init__(self) -> None:
        shelf = self.connection.shelf
        self.recollection = Recollection(self.chat, shelf)
        self.book = SessionBook(shelf)
        self.administration = Administration(self.connection, self.book, self.recollection)
        self.spell = Speller(self.chat.tokenizer)
        self.quotas = Quotas()
        self.num_running = 0
        self._mean_s = 1.0  # how long a request takes, for Retry-After
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # held by those who write or wait

    # --- who ----------------------------------------------------------------------------------------------------------

    def caller(
        self,
        authorization: str | None,
        request_id: str,
        *,
        session_id: str | None = None,
        user_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Caller:
        """ApiError 401 for an unknown key, 400 for a session id that is none."""
        tenant = self.keyring.tenant_of(authorization)
        check_session_id(session_id, "x-session-id")
        if timeout_s is not None and not timeout_s > 0:
            raise refuse("x-request-timeout must be a number of seconds above 0", "x-request-timeout")
        scope = self.connection.model.tenant_root(tenant.salt)
        return Caller(
            tenant=tenant,
            scope=scope,
            request_id=request_id,
            session_id=session_id,
            user_id=user_id,
            timeout_s=timeout_s,
        )

    # --- generating ---------------------------------------------------------------------------------------------------

    async def chat_completion(self, request: ChatRequest, caller: Caller) -> Generation:
        """Starts the answers. ApiError for what cannot be answered; the generation must be closed."""
        self._check(request, caller)
        try:
            recalled = await self.recollection.recall(
                caller.scope, request.to_messages(), caller.session_id or request.session_id
            )
        except TemplateError as error:
            raise refuse(f"{error}", "messages") from None
        return await self._generate(request, [recalled], caller, request.num_logprobs)

    async def completion(self, request: CompletionRequest, caller: Caller) -> Generation:
        """The same for plain texts; the choices of the first prompt come first."""
        self._check(request, caller)
        recalled = [await self._recall_prompt(prompt, request, caller) for prompt in request.prompts()]
        return await self._generate(request, recalled, caller, request.logprobs)

    async def _recall_prompt(
        self, prompt: str | tuple[int, ...], request: CompletionRequest, caller: Caller
    ) -> Recalled:
        session_id = caller.session_id or request.session_id
        if isinstance(prompt, str):
            return await self.recollection.recall_text(caller.scope, prompt, session_id)
        if max(prompt) >= self.connection.model.vocab_size:
            raise refuse(f"prompt has a token id above {self.connection.model.vocab_size - 1}", "prompt")
        return self.recollection.of_ids(caller.scope, prompt, session_id)

    async def _generate(
        self, request: CommonRequest, recalled: Sequence[Recalled], caller: Caller, logprobs: int | None
    ) -> Generation:
        jobs: list[Job] = []
        for one in recalled:
            sampling = request.sampling(self._max_new_tokens(request, one), logprobs)
            for _ in range(request.num_choices):
                jobs.append(self._job(request, one, sampling, caller, len(jobs)))
        admission = self._admit(jobs, caller)
        timeout_s = min(caller.timeout_s or self.section.request_timeout_s, self.section.request_timeout_s)
        began = time.monotonic()

        async def finish(job: Job, answer: Answer) -> None:
            await self._finished(job, answer, caller)

        generation = Generation(self.connection.client, jobs, finish, timeout_s)
        generation.on_close = lambda: self._leave(generation, admission, began, caller)
        try:
            await generation.begin()
        except BaseException as error:
            await generation.close()
            raise self.in_words(error) from error
        for one in recalled:
            if not one.is_known:  # however it ends: what it leaves in the tiers can be found, and deleted
                self._later(self._note(one, caller.scope))
        return generation

    def _max_new_tokens(self, request: CommonRequest, recalled: Recalled) -> int:
        num_tokens, limit = len(recalled.prompt.token_ids), self.connection.model.max_turn_tokens
        if num_tokens == 0:
            raise refuse("the prompt has no tokens: say something", "messages")
        if num_tokens >= limit:
            raise refuse(
                f"this model's maximum context length is {limit} tokens, and the prompt has {num_tokens}: at most"
                f" {limit - 1} leave room for an answer, so shorten it",
                "messages",
                "context_length_exceeded",
            )
        return min(request.wanted_tokens or self.section.default_max_tokens, limit - num_tokens)

    def _job(
        self, request: CommonRequest, recalled: Recalled, sampling: SamplingParams, caller: Caller, index: int
    ) -> Job:
        turn_id = new_request_id()  # ours: a client's own id could name another's turn
        if index and sampling.seed is not None and sampling.temperature > 0:  # choices differ, the same way every time
            sampling = replace(sampling, seed=seed_of(f"{sampling.seed}/{index}"))
        prompt = recalled.prompt
        return Job(
            recalled=recalled,
            request=TurnRequest(
                turn_id=turn_id,
                session_id=scheduler_session(caller.scope, recalled.session_id),
                token_ids=prompt.token_ids,
                sampling=sampling,
                cuts=prompt.cuts,
                drift_at=prompt.drift_at,
                priority=caller.tenant.priority + max(0, request.priority or 0),
                affinity=_affinity(caller, request),
                root=caller.scope,
            ),
        )

    def _admit(self, jobs: Sequence[Job], caller: Caller) -> Admission:
        num_prompt = sum(len(job.request.token_ids) for job in jobs)
        num_new = sum(job.request.sampling.max_new_tokens for job in jobs)
        with _quota_in_words():
            admission = self.quotas.enter(caller.tenant, num_prompt, num_new, time.monotonic())
        self.num_running += 1
        return admission

    def _leave(self, generation: Generation, admission: Admission, began: float, caller: Caller) -> None:
        num_tokens = 0
        for index, (job, heard) in enumerate(zip(generation.jobs, generation.heard)):
            token_ids = tuple(token.token_id for delta in heard for token in delta.tokens)
            num_tokens += len(job.request.token_ids) + len(token_ids)
            if index not in generation.finished:
                self.metrics.observe_abort(len(token_ids), caller.tenant.name)
            if index not in generation.answers and not _is_deletion(generation.failures.get(index)):
                self._later(self._stopped(job, token_ids, "".join(delta.text for delta in heard), caller))
        self.quotas.leave(admission, num_tokens, time.monotonic())
        self.num_running -= 1
        self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    async def _finished(self, job: Job, answer: Answer, caller: Caller) -> None:
        """Before the answer's end is told: the client's next request must find its history."""
        if answer.finish_reason is FinishReason.ABORTED:
            raise _session_deleted()
        self.metrics.observe_answer(answer, caller.tenant.name)
        ids = self.chat.answer_ids(answer.token_ids, answer.text, answer.num_tokens_kept)
        try:
            await self.recollection.remember(job.recalled, ids, answer.text)
        except (RayError, OSError) as error:
            log.warning("request %s: the conversation is not remembered: %s", caller.request_id, error)
        last = last_turn(answer, job.request.drift_at, self.connection.model.prefill_tokens_per_s)
        self._later(self._note(job.recalled, caller.scope, ids, last))

    async def _stopped(self, job: Job, token_ids: tuple[int, ...], text: str, caller: Caller) -> None:
        """Its client has gone, or the time was over: the next request goes on from what it received."""
        if not token_ids:
            return
        try:
            await self.recollection.remember_stopped(job.recalled, token_ids, text)
        except (RayError, OSError) as error:
            log.warning("request %s: what was stopped is not remembered: %s", caller.request_id, error)
        await self._note(job.recalled, caller.scope, token_ids)

    async def _note(
        self, recalled: Recalled, scope: str, answer_ids: tuple[int, ...] = (), last: LastTurn | None = None
    ) -> None:
        """The session's marks and figures, for those who look, and to delete it by. One note of a session at a time."""
        prompt, session_id = recalled.prompt, recalled.session_id
        tokens = prompt.token_ids + answer_ids
        cuts = {*prompt.cuts, len(prompt.token_ids), len(tokens) - 1} - {0}
        chain = keys.chain(scope, tokens, self.connection.model.chunk_tokens, cuts=cuts)
        marks = [Mark(end, key) for end, key in chain]
        lock = self._notes.setdefault(f"{scope}/{session_id}", asyncio.Lock())
        try:
            async with lock:
                session = await self.book.get(scope, session_id) or Session(session_id=session_id)
                session = session.after(marks, prompt.num_shared, last, time.time())
                await self.book.put(scope, session, recalled.began)
                await self.administration.renew_pin(scope, session)
        except (RayError, OSError) as error:
            log.warning("session %s is not noted: %s", session_id, error)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Returns when everything that was to be done later is done."""
        await asyncio.gather(*self._tasks)

    # --- words --------------------------------------------------------------------------------------------------------

    def _check(self, request: CommonRequest, caller: Caller) -> None:
        """What can be told before the prompt is known."""
        if self.connection.is_outdated:
            raise ApiError(503, OUTDATED, code="outdated", retry_after_s=1.0)
        request.check()
        self._check_model(request)
        with _quota_in_words():
            self.quotas.check(caller.tenant, time.monotonic())

    def _check_model(self, request: CommonRequest) -> None:
        name = self.model_name
        if request.model not in (None, "", name):
            raise ApiError(
                404,
                f"the model {request.model!r} is not served here: ask for {name!r} (see /v1/models)",
                code="model_not_found",
                param="model",
            )

    @property
    def model_name(self) -> str:
        return self.connection.model_name

    @property
    def fingerprint(self) -> str:
        """Of what must be equal for answers to be equal: OpenAI's system_fingerprint."""
        return f"fp_{self.connection.model.root[:12]}"

    @staticmethod
    def now() -> float:
        return time.time()

    # --- how it is ----------------------------------------------------------------------------------------------------

    async def problem(self) -> str | None:
        """Why turns cannot be answered now; None while they can."""
        if self.connection.is_outdated:
            return OUTDATED
        stats = await self.connection.scheduler_stats()
        if not stats:
            return "the scheduler does not answer"
        if not stats["replicas"]:
            return "no replica is ready"
        limit_s = self.section.hang_limit_s / 2
        replicas = await self.connection.replica_stats()
        if not any(replica["stalled_s"] < limit_s for replica in replicas):
            return f"no engine has made a step for {limit_s:g} s"
        return None

    async def exposition(self) -> str:
        """Prometheus' text."""
        scheduler, stores, replicas = await asyncio.gather(
            self.connection.scheduler_stats(), self.connection.store_stats(), self.connection.replica_stats()
        )
        return self.metrics.exposition(scheduler, stores, replicas, self.others)

    def in_words(self, error: BaseException) -> BaseException:
        """What a client is told of it; bugs stay what they are."""
        match error:
            case ApiError():
                return error
            case QueueFull():
                wait_s = self._mean_s * max(1, error.num_waiting) / max(1, self.connection.num_slots)
                return ApiError(429, str(error), code="queue_full", retry_after_s=min(wait_s, 600.0))
            case SessionGone():
                return _session_deleted()
            case TimeoutError():
                return ApiError(504, "the answer was not ready in time: ask for fewer tokens, or try again later")
            case TurnFailed() | RayError():
                return ApiError(503, f"the turn could not be answered: {error}", code="turn_failed", retry_after_s=1.0)
        return error


@contextmanager
def _quota_in_words() -> Iterator[None]:
    try:
        yield
    except QuotaExceeded as error:
        raise ApiError(429, str(error), code="quota_exceeded", retry_after_s=error.retry_after_s) from None


def _is_deletion(error: Exception | None) -> bool:
    return isinstance(error, SessionGone) or (isinstance(error, ApiError) and error.code == "session_deleted")


def _affinity(caller: Caller, request: CommonRequest) -> str | None:
    """What the client says its requests have in common, hashed: `prompt_cache_key`, else the user."""
    hint = request.prompt_cache_key or caller.user_id
    return hashlib.sha256(f"{caller.scope}\n{hint}".encode("utf-8", "surrogatepass")).hexdigest()[:16] if hint else None


def _session_deleted() -> ApiError:
    return ApiError(409, "the session was deleted: there is no answer", code="session_deleted")


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"
