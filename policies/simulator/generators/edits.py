"""Chat in which history changes: a follow-up whose earlier turns are not what they were."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import EMPTY, PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Edits:
    """People who correct an earlier message, clients that strip or rewrite what was said, templates that drift.

    A follow-up is an edit with probability `edit_share`: one of the earlier messages, each equally likely, is another
    one of the same length. The prompt is as long as it would have been, but only what comes before that message is
    still the same.
    """

    sessions: int = 500
    seed: int = 0
    sessions_per_s: float = 1.0
    edit_share: float = 0.2
    mean_turns: float = 5.75
    max_turns: int = 40
    mean_think_s: float = 60.0
    answer_tokens_per_s: float = 50.0
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, mean_turns=self.mean_turns, max_turns=self.max_turns)
        laws.at_least(1, block_tokens=self.block_tokens)
        laws.at_least(0, mean_think_s=self.mean_think_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)
        laws.shares(edit_share=self.edit_share)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        for arrival_s in laws.arrivals_s(chance, self.sessions, self.sessions_per_s):
            session, history = drafts.session(arrival_s), EMPTY
            messages: list[int] = []  # where each begins
            for _ in range(laws.num_turns(chance, self.mean_turns, self.max_turns)):
                num_history = history.num_tokens
                if messages and chance.random() < self.edit_share:
                    history = writer.cut(history, chance.choice(messages))
                messages.append(num_history)
                num_new = num_history - history.num_tokens + laws.message_tokens(chance)
                prompt, num_output = writer.grown(history, num_new), laws.answer_tokens(chance)
                session.turn(prompt, num_output, laws.pause_s(chance, self.mean_think_s))
                history = writer.grown(prompt, num_output)
        return drafts.trace("edits")
