"""Conversations without times (ShareGPT or OpenAI messages, see `messages.py`) become a trace.

What the file does not tell is made up from a seed: sessions arrive as a Poisson process in the order of the file, and
think times are exponential. Token counts are estimated from characters, or counted by a function if one is given.
Conversations that begin with the same messages (a system prompt) share the blocks of these. Conversations without a
user's message are passed over, as the public ShareGPT files hold many.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count, islice

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import EMPTY, Prompt, PromptWriter
from policies.simulator.readers.messages import LISTS, Message, TextTurn, conversations
from policies.simulator.trace import Trace, TraceError


@dataclass(frozen=True, kw_only=True)
class ShareGpt:
    """Reads such files; what it makes up is chosen here."""

    seed: int = 0
    sessions_per_s: float = 1.0
    """Rate of the Poisson process in which conversations begin."""
    mean_think_s: float = 60.0
    """Between an answer and the next message, exponential."""
    answer_tokens_per_s: float = 50.0
    """How fast answers are assumed to be written."""
    chars_per_token: float = 4.0
    """For the estimate of a message's tokens, which is rounded up."""
    unanswered_tokens: int = 200
    """Of the answer to a message that has none in the file."""
    window_tokens: int = 0
    """A turn that does not fit loses the oldest tokens of its prompt, half a window is left; 0: no window."""
    block_tokens: int = 64
    count_tokens: Callable[[str], int] | None = None
    """A tokenizer's count instead of the estimate."""

    def __post_init__(self) -> None:
        laws.above_zero(sessions_per_s=self.sessions_per_s, chars_per_token=self.chars_per_token)
        laws.above_zero(answer_tokens_per_s=self.answer_tokens_per_s)
        laws.at_least(0, mean_think_s=self.mean_think_s, window_tokens=self.window_tokens)
        laws.at_least(1, unanswered_tokens=self.unanswered_tokens, block_tokens=self.block_tokens)

    @staticmethod
    def recognises(head: bytes) -> bool:
        begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
        return begins and any(f'"{key}"'.encode() in head for key in LISTS)

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` conversations that can be used. Raises TraceError."""
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        texts = _Texts(self)
        now = 0.0
        for turns in islice(conversations(url), limit):
            now += chance.expovariate(self.sessions_per_s)
            session = drafts.session(now)
            for prompt, num_output in texts.prompts(turns):
                session.turn(prompt, num_output, laws.pause_s(chance, self.mean_think_s))
        trace = drafts.trace(name)
        if not trace.requests:
            raise TraceError(f"{url} has no conversation with a user's message: name a file with at least one")
        return trace

    def tokens(self, text: str) -> int:
        if self.count_tokens is not None:
            return self.count_tokens(text)
        return math.ceil(len(text) / self.chars_per_token)


@dataclass(frozen=True, slots=True)
class _Node:
    """A beginning of conversations: whatever follows it is remembered by `number`."""

    number: int
    prompt: Prompt


_START = _Node(0, EMPTY)


@dataclass(slots=True)
class _Texts:
    """Conversations as prompts; equal beginnings, message by message, are the same prompt."""

    settings: ShareGpt
    _writer: PromptWriter = field(init=False)
    _known: dict[tuple[int, bytes], _Node] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self._writer = PromptWriter(self.settings.block_tokens)

    def prompts(self, turns: Sequence[TextTurn]) -> list[tuple[Prompt, int]]:
        """(prompt, tokens of the answer) of each turn."""
        found: list[tuple[Prompt, int]] = []
        history = _START
        for turn in turns:
            num_output = self.settings.tokens(turn.answer) or self.settings.unanswered_tokens
            history = self._asked(history, turn.messages, num_output)
            found.append((history.prompt, num_output))
            history = self._grown(history, "answer", turn.answer, num_output)
        return found

    def _asked(self, history: _Node, messages: Sequence[Message], num_output: int) -> _Node:
        lengths = [max(1, self.settings.tokens(message.text)) for message in messages]
        num_prompt = history.prompt.num_tokens + sum(lengths)
        if self.settings.window_tokens and num_prompt + num_output > self.settings.window_tokens:
            window = self._writer.windowed(history.prompt, sum(lengths), num_output, self.settings.window_tokens)
            return _Node(next(self._numbers), window)
        for message, num_tokens in zip(messages, lengths):
            history = self._grown(history, message.role, message.text, num_tokens)
        return history

    def _grown(self, history: _Node, role: str, text: str, num_tokens: int) -> _Node:
        key = (history.number, blake2b(f"{role}\n{text}".encode(), digest_size=16).digest())
        node = self._known.get(key)
        if node is None:
            node = _Node(next(self._numbers), self._writer.grown(history.prompt, num_tokens))
            self._known[key] = node
        return node
