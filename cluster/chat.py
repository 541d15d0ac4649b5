"""From messages to token ids, such that a session's history keeps the very tokens it was made of.

A chat template gives text. Tokenising it anew each turn would spell earlier answers differently than the model did,
and one different token makes all KV after it useless. So each earlier answer is rendered as a placeholder, the text is
split there, only the text between is tokenised, and the answers' own token ids are put in:

    text    <user>Hi<end><assistant> ANSWER_0 <end><user>Go on<end><assistant>
    tokens  [tokenised, cached     ] [ids    ] [tokenised                    ]
                                   ^        ^- cut: the KV of an answer's last token was never computed
                                   `- cut: end of an earlier prompt

A template may change answers (drop their reasoning, say). That is found by rendering with the true texts as well; such
an answer is then taken as text, and where the tokens leave those of the turn before is reported as drift.

*Templates with gaps.* A template without system messages (Gemma) gets the system text at the head of the next user
message; one without tool messages gets tool results as user messages; one that refuses two user messages in a row gets
one. Special tokens spelt out in a message are taken for special tokens, as transformers does.

This file does not know where tokens go, or what of them is reused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

import jinja2

from actors.engine.text import TextStream
from cluster.conversations import Message

FALLBACK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: `User: ...` and `Assistant: ...` on lines of their own."""

MIN_SHARED_TOKENS = 16
"""What fewer tokens cost to restore is more than they save: prompts are not cut for them."""

TokenIds = tuple[int, ...]


class TemplateError(ValueError):
    """The tokenizer's chat template does not accept these messages."""


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """One turn's prompt."""

    token_ids: TokenIds
    cuts: TokenIds
    """Ascending positions in (0, len) where a prefix ends that another conversation or a later turn may share: what
    depends on the system message only; each earlier prompt; each earlier answer less its last token."""
    drift_at: int | None
    """Where these tokens leave those of the turn before (its prompt and answer); None if they go on from them."""
    num_shared: int = 0
    """Tokens that depend on the system message only."""


@dataclass(frozen=True, kw_only=True)
class AnsweredTurn:
    """An answered turn. Its prompt are the first `num_kept` tokens of the turn before, answer included, and then
    `prompt_ids`."""

    messages: tuple[Message, ...]
    lead: str
    """The text of its prompt after the answer before."""
    num_kept: int
    prompt_ids: TokenIds
    answer: str
    token_ids: TokenIds
    """Of the answer."""


class ChatFormat:
    """A tokenizer with its chat template. Holds no session."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = self.tokenizer = tokenizer
        self._template: str | None = None if getattr(tokenizer, "chat_template", None) else FALLBACK_TEMPLATE
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(added | set(tokenizer.all_special_ids))
        self._shared = lru_cache(maxsize=256)(self._find_shared)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The template's text. TemplateError if it does not accept the messages."""
        plain = [{"role": message.role, "content": message.content} for message in self._fitted(messages)]
        return self._render(plain, add_generation_prompt)

    def tokenize(self, text: str) -> TokenIds:
        """Ids of a text that begins a prompt; nothing is added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def tokenize_prompt(self, text: str) -> TokenIds:
        """Ids of a whole prompt that no template made: with the tokens that the tokenizer begins a text with."""
        return tuple(self._tokenizer.encode(text))

    def tokenize_after(self, text: str) -> TokenIds:
        """Ids of a text that goes on after an answer or a header: without the space that some tokenizers begin with."""
        anchor = self._tokenizer.eos_token
        if anchor is not None:
            ids = self._tokenizer.encode(anchor + text, add_special_tokens=False)
            if ids and ids[0] == self._tokenizer.eos_token_id:
                return tuple(ids[1:])
        return self.tokenize(text)

    def answer_ids(self, token_ids: Sequence[int], text: str, num_kept: int | None = None) -> TokenIds:
        """The ids of an answer that a stop string ended: the `num_kept` tokens wholly before it, as the model gave
        them, and what else belongs to `text`. None: no stop string did."""
        if num_kept is None:
            return tuple(token_ids)
        stream = TextStream(self._tokenizer)
        kept = "".join([stream.push(token_id) for token_id in token_ids[:num_kept]] + [stream.finish()])
        if not text.startswith(kept):  # a character was cut in two
            return self.tokenize_after(text)
        rest = text[len(kept) :]
        return (*token_ids[:num_kept], *(self.tokenize_after(rest) if rest else ()))

    def ids_within(self, token_ids: Sequence[int], text: str) -> TokenIds:
        """The ids of an answer that was cut after `text`, which it begins with: those wholly inside as the model gave
        them, the rest tokenised."""
        stream = TextStream(self._tokenizer)
        num_kept = num_chars = 0
        for i, token_id in enumerate(token_ids, 1):
            piece = stream.push(token_id)
            num_chars += len(piece)
            if num_chars > len(text):
                break
            num_kept = i if piece else num_kept
        return self.answer_ids(token_ids, text, num_kept)

    def shared_prefix(self, messages: Sequence[Message]) -> TokenIds:
        """The tokens every prompt with the same leading system messages begins with."""
        return self._shared(tuple(takewhile(lambda message: message.role == "system", messages)))

    def _find_shared(self, system: tuple[Message, ...]) -> TokenIds:
        prompts = [self.tokenize(self.render([*system, Message("user", text)])) for text in ("A", "9 b")]
        return prompts[0][: _common(*prompts)]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(f"the chat template refuses messages of roles {roles}: {error}") from error
        return text

    def _accepts(self, *messages: tuple[str, str]) -> bool:
        """Whether the template takes these (role, content) and shows every content."""
        try:
            text = self._render([{"role": role, "content": content} for role, content in messages])
        except TemplateError:
            return False
        return all(content in text for _, content in messages)

    @cached_property
    def _takes_system(self) -> bool:
        return self._accepts(("system", "Sigma"), ("user", "Ypsilon"))

    @cached_property
    def _takes_tools(self) -> bool:
        return self._accepts(("user", "Ypsilon"), ("assistant", "Alpha"), ("tool", "Tau"))

    @cached_property
    def _takes_users_in_a_row(self) -> bool:
        return self._accepts(("user", "Ypsilon"), ("user", "Omega"))

    def _fitted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the roles this template knows."""
        fitted: list[Message] = []
        waiting: list[str] = []  # system texts for the next user message
        for message in messages:
            if message.role == "system" and not self._takes_system:
                waiting.append(message.content)
                continue
            role = "user" if message.role == "tool" and not self._takes_tools else message.role
            content = message.content
            if role == "user" and waiting:
                content, waiting = "\n\n".join([*waiting, content]), []
            if role == "user" and fitted and fitted[-1].role == "user" and not self._takes_users_in_a_row:
                fitted[-1] = Message("user", f"{fitted[-1].content}\n\n{content}")
            else:
                fitted.append(Message(role, content))
        return fitted + [Message("user", text) for text in waiting]


