"""What is worth keeping, learned while serving: the rate at which silent prefixes come back, and the index made of it.

Proportional hazards (Cox 1972) with one baseline over age and a factor for every value of every feature: a prefix with
features x that has been silent for `age` seconds comes back within the age's interval with probability

    h(age, x) = h0(age) * f_1(x_1) * f_2(x_2) * ...          intervals double: [0, 0.5), [0.5, 1), [1, 2), ... seconds

`h0` is what came back divided by what was there to come back (Breslow's estimate); a factor is what came back with that
value divided by what the model expected. All counts fade, so the model follows a workload that changes. The index of a
prefix is the best ratio that any patience achieves (Gittins 1979):

    index(age, x) = max over T of  P(back before age + T | silent until age) / E[time it occupies its place until then]

Knows no chunks and no places; time is an argument.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

Features = tuple[int, ...]

NUM_INTERVALS = 20
ENDS = tuple(0.5 * 2.0**number for number in range(NUM_INTERVALS))  # 0.5 s ... 3 days; whatever is older is forgotten
STARTS = (0.0, *ENDS[:-1])
MAX_FACTOR = 32.0
TRIM_AT = 4096  # forgotten silences kept at least, so that the list is seldom moved
STEPS_PER_OCTAVE = 2  # factors are told apart in steps of the square root of two


@dataclass(slots=True, eq=False)
class Silence:
    """A prefix, or a part of one, since its last use. `weight` counts prompts; some of it may come back, then more."""

    since: float
    features: Features
    weight: float
    factor: float
    returned: float = 0.0
    first_return_age: float | None = None

    def at_risk(self, age: float) -> float:
        """What of it could still come back at that age."""
        is_whole = self.first_return_age is None or self.first_return_age >= age
        return self.weight if is_whole else self.weight - self.returned


@dataclass(slots=True)
class _Factor:
    """One feature: per value, what came back and what was expected to."""

    returned: dict[int, float] = field(default_factory=dict)
    expected: dict[int, float] = field(default_factory=dict)
    value: dict[int, float] = field(default_factory=dict)

    def fit(self, prior: float, keep: float, step: float) -> None:
        """A step (1: all the way, in logarithms) to what was seen over what was expected; both fade by `keep`."""
        for level in self.returned.keys() | self.expected.keys():
            seen, expected = self.returned.get(level, 0.0) * keep, self.expected.get(level, 0.0) * keep
            ratio = min(max(((seen + prior) / (expected + prior)) ** step, 0.5), 2.0)
            self.value[level] = min(max(self.value.get(level, 1.0) * ratio, 1 / MAX_FACTOR), MAX_FACTOR)
            self.returned[level], self.expected[level] = seen, expected * ratio


class ReturnModel:
    """Told when silences begin and when they end; answers with an index. `advance` brings it up to the time."""

    def __init__(
        self, num_features: int, *, prior: float = 4.0, refit_every: int = 16, half_life: int = 4000, log: int = 50_000
    ) -> None:
        """`prior`: prompts' worth of doubt about a factor; `half_life`: of counts, in prompts; `log`: silences kept."""
        self.hazards: list[float] = [0.0] * NUM_INTERVALS
        self._factors = [_Factor() for _ in range(num_features)]
        self._returned = [0.0] * NUM_INTERVALS
        self._at_risk = [0.0] * NUM_INTERVALS
        self._silences: list[Silence] = []  # from the first that is not forgotten on, and some before it
        self._first = 0
        self._pointers = [0] * NUM_INTERVALS  # per interval: silences that have entered it, counted from the first ever
        self._num_forgotten = 0
        self._num_advances = 0
        self._tables: dict[int, tuple[float, ...]] = {}
        self._prior, self._refit_every, self._log = prior, refit_every, log
        self._keep = 0.5 ** (refit_every / half_life)

    # --- what happened ------------------------------------------------------------------------------------------------

    def begin(self, now: float, features: Features, weight: float = 1.0) -> Silence:
        """Something was used and falls silent."""
        silence = Silence(now, features, weight, self.factor(features))
        self._silences.append(silence)
        return silence

    def end(self, silence: Silence, now: float, share: float = 1.0) -> None:
        """Some of it (a share of its weight, as far as that is not back yet) is used again."""
        weight = min(share * silence.weight, silence.weight - silence.returned)
        age = max(0.0, now - silence.since)
        if weight <= 0.0 or age >= ENDS[-1]:
            return
        self._returned[bisect_right(ENDS, age)] += weight
        for factor, level in zip(self._factors, silence.features):
            factor.returned[level] = factor.returned.get(level, 0.0) + weight
        if silence.first_return_age is None:
            silence.first_return_age = age
        silence.returned += weight

    def advance(self, now: float) -> None:
        """Count who is at risk in which interval of age, and now and then fit the factors anew."""
        for interval, start in enumerate(STARTS):
            self._enter(interval, start, now)
        num_kept = len(self._silences) - self._first
        num_over = max(self._pointers[-1] - self._num_forgotten, num_kept - self._log, 0)
        self._first += num_over
        self._num_forgotten += num_over
        if self._first > max(TRIM_AT, num_kept):
            del self._silences[: self._first]
            self._first = 0
        self._num_advances += 1
        if self._num_advances % self._refit_every == 0:
            self._fit()

    def _enter(self, interval: int, start: float, now: float) -> None:
        before = self._num_forgotten - self._first  # silences that are not in the list any more
        at = max(self._pointers[interval], self._num_forgotten)
        end = before + len(self._silences)
        while at < end and (silence := self._silences[at - before]).since + start <= now:
            at += 1
            risk = silence.at_risk(start) * silence.factor
            if risk > 0.0:
                self._at_risk[interval] += risk
                expected = risk * self.hazards[interval]
                for factor, level in zip(self._factors, silence.features):
                    factor.expected[level] = factor.expected.get(level, 0.0) + expected
        self._pointers[interval] = at

    def _fit(self) -> None:
        for interval in range(NUM_INTERVALS):
            self._returned[interval] *= self._keep
            self._at_risk[interval] *= self._keep
            risk = self._at_risk[interval]
            self.hazards[interval] = min(self._returned[interval] / risk, 0.999) if risk > 0.0 else 0.0
        for factor in self._factors:
            factor.fit(self._prior, self._keep, 1.0 / len(self._factors))
        self._tables.clear()

    # --- what follows -------------------------------------------------------------------------------------------------

    def factor(self, features: Features) -> float:
        """How much likelier than the baseline such a prefix comes back."""
        product = 1.0
        for factor, level in zip(self._factors, features):
            product *= factor.value.get(level, 1.0)
        return min(max(product, 1 / MAX_FACTOR), MAX_FACTOR)

    def index(self, step: int, age: float) -> float:
        """Returns per second of occupation, for factors of 2 ** (step / STEPS_PER_OCTAVE). Units: 1/s.

        Between the beginnings of two intervals it goes in a straight line: a chunk is not worth half as much as another
        because it is a second older.
        """
        if age >= ENDS[-1]:
            return 0.0
        age = max(0.0, age)
        interval, table = bisect_right(ENDS, age), self.table(step)
        now = table[interval]
        later = table[interval + 1] if interval + 1 < NUM_INTERVALS else 0.0
        share = (age - STARTS[interval]) / (ENDS[interval] - STARTS[interval])
        return now + share * (later - now)

    def table(self, step: int) -> tuple[float, ...]:
        """The index at the beginning of every interval of age."""
        table = self._tables.get(step)
        if table is None:
            factor = 2.0 ** (step / STEPS_PER_OCTAVE)
            hazards = [min(hazard * factor, 0.999) for hazard in self.hazards]
            table = self._tables[step] = tuple(_index_from(hazards, first) for first in range(NUM_INTERVALS))
        return table

    def probability(self, features: Features, age: float, within_s: float) -> float:
        """That such a prefix, silent for `age` seconds, comes back within so many more."""
        factor, silent = self.factor(features), 1.0
        for interval in range(NUM_INTERVALS):
            overlap = min(ENDS[interval], age + within_s) - max(STARTS[interval], age)
            if overlap > 0.0:
                share = overlap / (ENDS[interval] - STARTS[interval])
                silent *= (1.0 - min(self.hazards[interval] * factor, 0.999)) ** share
        return 1.0 - silent


def _index_from(hazards: list[float], first: int) -> float:
    best = back = occupied_s = 0.0
    silent = 1.0
    for interval in range(first, NUM_INTERVALS):
        hazard = hazards[interval]
        back += silent * hazard
        occupied_s += silent * (1.0 - hazard / 2) * (ENDS[interval] - STARTS[interval])
        silent *= 1.0 - hazard
        best = max(best, back / occupied_s)
    return best
