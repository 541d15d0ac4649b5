"""Recognising conversations: a client sends its whole history again, and gets back the very tokens that it was.

Every answered exchange has a name, a hash over all messages up to it and the answer:

    name(i) = H(name(i-1), messages of exchange i, answer i less whitespace around it)      name(-1) = scope

Under the name lies what the exchange was made of in tokens. A request's history is looked up from its end on; where
it was edited or branched the names differ from there on, and what comes before is found. An answer that nobody here
gave (another model's, a history from elsewhere) is tokenised once and then kept like one of ours. One that was stopped
lies under its question: its client has perhaps not received all of it. Texts of plain completions have names too: of
the longest known text that a prompt begins with.

`scope` is the model's root key of a tenant: others have other names for the same words.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import zstandard

from cluster.chat import AnsweredTurn, ChatFormat, RenderedPrompt, TokenIds, Transcript
from cluster.conversations import Message
from storage.histories import Record

FIRST_BLOCK_CHARS, BLOCK_CHARS = 16, 512  # of completions' texts: those that agree in so many characters share a bucket
MAX_IN_BUCKET = 512  # the newest
MAX_IN_MEMORY = 2048  # transcripts and texts held by one front process

Result = TypeVar("Result")
Exchange = tuple[tuple[Message, ...], str]
"""The messages before an answer, and the answer."""


class Shelf(Protocol):
    """Where records are kept; may fail, which costs recognition and nothing else."""

    async def get(self, keys: list[str], limit: int | None = None) -> list[Record]:
        """Everything under these keys, or the newest so many of each."""

    async def put(self, records: list[Record], since: float) -> None:
        """Keeps these, unless their owner was deleted after `since` (Unix seconds)."""


@dataclass(kw_only=True)
class Recalled:
    """A request's conversation: its prompt, and what is needed to remember how it goes on."""

    session_id: str
    prompt: RenderedPrompt
    scope: str
    is_known: bool
    """Whether any answer of its history, or the beginning of its text, was given here."""
    name: str = ""
    """Of the exchange before this turn."""
    new: tuple[Message, ...] = ()
    transcript: Transcript | None = None
    text: str | None = None
    """A completion's prompt; then there is no transcript. With neither, the prompt came as token ids."""
    spelt: list[Record] = field(default_factory=list)
    """Of the answers in its history that were not known until now, and of those behind one that was spelt anew."""
    began: float = field(default_factory=time.time)
    """When the request came; Unix seconds."""