class Transcript:
    """The token-exact history of one session.

    `prompt` renders history and new messages; they become history when `add_answer` follows. A prompt without an answer
    (its turn failed) leaves no trace.
    """

    def __init__(self, chat: ChatFormat, session_id: str) -> None:
        self.session_id = session_id
        self._chat = chat
        self._turns: list[AnsweredTurn] = []
        self._known: TokenIds = ()  # prompt and answer of the last turn
        self._asked: tuple[tuple[Message, ...], str, TokenIds] | None = None  # messages, lead and ids of a prompt
        self._pieces: dict[str, TokenIds] = {}  # text between answers, of the last prompt

    def prompt(self, new_messages: Sequence[Message]) -> RenderedPrompt:
        """Raises TemplateError; the transcript is then as it was."""
        new = tuple(new_messages)
        messages = self._messages(new, {})
        text, exact = self._render_exact(new, messages)
        token_ids, cuts, lead = self._splice(text, exact)
        num_shared = _common(token_ids, self._chat.shared_prefix(messages))
        if num_shared >= MIN_SHARED_TOKENS:
            cuts.add(num_shared)
        agreed = _common(token_ids, self._known)
        self._asked = (new, lead, token_ids)
        return RenderedPrompt(
            token_ids=token_ids,
            cuts=tuple(sorted(cut for cut in cuts if 0 < cut < len(token_ids))),
            drift_at=agreed if agreed < len(self._known) else None,
            num_shared=num_shared,
        )

    def add_answer(self, token_ids: Sequence[int], text: str) -> None:
        """The answer to the last prompt as the model gave it: its ids, an end token included, and their text."""
        if self._asked is None:
            raise ValueError(f"session {self.session_id}: there is no prompt to answer; call prompt() first")
        new, lead, prompt_ids = self._asked
        num_kept = _common(prompt_ids, self._known)
        turn = AnsweredTurn(
            messages=new,
            lead=lead,
            num_kept=num_kept,
            prompt_ids=prompt_ids[num_kept:],
            answer=text,
            token_ids=tuple(token_ids),
        )
        self._turns.append(turn)
        self._known = prompt_ids + tuple(token_ids)
        self._asked = None

    def add_recorded_answer(self, text: str) -> None:
        """An answer that the model did not give: tokenised once, here."""
        self.add_answer(self._chat.tokenize_after(text), text)

    @property
    def turns(self) -> tuple[AnsweredTurn, ...]:
        """What makes the history; a prompt without an answer is not part of it."""
        return tuple(self._turns)

    def fork(self) -> Transcript:
        """A copy that goes its own way, the last prompt included."""
        copy = Transcript(self._chat, self.session_id)
        copy._turns, copy._known = list(self._turns), self._known
        copy._asked, copy._pieces = self._asked, self._pieces
        return copy

    def extend(self, turns: Sequence[AnsweredTurn]) -> None:
        """Turns that another transcript with the same history has seen, under the same tokenizer."""
        for turn in turns:
            self._turns.append(turn)
            self._known = self._known[: turn.num_kept] + turn.prompt_ids + turn.token_ids
        self._asked = None

    def _messages(self, new: tuple[Message, ...], places: Mapping[int, str]) -> list[Message]:
        """History and new messages; the answers that have a place are shown as that."""
        messages: list[Message] = []
        for i, turn in enumerate(self._turns):
            messages += [*turn.messages, Message("assistant", places.get(i, turn.answer))]
        return [*messages, *new]

    def _render_exact(self, new: tuple[Message, ...], literal: list[Message]) -> tuple[str, dict[int, str]]:
        """The text with placeholders, and those by answer; answers that the template changes stand in it as text."""
        places = dict(enumerate(_placeholders(self.session_id, len(self._turns), literal)))
        answers = {i: turn.answer for i, turn in enumerate(self._turns)}
        text = self._render_with(new, places)
        exact = {i: place for i, place in places.items() if text.count(place) == 1}
        if exact != places or not _is_filled(text, exact, answers, self._chat.render(literal)):
            exact = {i: place for i, place in exact.items() if self._is_untouched(new, places, i, text)}
            text = self._render_with(new, exact)
        found = [text.find(place) for place in exact.values()]
        if -1 in found or found != sorted(found) or any(text.count(place) != 1 for place in exact.values()):
            return self._chat.render(literal), {}
        return text, exact

    def _is_untouched(self, new: tuple[Message, ...], places: dict[int, str], i: int, text: str) -> bool:
        """Whether the template shows answer `i` as it is, whitespace around it aside."""
        others = {j: place for j, place in places.items() if j != i}
        return _is_filled(text, {i: places[i]}, {i: self._turns[i].answer}, self._render_with(new, others))

    def _render_with(self, new: tuple[Message, ...], places: dict[int, str]) -> str:
        return self._chat.render(self._messages(new, places))

    def _splice(self, text: str, exact: dict[int, str]) -> tuple[TokenIds, set[int], str]:
        """Token ids of the text with the answers' ids in their places, the cuts at their borders, and the last piece.

        A piece that differs from what its answer was prompted with in whitespace at its end only (the space between
        header and answer, which the answer's first token brings) is taken as it was in that prompt.
        """
        pieces: dict[str, TokenIds] = {}
        token_ids: list[int] = []
        cuts: set[int] = set()
        rest = text
        for i, place in exact.items():
            piece, rest = rest.split(place, 1)
            lead = self._turns[i].lead
            token_ids += self._piece(lead if piece.rstrip() == lead.rstrip() else piece, token_ids, pieces)
            cuts.add(len(token_ids))
            token_ids += self._turns[i].token_ids
            cuts.add(len(token_ids) - 1)
        token_ids += self._piece(rest, token_ids, pieces)
        self._pieces = pieces
        return tuple(token_ids), cuts, rest

    def _piece(self, text: str, before: list[int], pieces: dict[str, TokenIds]) -> TokenIds:
        """Ids of the text between two answers; an end token that the answer before brought is not doubled."""
        key = text if before else f"^{text}"
        ids = self._pieces.get(key)
        if ids is None:
            ids = self._chat.tokenize_after(text) if before else self._chat.tokenize(text)
        pieces[key] = ids
        doubled = bool(before and ids) and before[-1] == ids[0] and ids[0] in self._chat.special_ids
        return ids[1:] if doubled else ids


def _placeholders(session_id: str, count: int, messages: Sequence[Message]) -> list[str]:
    """Texts that occur in no message, of letters and digits only so that templates leave them alone."""
    nonce = hashlib.sha256(session_id.encode()).hexdigest()[:16]
    while any(nonce in message.content for message in messages):
        nonce = hashlib.sha256(nonce.encode()).hexdigest()[:16]
    return [f"ANSWER{nonce}N{i}E" for i in range(count)]


def _is_filled(text: str, places: dict[int, str], answers: dict[int, str], shown: str) -> bool:
    """Whether `shown` is `text` with the answers in their places, as they are or without whitespace around them."""
    ways: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip, lambda answer: answer.strip("\n"))
    for way in ways:
        filled = text
        for i, place in places.items():
            filled = filled.replace(place, way(answers[i]))
        if filled == shown:
            return True
    return False


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
