"""In which order waiting turns run.

The queue is sorted by what `place` says when a turn is submitted, then by arrival, and is not sorted again: a turn's
place is a point on the clock, a virtual arrival. So a queue stays a sorted list however long it is, whoever looks into
it (prefetch, eviction) sees the order in which turns will really run, and nobody is overtaken for longer than the
greatest delay that the policy gives: that is its starvation bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from policies.messages import Turn
from policies.queue import QueuePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A turn that is about to wait."""

    turn: Turn
    now: float
    mean_prompt_tokens: float  # of the turns that wait; of this one when none does
    recent_wait_s: float  # how long turns waited that were dispatched lately
    num_cached_tokens: int  # of its prompt: stored somewhere, or about to be

    @property
    def num_uncached_tokens(self) -> int:
        return self.turn.num_prompt_tokens - self.num_cached_tokens


class ServingOrderPolicy(Protocol):
    """Says where a turn stands in the queue. Changes nothing."""

    def place(self, submission: Submission) -> QueuePlace:
        """(class, virtual arrival in seconds): the lower one runs first."""


class Fcfs:
    """First come, first served, within each priority."""

    def place(self, submission: Submission) -> QueuePlace:
        return (submission.turn.priority, submission.now)


class LeastUncachedFirst:
    """What needs little prefill, or much of whose prompt is stored, goes first, within each priority.

    A turn stands as if it had come later the more it must compute, and earlier the more of it is stored:

        now + bound * (share(uncached) - share(cached)),   share(n) = n / (n + mean prompt of the waiting turns)
        bound = max(bound_s, patience * recent wait)

    Shortest job first, by what the cache leaves of the job, so mean waits fall; and what is stored is used before it
    must be given up. (The order by cached prefix is SGLang's longest-prefix-match; aging makes it free of starvation.)
    Nobody is overtaken by who comes more than two bounds later. The bound grows with the queue: a minute makes no
    difference where everybody waits for an hour.
    """

    def __init__(self, bound_s: float = 30.0, patience: float = 1.0) -> None:
        if not (bound_s >= 0.0 and patience >= 0.0):
            raise ValueError("LeastUncachedFirst takes bound_s (seconds) and patience of 0 or more; 0 and 0 is Fcfs")
        self._bound_s, self._patience = bound_s, patience

    def place(self, submission: Submission) -> QueuePlace:
        bound_s = max(self._bound_s, self._patience * submission.recent_wait_s)
        cached, uncached = submission.num_cached_tokens, submission.num_uncached_tokens
        mean = max(1.0, submission.mean_prompt_tokens)
        delay_s = bound_s * (uncached / (uncached + mean) - cached / (cached + mean))
        return (submission.turn.priority, submission.now + delay_s)


class AgedPriority:
    """Priorities that age: a turn stands as if it had come `step_s` seconds later for every step of its priority.

    So urgent turns go first as long as others have not waited much longer; with the strict classes of the other orders
    a class may starve behind a busy one.
    """

    def __init__(self, step_s: float = 30.0) -> None:
        if not step_s >= 0.0:
            raise ValueError("AgedPriority takes step_s of 0 or more seconds")
        self._step_s = step_s

    def place(self, submission: Submission) -> QueuePlace:
        return (0, submission.now + self._step_s * submission.turn.priority)
