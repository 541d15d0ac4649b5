"""Coding agents: long contexts that only ever grow, a tool's run between two steps, and now and then a long pause."""

from __future__ import annotations

import random
from dataclasses import dataclass

from policies.simulator import laws
from policies.simulator.drafts import Drafts
from policies.simulator.prompts import PromptWriter
from policies.simulator.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Agents:
    """The shape of recorded coding-agent sessions (kv-cache-tester), without their compactions.

    All sessions begin with the same system prompt and tools, then read a task and some files. Each step appends the
    answer and what its tool returned, mostly little and sometimes a whole file. Most steps follow within seconds; after
    a few the agent waits for a person. A session ends when its work is done or its context full.
    """

    sessions: int = 50
    seed: int = 0
    sessions_per_s: float = 1 / 30
    mean_steps: float = 60.0
    """Geometric."""
    max_steps: int = 500
    system_tokens: int = 8000
    """Of the prompt that all sessions share."""
    task_tokens: float = 12_000.0
    """Of what is read before the first step: median, log-normal with sigma 0.8."""
    step_tokens: float = 300.0
    """Of what a tool returns: median, log-normal with sigma 1.5."""
    max_context_tokens: int = 200_000
    """A session ends before its prompt is longer."""
    tool_s: float = 9.0
    """How long a tool runs: median, log-normal with sigma 1."""
    pause_share: float = 0.05
    """Of the steps, those before which a person is waited for."""
    mean_pause_s: float = 1800.0
    """Exponential."""
    answer_tokens_per_s: float = 50.0
    block_tokens: int = 512

    def __post_init__(self) -> None:
        laws.at_least(1, sessions=self.sessions, mean_steps=self.mean_steps, max_steps=self.max_steps)
        laws.at_least(1, task_tokens=self.task_tokens, step_tokens=self.step_tokens, block_tokens=self.block_tokens)
        laws.at_least(1, max_context_tokens=self.max_context_tokens)
        laws.at_least(0, system_tokens=self.system_tokens, tool_s=self.tool_s, mean_pause_s=self.mean_pause_s)
        laws.above_zero(sessions_per_s=self.sessions_per_s, answer_tokens_per_s=self.answer_tokens_per_s)
        laws.shares(pause_share=self.pause_share)

    def trace(self) -> Trace:
        chance = random.Random(self.seed)
        drafts = Drafts(self.block_tokens, self.answer_tokens_per_s)
        writer = PromptWriter(self.block_tokens)
        system = writer.new(min(self.system_tokens, self.max_context_tokens - 1))
        for arrival_s in laws.arrivals_s(chance, self.sessions, self.sessions_per_s):
            session = drafts.session(arrival_s)
            num_left = self.max_context_tokens - system.num_tokens
            prompt = writer.grown(system, laws.length(chance, self.task_tokens, 0.8, num_left))
            for _ in range(min(laws.geometric(chance, self.mean_steps), self.max_steps)):
                num_output = laws.length(chance, 220.0, 0.9, 16_000)
                session.turn(prompt, num_output, self._pause_s(chance))
                num_new = num_output + laws.length(chance, self.step_tokens, 1.5, 32_000)
                if prompt.num_tokens + num_new > self.max_context_tokens:
                    break
                prompt = writer.grown(prompt, num_new)
        return drafts.trace("agents")

    def _pause_s(self, chance: random.Random) -> float:
        if chance.random() < self.pause_share:
            return laws.pause_s(chance, self.mean_pause_s)
        return self.tool_s * chance.lognormvariate(0.0, 1.0)
