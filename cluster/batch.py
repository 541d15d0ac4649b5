"""The batch job: conversations in, one row a turn out.

    input file -> conversations -> for each: prompt -> client -> answer -> row -> next turn's prompt ...

Conversations run concurrently, the turns of one in order. What a conversation's next prompt contains is decided here
(its own answers or the recorded ones); everything about KV is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.engine.params import SamplingParams, seed_of
from actors.engine.tokenizer import load_tokenizer
from actors.wire import TurnRequest
from cluster.bringup import Running, running
from cluster.chat import ChatFormat, RenderedPrompt, TemplateError, Transcript
from cluster.client import Answer, Client, TurnFailed
from cluster.config import Config
from cluster.conversations import Conversation, Exchange, InputError, Problem, exchanges, read_conversations
from cluster.report import PassResult, build_report, quantile
from cluster.results import ResultWriter, Row, check_folder

HISTORIES = ("own", "recorded")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """One batch job, as the user asked for it."""

    input: str
    out: str
    history: str = "own"
    """own: the model's answers are the history; recorded: those of the input are."""
    limit: int | None = None
    """Only the first so many conversations."""
    concurrency: int = 8
    """Conversations under way at a time."""
    arrival_rate: float | None = None
    """Conversations a second (Poisson); None starts each as soon as there is room."""
    think_time_s: float = 0.0
    """Mean pause before a further turn (exponential)."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    resume: bool = False
    compare: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise InputError(f"results go to a folder of this machine or a mounted one, not to {self.out!r}; see --out")
        if self.history not in HISTORIES:
            raise InputError(f"history must be one of {', '.join(HISTORIES)}, not {self.history!r}")
        if self.concurrency < 1:
            raise InputError(f"concurrency must be at least 1, not {self.concurrency}")
        if self.arrival_rate is not None and self.arrival_rate <= 0:
            raise InputError(f"arrival rate must be above 0 conversations a second, not {self.arrival_rate}")
        if self.think_time_s < 0:
            raise InputError(f"think time must not be negative, not {self.think_time_s}")


@dataclass(frozen=True)
class Listener:
    """Who wants to hear how the job goes."""

    begin: Callable[[str, int], None] = lambda *_: None
    turn_done: Callable[[Row], None] = lambda *_: None
    problem: Callable[[Problem], None] = lambda *_: None


def run_batch(config: Config, options: BatchOptions, listener: Listener) -> dict[str, Any]:
    """Runs the job on a cluster brought up for it and returns the report (see cluster/report.py).

    Raises InputError, OutputError, ConfigError, ModelError or BringUpError, each in words for people.
    """
    work = read_input(options, listener)  # bad input is told before anything starts,
    check_folder(Path(options.out), options.resume)
    load_tokenizer(config.model.path)  # and so is a model that is not there
    with running(config) as cluster:
        return _run(cluster, options, listener, work)


def run_on(cluster: Running, options: BatchOptions, listener: Listener) -> dict[str, Any]:
    """The same on a cluster that is up already; the report's counters of bytes are the cluster's since its start."""
    return _run(cluster, options, listener, read_input(options, listener))


@dataclass(frozen=True)
class Work:
    """What there is to do: conversations, and how many records were unusable."""

    conversations: list[Conversation]
    num_bad: int


def _run(cluster: Running, options: BatchOptions, listener: Listener, work: Work) -> dict[str, Any]:
    chat = ChatFormat(load_tokenizer(cluster.config.model.path))
    runs = []
    for reuse in (True, False) if options.compare else (True,):
        folder = Path(options.out) if reuse else Path(options.out) / "reuse_off"
        with ResultWriter(folder, _settings(cluster, options), options.resume) as writer:
            run = _Pass(cluster.client, chat, options, reuse, writer, listener)
            runs.append(asyncio.run(run.run(work.conversations)))
    stores = cluster.store_stats()
    answered = {row.conversation_id for row in runs[0].rows if not row.failed}
    skipped = work.num_bad + sum(conversation.id not in answered for conversation in work.conversations)
    other = runs[1] if options.compare else None
    report = build_report(runs[0], other, stores, skipped, cluster.scheduler_stats())
    (Path(options.out) / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def read_input(options: BatchOptions, listener: Listener) -> Work:
    """Reads all of it. Raises InputError, with `strict` for any problem."""
    work: list[Conversation] = []
    num_bad = 0
    for item in read_conversations(options.input, limit=options.limit):
        if isinstance(item, Conversation):
            work.append(item)
        elif options.strict:
            raise InputError(f"{item.where}: {item.what}; {item.advice}")
        else:
            num_bad += 1
            listener.problem(item)
    if not work:
        raise InputError(f"{options.input} has no usable conversation")
    return Work(work, num_bad)


def _settings(cluster: Running, options: BatchOptions) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run."""
    return {
        "input": options.input,
        "limit": options.limit,
        "history": options.history,
        "model": cluster.model.root,
        "sampling": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options.sampling).items()},
        "seed": options.seed,
    }


