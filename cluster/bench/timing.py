"""Seconds of several ways of doing the same, side by side: the machine's drift hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Case = Callable[[], "float | None"]
"""Does it once. Returns the seconds where it measures itself; None: the whole call counts."""
Samples = dict[str, list[float]]
"""Seconds by case."""


def side_by_side(cases: Mapping[str, Case], repeats: int, warm_ups: int = 1) -> Samples:
    """Every case `repeats` times, one round after the other, each second round in reverse order.

    The first `warm_ups` rounds do not count: pages are touched, caches and threads are warm after them.
    """
    samples: Samples = {name: [] for name in cases}
    for turn in range(warm_ups + repeats):
        order = list(cases) if turn % 2 == 0 else list(cases)[::-1]
        for name in order:
            seconds = timed(cases[name])
            if turn >= warm_ups:
                samples[name].append(seconds)
    return samples


def timed(case: Case) -> float:
    began = time.perf_counter()
    measured = case()
    return time.perf_counter() - began if measured is None else measured


def each(function: Callable[[int], Any], numbers: Sequence[int]) -> None:
    for i in numbers:
        function(i)


def drain(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass
