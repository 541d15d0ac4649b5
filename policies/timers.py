"""Things to be looked at again at a given time. The clock is the caller's; nothing here waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timers:
    """A heap of (when, what). An action checks for itself whether it still matters: nothing is ever taken out early."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_set = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at the first `run_due` with a time of `when` or later."""
        self._num_set += 1
        heapq.heappush(self._heap, (when, self._num_set, action, args))

    def run_due(self, now: float) -> None:
        """Run what is due, earliest first; what the actions set for now or earlier runs at the next call."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        for _when, _number, action, args in due:
            action(*args)
