"""Conversations that branch: several follow-ups of one answer, which part at a block's boundary or inside a block."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import Prompt, PromptWriter
from policies.simulator.trace import Request, Trace


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Tree-shaped use: a person who goes back and asks something else, an agent that explores, best-of-n in stages.

    After a turn the conversation goes on with one follow-up or, in `branch_share` of the cases, with `branches` of
    them, each of which goes on in the same way. They have the turn's prompt and answer in common and differ from there
    on: inside a block in `inside_share` of the cases, else exactly where one ends.
    """

    sessions: int = 200
    seed: int = 0
    sessions_per_s: float = 0.5
    mean_turns: float = 4.0
    """Of a path from the first turn to a last one."""
    max_turns: int = 6
    branch_share: float = 0.3
    branches: int = 3
    inside_share: float = 0.5
    mean_think_s: float = 60.0
    answer_tokens_per_s: float = 50.0
    block_tokens: int = 64

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, mean_turns=self.mean_turns, max_turns=self.max_turns)
        laws.at_least(1, branches=self.branches, block_tokens=self.block_tokens)
        laws.at_least(0, mean_think_s=self.mean_think_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)
        laws.shares(branch_share=self.branch_share, inside_share=self.inside_share)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        for session_id, arrival_s in enumerate(laws.arrivals_s(chance, self.sessions, self.sessions_per_s)):
            num_turns = laws.num_turns(chance, self.mean_turns, self.max_turns)
            prompt = writer.new(laws.message_tokens(chance))
            request = drafts.begin(session_id, arrival_s, prompt, self._output_tokens(prompt, chance))
            ends = [(request, prompt)]
            for _ in range(num_turns - 1):
                ends = [child for end in ends for child in self._children(*end, drafts, writer, chance)]
        return drafts.trace("branches")

    def _children(
        self, request: Request, prompt: Prompt, drafts: Drafts, writer: PromptWriter, chance: random.Random
    ) -> list[tuple[Request, Prompt]]:
        history = writer.grown(prompt, request.output_tokens)
        children = []
        for _ in range(self.branches if chance.random() < self.branch_share else 1):
            text = writer.grown(history, laws.message_tokens(chance))
            think_s = laws.pause_s(chance, self.mean_think_s)
            children.append((drafts.follow(request, think_s, text, self._output_tokens(text, chance)), text))
        return children

    def _output_tokens(self, prompt: Prompt, chance: random.Random) -> int:
        """So many that prompt and answer end inside a block or with one, as drawn."""
        num_output = laws.answer_tokens(chance)
        num_beyond = (prompt.num_tokens + num_output) % self.block_tokens
        if chance.random() < self.inside_share:
            return num_output + (not num_beyond)
        return num_output + -num_beyond % self.block_tokens
