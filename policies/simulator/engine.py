"""A replica's engine as a fluid: prefill in the order of arrival, decoding in one batch, both in shared steps.

A step holds one token of each of the b turns that decode and fills the rest of its budget with prefill:

    decoding alone       a step takes  d(b) = decode_step_s(b, context)
    prefill, b decoding  a step takes  d(b) + w,  w = (max_step_tokens - b) * prefill_s_per_token

so that between two changes prefill goes on at w / (d(b) + w) of its speed alone, and every decoding turn gets a token a
step. In the limits: one turn's prefill takes `prefill_s(start, end)`, n tokens at batch b take n * d(b). The KV that
decoding reads is counted anew at every change only. Steps are not whole here: a turn joins and leaves at any moment.
But its first token comes with the end of a step: as in the live engine a turn that comes beside others waits for the
end of the running step (on average half of it), is computed from then on, and has its token when its last step ends.

A turn that restores KV computes beside it, layer by layer (perfectly hidden): its first token comes when both are over,
and nobody else waits for its load. Knows tokens and seconds; no chunks, no scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.simulator.clock import Clock
from policies.simulator.hardware import EngineSpeed


@dataclass(slots=True, eq=False)
class Job:
    """A turn in the engine. `on_first_token`, `on_end` are called once each, in this order."""

    num_prompt_tokens: int
    num_answer_tokens: int
    work_s: float
    """Of prefill, alone; counts down."""
    on_first_token: Callable[[], None]
    on_end: Callable[[], None]
    is_loaded: bool
    is_computed: bool = False
    whole_s: float = 0.0
    """Of prefill, when it came."""
    until_step_s: float = 0.0
    """It waited for the end of the step that ran when it came."""


@dataclass(slots=True)
class BusyTime:
    """Seconds in which the engine did something, and those that prefill took alone or its share of shared steps."""

    busy_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(slots=True)
class _Decoding:
    """The turns that decode. All get a token at the same time, so a turn ends when `num_steps` reaches its number."""

    ends: list[tuple[float, int, Job]] = field(default_factory=list)
    num_steps: float = 0.0
    num_context_tokens: float = 0.0
    num_joined: int = 0

    def join(self, job: Job) -> None:
        self.num_joined += 1
        heapq.heappush(self.ends, (self.num_steps + job.num_answer_tokens - 1, self.num_joined, job))
        self.num_context_tokens += job.num_prompt_tokens

    def leave(self) -> Job:
        """The turn that ends first. Steps that rounding left over count as done."""
        end, _, job = heapq.heappop(self.ends)
        self.num_steps = max(self.num_steps, end)
        self.num_context_tokens -= job.num_prompt_tokens + job.num_answer_tokens - 1
        if not self.ends:
            self.num_steps = self.num_context_tokens = 0.0
        return job


class Engine:
    """See the module's docstring. Every change of the batch re-plans the next one."""

    def __init__(self, clock: Clock, speed: EngineSpeed) -> None:
        self.busy = BusyTime()
        self._clock, self._speed = clock, speed
        self._prefill: deque[Job] = deque()
        self._num_ending = 0  # turns that are computed, in a step that is not over
        self._decoding = _Decoding()
        self._since = 0.0  # up to which time everything is accounted for
        self._plan = 0  # number of the valid one
        self._prefill_rate = 0.0  # seconds of work per second
        self._step_rate = 0.0  # decode steps per second

    @property
    def num_turns(self) -> int:
        """Turns that compute (those that have computed and wait for their load are not counted)."""
        return len(self._prefill) + self._num_ending + len(self._decoding.ends)

    def add(self, job: Job) -> None:
        """The job's prefill begins when those before it are done."""
        self._catch_up()
        job.whole_s = job.work_s
        if not self._prefill:
            job.until_step_s = self._decode_s() / 2
        self._prefill.append(job)
        self._plan_next()

    def loaded(self, job: Job) -> None:
        """The job's KV is in place."""
        job.is_loaded = True
        if job.is_computed:
            self._catch_up()
            self._answer(job)
            self._plan_next()

    # --- time ---------------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Account for the time since the last change, at the rates planned then."""
        passed_s = self._clock.now - self._since
        self._since = self._clock.now
        if passed_s <= 0.0:
            return
        decoding = self._decoding
        if self._prefill:
            done_s = passed_s * self._prefill_rate
            self._prefill[0].work_s -= done_s
            self.busy.prefill_s += done_s
        if decoding.ends:
            num_steps = passed_s * self._step_rate
            decoding.num_steps += num_steps
            decoding.num_context_tokens += num_steps * len(decoding.ends)
        if self._prefill or decoding.ends:
            self.busy.busy_s += passed_s

    def _plan_next(self) -> None:
        """Rates until the next change, and when that is."""
        self._plan += 1
        decoding = self._decoding
        num_decoding = len(decoding.ends)
        decode_s, prefill_s = self._decode_s(), 0.0
        if self._prefill:
            prefill_s = self._prefill_s()
            self._prefill_rate = prefill_s / (decode_s + prefill_s)
            ready_at = self._since + self._prefill[0].work_s / self._prefill_rate
        if num_decoding:
            self._step_rate = 1.0 / (decode_s + prefill_s)
            over_at = self._since + (decoding.ends[0][0] - decoding.num_steps) / self._step_rate
        if self._prefill and not (num_decoding and over_at < ready_at):
            self._clock.at(ready_at, self._end_prefill, self._plan)
        elif num_decoding:
            self._clock.at(over_at, self._end_decoding, self._plan)

    # --- changes ------------------------------------------------------------------------------------------------------

    def _end_prefill(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._catch_up()
        job = self._prefill.popleft()
        self._num_ending += 1
        rest_s = self._rest_of_step_s(job)
        if rest_s > 0.0:
            self._clock.at(self._clock.now + rest_s, self._end_step, job)
            self._plan_next()
        else:
            self._end_step(job)

    def _end_step(self, job: Job) -> None:
        """The job's last token is computed."""
        self._catch_up()
        self._num_ending -= 1
        job.is_computed = True
        if job.is_loaded:
            self._answer(job)
        self._plan_next()

    def _rest_of_step_s(self, job: Job) -> float:
        """What the fluid leaves out: the wait for its first step, and what others do in its last one."""
        decode_s, prefill_s = self._decode_s(), self._prefill_s()
        if decode_s == 0.0:
            return 0.0
        num_steps = job.whole_s / prefill_s
        unfilled = math.ceil(num_steps) - num_steps
        return job.until_step_s + unfilled * (decode_s + (prefill_s if self._prefill else 0.0))

    def _decode_s(self) -> float:
        """What the turns that decode add to a step."""
        decoding = self._decoding
        return self._speed.decode_step_s(len(decoding.ends), decoding.num_context_tokens) if decoding.ends else 0.0

    def _prefill_s(self) -> float:
        """What prefill adds to a step that it fills."""
        num_tokens = max(1, self._speed.max_step_tokens - len(self._decoding.ends))
        return num_tokens * self._speed.prefill_s_per_token

    def _end_decoding(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._catch_up()
        job = self._decoding.leave()
        self._plan_next()
        job.on_end()

    def _answer(self, job: Job) -> None:
        """The first token is there."""
        job.on_first_token()
        if job.num_answer_tokens > 1:
            self._decoding.join(job)
        else:
            job.on_end()