class _Pass:
    """One run over the conversations, with reuse or without."""

    def __init__(
        self,
        client: Client,
        chat: ChatFormat,
        options: BatchOptions,
        reuse: bool,
        writer: ResultWriter,
        listener: Listener,
    ) -> None:
        self._client = client
        self._chat = chat
        self._options = options
        self._reuse = reuse
        self._writer = writer
        self._listener = listener
        self._done = {(row.conversation_id, row.turn): row for row in writer.done}

    async def run(self, work: Sequence[Conversation]) -> PassResult:
        turns = sum(len(exchanges(conversation)) for conversation in work)
        self._listener.begin("with reuse" if self._reuse else "reuse off", turns)
        for row in self._writer.done:
            self._listener.turn_done(row)
        began = time.monotonic()
        room = asyncio.Semaphore(self._options.concurrency)
        async with asyncio.TaskGroup() as group:
            async for conversation in self._arrivals(work):
                await room.acquire()
                task = group.create_task(self._converse(conversation))
                task.add_done_callback(lambda _: room.release())
        return PassResult(reuse=self._reuse, rows=list(self._writer.done), wall_s=time.monotonic() - began)

    async def _arrivals(self, work: Sequence[Conversation]) -> AsyncIterator[Conversation]:
        rate = self._options.arrival_rate
        chance = random.Random(self._options.seed)
        due = time.monotonic()
        for conversation in work:
            if rate is not None:
                due += chance.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield conversation

    async def _converse(self, conversation: Conversation) -> None:
        """The turns of one conversation, in order. After a failed turn the rest cannot be run, and is told so."""
        transcript = Transcript(self._chat, conversation.id)
        pauses = random.Random(f"{self._options.seed}/{conversation.id}")
        failure = ""
        for turn, exchange in enumerate(exchanges(conversation)):
            row = self._done.get((conversation.id, turn))
            if row is not None:
                transcript.prompt(exchange.messages)
            elif failure:
                row = _failed(conversation, turn, 0, f"not run: {failure}")
                self._record(row)
            else:
                if turn and self._options.think_time_s:
                    await asyncio.sleep(pauses.expovariate(1 / self._options.think_time_s))
                row = await self._take_turn(conversation, turn, exchange, transcript)
                self._record(row)
            if row.failed:
                failure = failure or f"turn {turn} failed"
            else:
                self._remember(transcript, exchange, row)

    async def _take_turn(
        self, conversation: Conversation, turn: int, exchange: Exchange, transcript: Transcript
    ) -> Row:
        num_tokens = 0
        try:
            prompt = transcript.prompt(exchange.messages)
            num_tokens = len(prompt.token_ids)
            answer = await self._client.run(self._request(conversation, turn, prompt))
        except (TurnFailed, TemplateError) as error:
            row = _failed(conversation, turn, num_tokens, str(error))
            self._listener.problem(Problem(conversation.where, f"turn {turn}: {error}", "the conversation ends here"))
            return row
        return _row(conversation, turn, prompt, answer)

    def _request(self, conversation: Conversation, turn: int, prompt: RenderedPrompt) -> TurnRequest:
        turn_id = f"{conversation.id}#{turn}" + ("" if self._reuse else "#reuse_off")
        sampling = self._options.sampling
        if sampling.seed is None:
            name = f"{self._options.seed}/{conversation.id}/{turn}"
            sampling = replace(sampling, seed=seed_of(name))
        return TurnRequest(
            turn_id=turn_id,
            session_id=conversation.id,
            token_ids=prompt.token_ids,
            sampling=sampling,
            cuts=prompt.cuts,
            drift_at=prompt.drift_at,
            reuse=self._reuse,
        )

    def _remember(self, transcript: Transcript, exchange: Exchange, row: Row) -> None:
        if self._options.history == "recorded" and exchange.recorded is not None:
            transcript.add_recorded_answer(exchange.recorded)
        else:
            transcript.add_answer(row.answer_token_ids, row.answer)

    def _record(self, row: Row) -> None:
        self._writer.write(row)
        self._listener.turn_done(row)


def _row(conversation: Conversation, turn: int, prompt: RenderedPrompt, answer: Answer) -> Row:
    return Row(
        conversation_id=conversation.id,
        turn=turn,
        where=conversation.where,
        prompt_tokens=len(prompt.token_ids),
        answer=answer.text,
        answer_token_ids=list(answer.token_ids),
        finish_reason=str(answer.finish_reason),
        reused_tokens={str(tier): count for tier, count in answer.account.reused.items()},
        recomputed_tokens={str(cause): count for cause, count in answer.account.recomputed.items()},
        drift_at=prompt.drift_at,
        submitted_at=time.time() - answer.end_to_end_s,
        queue_wait_s=answer.queue_wait_s,
        restore_s=answer.account.restore_s,
        ttft_s=answer.ttft_s,
        itl_mean_s=sum(answer.itl_s) / len(answer.itl_s) if answer.itl_s else None,
        itl_p95_s=quantile(answer.itl_s, 0.95),
        end_to_end_s=answer.end_to_end_s,
        replica=answer.replica_id,
        attempts=answer.num_attempts,
        retried_tokens=answer.retried_tokens,
    )


def _failed(conversation: Conversation, turn: int, num_tokens: int, reason: str) -> Row:
    return Row(
        conversation_id=conversation.id,
        turn=turn,
        where=conversation.where,
        prompt_tokens=num_tokens,
        answer="",
        answer_token_ids=[],
        finish_reason="error",
        error=reason,
    )
