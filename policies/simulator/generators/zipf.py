"""Prompts that begin alike: system prompts and documents that many sessions share, a few of them most of all."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SharedPrefixes:
    """Applications with a long system prompt each, or questions about popular documents.

    Sessions arrive as a Poisson process. Each begins with one of `prefixes` texts, the k-th most popular one with a
    probability proportional to 1 / k ** exponent, and goes on as a short chat. A text rarely ends with a block: its
    last, part-filled block is not shared.
    """

    sessions: int = 1000
    seed: int = 0
    sessions_per_s: float = 1.0
    prefixes: int = 100
    exponent: float = 1.0
    """0: all equally popular; 1: as words in a language; more: a few take nearly all."""
    prefix_tokens: float = 2000.0
    """Median of a log-normal law with sigma 0.8."""
    max_prefix_tokens: int = 32_000
    mean_turns: float = 2.5
    max_turns: int = 20
    mean_think_s: float = 60.0
    answer_tokens_per_s: float = 50.0
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, prefixes=self.prefixes, prefix_tokens=self.prefix_tokens)
        laws.at_least(1, mean_turns=self.mean_turns, max_turns=self.max_turns, block_tokens=self.block_tokens)
        laws.at_least(1, max_prefix_tokens=self.max_prefix_tokens)
        laws.at_least(0, exponent=self.exponent, mean_think_s=self.mean_think_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        lengths = [laws.length(chance, self.prefix_tokens, 0.8, self.max_prefix_tokens) for _ in range(self.prefixes)]
        texts, popularity = [writer.new(length) for length in lengths], laws.Zipf(self.prefixes, self.exponent)
        for arrival_s in laws.arrivals_s(chance, self.sessions, self.sessions_per_s):
            session, history = drafts.session(arrival_s), texts[popularity.draw(chance)]
            for _ in range(laws.num_turns(chance, self.mean_turns, self.max_turns)):
                prompt, num_output = writer.grown(history, laws.message_tokens(chance)), laws.answer_tokens(chance)
                session.turn(prompt, num_output, laws.pause_s(chance, self.mean_think_s))
                history = writer.grown(prompt, num_output)
        return drafts.trace("zipf")