class Recollection:
    """One front process's memory of conversations, before the shelf that all share."""

    def __init__(self, chat: ChatFormat, shelf: Shelf) -> None:
        self.chat = chat
        self._shelf = shelf
        self._transcripts: OrderedDict[str, tuple[str, Transcript]] = OrderedDict()  # name -> session, history
        self._texts: OrderedDict[str, TokenIds] = OrderedDict()  # scope and name of a text -> its ids
        self._forgotten: OrderedDict[str, float] = OrderedDict()  # session -> when it was deleted, Unix seconds
        # One thread: tokenizers may not be used by two at a time, and the event loop has streams to serve meanwhile.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    # --- chats --------------------------------------------------------------------------------------------------------

    async def recall(self, scope: str, messages: Sequence[Message], session_id: str | None) -> Recalled:
        """The conversation that these messages are. Raises TemplateError for messages the template refuses."""
        began = time.time()
        exchanges, new = split(messages)
        names = _names(scope, exchanges)
        found = next((i for i in range(len(names), 0, -1) if names[i - 1] in self._transcripts), 0)
        owner, transcript = "", None
        if found:
            owner, known = self._transcripts[names[found - 1]]
            self._transcripts.move_to_end(names[found - 1])
            transcript = known.fork()
        records, stopped = await self._look_up(scope, exchanges, names, found)
        if not owner and records:
            owner = next(records[name].owner for name in reversed(names) if name in records)
        is_known = bool(found or records)
        owner = f"{scope}/{session_id}" if session_id else owner or f"{scope}/{uuid.uuid4()}"
        session = owner.removeprefix(f"{scope}/")
        if transcript is None:
            transcript = Transcript(self.chat, session)
        spelt: list[Record] = []

        def build() -> RenderedPrompt:
            for (asked, answer), name in zip(exchanges[found:], names[found:]):
                turn = _turn_of(records[name].value, asked) if name in records else None
                if turn is not None and not spelt:
                    transcript.extend([turn])
                    continue
                transcript.prompt(asked)
                if turn is not None:  # what comes before it was spelt anew, and is perhaps not what it once followed
                    transcript.add_answer(turn.token_ids, turn.answer)
                else:
                    transcript.add_recorded_answer(answer)
                spelt.append(Record(name, owner, _value_of(transcript.turns[-1])))
            return transcript.prompt(new)

        prompt = await self._compute(build)
        return Recalled(
            session_id=session,
            prompt=prompt,
            scope=scope,
            is_known=is_known,
            name=names[-1] if names else scope,
            new=new,
            transcript=transcript,
            spelt=stopped + spelt,
            began=began,
        )

    async def _look_up(
        self, scope: str, exchanges: Sequence[Exchange], names: Sequence[str], start: int
    ) -> tuple[dict[str, Record], list[Record]]:
        """(what is known of the exchanges from `start` on, by name; those of it that are stopped answers, as far as the
        client has them)."""
        before = [scope, *names]
        questions = {
            names[i]: (_stopped_key(before[i], exchanges[i][0]), *exchanges[i]) for i in range(start, len(exchanges))
        }
        found = await self._ask_shelf([*questions, *(key for key, _, _ in questions.values())])
        records = {record.key: record for record in found if record.key in questions}
        wanted = [
            (name, record, asked, answer)
            for name, (key, asked, answer) in questions.items()
            for record in found
            if record.key == key and name not in records
        ]

        def cut() -> dict[str, Record]:
            turns = [
                (name, record, self._cut(_turn_of(record.value, asked), answer))
                for name, record, asked, answer in wanted
            ]
            return {
                name: Record(name, record.owner, _value_of(turn)) for name, record, turn in turns if turn is not None
            }

        stopped = await self._compute(cut) if wanted else {}
        return records | stopped, list(stopped.values())

    def _cut(self, turn: AnsweredTurn, answer: str) -> AnsweredTurn | None:
        """The turn, as far as this is its answer; None if it did not begin so."""
        words, whole = answer.strip(), turn.answer
        start = len(whole) - len(whole.lstrip())
        if not words or not whole.startswith(words, start):
            return None
        text = whole[: start + len(words)]
        return replace(turn, answer=text, token_ids=self.chat.ids_within(turn.token_ids, text))

    # --- texts --------------------------------------------------------------------------------------------------------

    async def recall_text(self, scope: str, text: str, session_id: str | None) -> Recalled:
        """A completion's prompt: the ids of the longest known prompt and answer it begins with, the rest tokenised."""
        began = time.time()
        buckets = await self._ask_shelf(_buckets(scope, text))
        ends = [(end, record) for record in buckets if (end := _end_of(record.part, text)) is not None]
        end, known = max(ends, key=lambda pair: pair[0], default=(0, None))
        owner = (
            f"{scope}/{session_id}" if session_id else known.owner if known is not None else f"{scope}/{uuid.uuid4()}"
        )
        ids = await self._ids_of(f"{scope}/{known.part}") if known is not None else None

        def build() -> RenderedPrompt:
            if ids is None:
                return RenderedPrompt(token_ids=self.chat.tokenize_prompt(text), cuts=(), drift_at=None)
            rest = self.chat.tokenize_after(text[end:]) if text[end:] else ()
            return RenderedPrompt(token_ids=ids + rest, cuts=(len(ids),) if rest else (), drift_at=None)

        return Recalled(
            session_id=owner.removeprefix(f"{scope}/"),
            prompt=await self._compute(build),
            scope=scope,
            is_known=ids is not None,
            text=text,
            began=began,
        )

    async def _ids_of(self, name: str) -> TokenIds | None:
        """None where they have left meanwhile."""
        ids = self._texts.get(name)
        if ids is None:
            records = await self._ask_shelf([f"text/{name}"])
            ids = tuple(_unpack(records[-1].value)["ids"]) if records else None
        return ids

    def of_ids(self, scope: str, token_ids: TokenIds, session_id: str | None) -> Recalled:
        """A completion's prompt that its client has tokenised: nothing is to be recognised, or remembered."""
        prompt = RenderedPrompt(token_ids=token_ids, cuts=(), drift_at=None)
        return Recalled(session_id=session_id or str(uuid.uuid4()), prompt=prompt, scope=scope, is_known=False)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    async def remember_stopped(self, recalled: Recalled, token_ids: TokenIds, text: str) -> None:
        """What there was of the turn's answer when it was stopped; its client has this, or less of it."""
        if recalled.transcript is None or not text.strip():
            return
        transcript = recalled.transcript.fork()
        transcript.add_answer(token_ids, text)
        key, owner = _stopped_key(recalled.name, recalled.new), f"{recalled.scope}/{recalled.session_id}"
        stopped = Record(key, owner, _value_of(transcript.turns[-1]), part=_hash(text))
        await self._shelf.put([*recalled.spelt, stopped], recalled.began)

    async def remember(self, recalled: Recalled, token_ids: TokenIds, text: str) -> None:
        """The answer that the turn got (its end token included): the next request may go on from it."""
        owner = f"{recalled.scope}/{recalled.session_id}"
        is_known = recalled.transcript is not None or recalled.text is not None
        if not is_known or recalled.began <= self._forgotten.get(owner, 0.0):
            return
        if recalled.transcript is None:
            assert recalled.text is not None
            ids, part = recalled.prompt.token_ids + self._without_end(token_ids), _part(recalled.text, text)
            name = f"{recalled.scope}/{part}"
            self._texts[name] = ids
            _trim(self._texts)
            index = Record(_buckets(recalled.scope, recalled.text)[-1], owner, b"", part)
            records = [Record(f"text/{name}", owner, _pack({"ids": list(ids)})), index]
        else:
            transcript = recalled.transcript.fork()
            transcript.add_answer(token_ids, text)
            name = _names(recalled.name, [(recalled.new, text)])[0]
            self._transcripts[name] = (owner, transcript)
            _trim(self._transcripts)
            records = [*recalled.spelt, Record(name, owner, _value_of(transcript.turns[-1]))]
        await self._shelf.put(records, recalled.began)

    def forget(self, scope: str, session_id: str) -> None:
        """A conversation was deleted."""
        owner = f"{scope}/{session_id}"
        self._forgotten[owner] = time.time()
        self._forgotten.move_to_end(owner)
        _trim(self._forgotten)
        for name in [name for name, (other, _) in self._transcripts.items() if other == owner]:
            del self._transcripts[name]
        for text in [text for text in self._texts if text.startswith(f"{scope}/")]:  # which session's is not known
            del self._texts[text]

    def _without_end(self, token_ids: TokenIds) -> TokenIds:
        """A text has no end token."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self.chat.special_ids else token_ids

    async def _ask_shelf(self, names: list[str]) -> list[Record]:
        return await self._shelf.get(names, MAX_IN_BUCKET) if names else []

    async def _compute(self, build: Callable[[], Result]) -> Result:
        work: Awaitable[Result] = asyncio.get_running_loop().run_in_executor(self._pool, build)
        return await work


def split(messages: Sequence[Message]) -> tuple[list[Exchange], tuple[Message, ...]]:
    """(exchanges; the messages after the last answer)."""
    exchanges: list[Exchange] = []
    waiting: list[Message] = []
    for message in messages:
        if message.role == "assistant":
            exchanges.append((tuple(waiting), message.content))
            waiting = []
        else:
            waiting.append(message)
    return exchanges, tuple(waiting)


def _names(before: str, exchanges: Sequence[Exchange]) -> list[str]:
    names = []
    for asked, answer in exchanges:
        before = _hash(f"{before}\n{json.dumps([_plain(asked), answer.strip()])}")
        names.append(before)
    return names


def _stopped_key(before: str, asked: tuple[Message, ...]) -> str:
    """Where what was stopped of the answers to this lies."""
    question = f"{before}\n{json.dumps(_plain(asked))}"
    return f"stopped/{_hash(question)}"


def _plain(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _value_of(turn: AnsweredTurn) -> bytes:
    return _pack(
        {
            "lead": turn.lead,
            "num_kept": turn.num_kept,
            "prompt_ids": turn.prompt_ids,
            "answer": turn.answer,
            "token_ids": turn.token_ids,
        }
    )


def _turn_of(value: bytes, asked: tuple[Message, ...]) -> AnsweredTurn:
    fields = _unpack(value)
    fields["prompt_ids"], fields["token_ids"] = tuple(fields["prompt_ids"]), tuple(fields["token_ids"])
    return AnsweredTurn(messages=asked, **fields)


def _pack(fields: dict[str, Any]) -> bytes:
    return zstandard.compress(json.dumps(fields, separators=(",", ":")).encode(), 1)


def _unpack(value: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(zstandard.decompress(value))
    return fields


def _buckets(scope: str, text: str) -> list[str]:
    """Names of the text's beginnings of 0, 16, 32, 64, ... and then every so many characters."""
    name = hashlib.sha256(f"{scope}\ntext".encode()).hexdigest()
    names, start = [name], 0
    while (end := min(max(2 * start, FIRST_BLOCK_CHARS), start + BLOCK_CHARS)) <= len(text):
        name = _hash(f"{name}\n{text[start:end]}")
        names.append(name)
        start = end
    return names


def _part(prompt: str, answer: str) -> str:
    """Lengths and hashes of a prompt and of its answer less whitespace around it, and that of the latter's end."""
    words = answer.strip()
    trailing = len(answer) - len(answer.rstrip()) if words else 0
    return f"{len(prompt)}:{_hash(prompt)}:{len(words)}:{_hash(words)}:{trailing}"


def _end_of(part: str, text: str) -> int | None:
    """Where the prompt and answer end with which this text begins; None if it does not begin with them.

    Whitespace before the answer may have changed, as in a chat.
    """
    length, prompt, num_words, words, trailing = part.split(":")
    start = int(length)
    if start > len(text) or _hash(text[:start]) != prompt:
        return None
    start += len(text[start:]) - len(text[start:].lstrip())
    end = start + int(num_words)
    if end > len(text) or _hash(text[start:end]) != words:
        return None
    space = text[end : end + int(trailing)]
    return end + len(space) if not space.strip() else end


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _trim(memory: OrderedDict[str, Any]) -> None:
    while len(memory) > MAX_IN_MEMORY:
        memory.popitem(last=False)
