"""Chat in which requests come twice: the same prompt again, shortly after."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import EMPTY, PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Clients that time out and ask again, and people who press "regenerate".

    A turn is repeated with probability `retry_share`, and so is each repetition, up to `max_attempts` in all. The
    repetition has the same prompt to the last token, and the same parent. What follows, follows the last attempt.
    """

    sessions: int = 500
    seed: int = 0
    sessions_per_s: float = 1.0
    retry_share: float = 0.2
    max_attempts: int = 3
    mean_retry_s: float = 5.0
    """Between two attempts, exponential."""
    mean_turns: float = 5.75
    max_turns: int = 40
    mean_think_s: float = 60.0
    answer_tokens_per_s: float = 50.0
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, mean_turns=self.mean_turns, max_turns=self.max_turns)
        laws.at_least(1, max_attempts=self.max_attempts, block_tokens=self.block_tokens)
        laws.at_least(0, mean_retry_s=self.mean_retry_s, mean_think_s=self.mean_think_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)
        laws.shares(retry_share=self.retry_share)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        for arrival_s in laws.arrivals_s(chance, self.sessions, self.sessions_per_s):
            session, history = drafts.session(arrival_s), EMPTY
            for _ in range(laws.num_turns(chance, self.mean_turns, self.max_turns)):
                prompt, num_output = writer.grown(history, laws.message_tokens(chance)), laws.answer_tokens(chance)
                session.turn(prompt, num_output, laws.pause_s(chance, self.mean_think_s))
                num_attempts = 1
                while num_attempts < self.max_attempts and chance.random() < self.retry_share:
                    session.repeat(laws.pause_s(chance, self.mean_retry_s))
                    num_attempts += 1
                history = writer.grown(prompt, num_output)
        return drafts.trace("retries")
