"""What is written down while a simulation runs: one record per turn, and the length of the queue over time."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.messages import Cause, RestorePlan, Tier


@dataclass(slots=True, eq=False)
class TurnRecord:
    """One turn: seconds of virtual time, and where its prompt's tokens came from."""

    request_id: int
    session_id: int
    input_tokens: int
    output_tokens: int
    submitted_at: float
    num_truncated: int = 0
    """Prompt tokens that a truncation made new text."""
    replica_id: str = ""
    dispatched_at: float = 0.0
    started_at: float = 0.0
    """Its restore was over."""
    first_token_at: float = 0.0
    ended_at: float = 0.0
    reused: dict[Tier, int] = field(default_factory=dict)
    recomputed: dict[Cause, int] = field(default_factory=dict)

    def take_plan(self, plan: RestorePlan, num_loaded: int, missed: Cause) -> None:
        """The plan's account, of which the first `num_loaded` tokens came; the rest was missed for this cause."""
        left = num_loaded
        for step in plan.steps:
            num_tokens = min(step.num_tokens, left)
            if num_tokens:
                self.reused[step.tier] = self.reused.get(step.tier, 0) + num_tokens
                left -= num_tokens
        self.recomputed.update(plan.recomputed)
        if num_loaded < plan.num_reused:
            self.recomputed[missed] = self.recomputed.get(missed, 0) + plan.num_reused - num_loaded
        self._name_truncated()

    def _name_truncated(self) -> None:
        """The scheduler takes a truncated context for new text."""
        new = self.recomputed.get(Cause.NEVER_STORED, 0)
        num_truncated = min(self.num_truncated, new)
        if num_truncated:
            self.recomputed[Cause.TRUNCATED] = num_truncated
            self.recomputed[Cause.NEVER_STORED] = new - num_truncated

    @property
    def num_reused(self) -> int:
        return sum(self.reused.values())

    @property
    def queue_wait_s(self) -> float:
        return self.dispatched_at - self.submitted_at

    @property
    def ttft_s(self) -> float:
        """From submission to the first token."""
        return self.first_token_at - self.submitted_at

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens of the answer; None when it has no second one."""
        if self.output_tokens < 2:
            return None
        return (self.ended_at - self.first_token_at) / (self.output_tokens - 1)


class QueueLog:
    """The number of waiting turns over time."""

    def __init__(self) -> None:
        self.length = 0
        self._times: list[float] = [0.0]
        self._lengths: list[int] = [0]

    def change(self, now: float, by: int) -> None:
        self.length += by
        if self._times[-1] == now:
            self._lengths[-1] = self.length
        else:
            self._times.append(now)
            self._lengths.append(self.length)

    def longest(self, start: float, end: float) -> int:
        """In [start, end)."""
        return max((length for _, _, length in self._stretches(start, end)), default=0)

    def mean(self, start: float, end: float) -> float:
        """Over the time from start to end."""
        if end <= start:
            return 0.0
        return sum((stop - begin) * length for begin, stop, length in self._stretches(start, end)) / (end - start)

    def windows(self, start: float, window_s: float, count: int) -> list[float]:
        """The mean of each of so many windows, one after the other from `start` on."""
        sums = [0.0] * count
        for begin, stop, length in self._stretches(start, start + count * window_s):
            while begin < stop:
                index = min(int((begin - start) / window_s), count - 1)
                until = stop if index == count - 1 else min(stop, start + (index + 1) * window_s)
                sums[index] += (until - begin) * length
                begin = until if until > begin else stop
        return [total / window_s for total in sums]

    def _stretches(self, start: float, end: float) -> list[tuple[float, float, int]]:
        """(begin, stop, length) inside [start, end)."""
        stops = [*self._times[1:], end]
        return [
            (max(begin, start), min(stop, end), length)
            for begin, stop, length in zip(self._times, stops, self._lengths)
            if begin < end and stop > start
        ]
