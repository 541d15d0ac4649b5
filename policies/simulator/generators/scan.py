"""A flood of prompts that are never seen again, in the middle of chat: what a cache must not give its space to."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.generators.chat import Chat
from policies.simulator.generators.mix import mix
from policies.simulator.prompts import PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A batch job (summaries, extraction, evaluation) over long documents, beside people who chat.

    One-shot prompts arrive as a Poisson process from `begin_share` to `end_share` of the chat's duration; nothing in
    them is shared or asked again.
    """

    sessions: int = 1000
    """Of the chat (see chat.py)."""
    seed: int = 0
    sessions_per_s: float = 1.0
    """Of the chat."""
    scans_per_s: float = 1.0
    scan_tokens: float = 8000.0
    """Of a prompt: median, log-normal with sigma 0.5."""
    max_scan_tokens: int = 64_000
    begin_share: float = 0.25
    end_share: float = 0.75
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, scan_tokens=self.scan_tokens, max_scan_tokens=self.max_scan_tokens)
        laws.above_zero(scans_per_s=self.scans_per_s)
        laws.shares(begin_share=self.begin_share, end_share=self.end_share)
        if not self.begin_share < self.end_share:
            raise ValueError(f"end_share is {self.end_share}: choose more than begin_share, {self.begin_share}")
        self._chat()

    def trace(self) -> Trace:
        chat = self._chat().trace()
        return mix([chat, self._flood(chat.requests[0].arrival_s, chat.duration_s)], name="scan")

    def _chat(self) -> Chat:
        return Chat(
            sessions=self.sessions,
            seed=self.seed,
            sessions_per_s=self.sessions_per_s,
            block_tokens=self.block_tokens,
        )

    def _flood(self, chat_begin_s: float, chat_s: float) -> Trace:
        chance = random.Random(f"{self.seed} scan")
        drafts, writer = Drafts(self.block_tokens, answer_tokens_per_s=1.0), PromptWriter(self.block_tokens)
        now = chat_begin_s + self.begin_share * chat_s
        while (now := now + chance.expovariate(self.scans_per_s)) < chat_begin_s + self.end_share * chat_s:
            prompt = writer.new(laws.length(chance, self.scan_tokens, 0.5, self.max_scan_tokens))
            drafts.session(now).turn(prompt, laws.answer_tokens(chance), 0.0)
        return drafts.trace("flood")
