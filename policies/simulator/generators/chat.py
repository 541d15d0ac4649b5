"""Chat as ShareGPT has it: many short conversations, a small context window, people who think about a minute."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import EMPTY, PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The workload of CachedAttention (USENIX ATC '24, section 4).

    Sessions arrive as a Poisson process. Each has one turn or, more often, geometrically many; messages and answers are
    log-normal (see laws.py). A turn that does not fit the window keeps half a window of prompt, at new positions: none
    of its blocks is an old one.
    """

    sessions: int = 1000
    seed: int = 0
    sessions_per_s: float = 1.0
    mean_turns: float = 5.75
    max_turns: int = 40
    window_tokens: int = 4096
    """0: no window."""
    mean_think_s: float = 60.0
    """Between an answer and the next message, exponential."""
    answer_tokens_per_s: float = 50.0
    """How fast answers are assumed to be written; a follow-up arrives after the answer."""
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, mean_turns=self.mean_turns, max_turns=self.max_turns)
        laws.at_least(1, block_tokens=self.block_tokens)
        laws.at_least(0, window_tokens=self.window_tokens, mean_think_s=self.mean_think_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        for arrival_s in laws.arrivals_s(chance, self.sessions, self.sessions_per_s):
            session, history = drafts.session(arrival_s), EMPTY
            for _ in range(laws.num_turns(chance, self.mean_turns, self.max_turns)):
                num_new, num_output = laws.message_tokens(chance), laws.answer_tokens(chance)
                prompt = writer.windowed(history, num_new, num_output, self.window_tokens)
                session.turn(prompt, num_output, laws.pause_s(chance, self.mean_think_s))
                history = writer.grown(prompt, num_output)
        return drafts.trace("chat")
