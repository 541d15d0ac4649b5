"""Virtual time: what is to happen when, in order. Equal times keep the order in which they were set.

Nothing here waits, and nothing reads a real clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """A heap of (when, number, action, arguments) in virtual seconds. `now` only goes forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_set = 0

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at `when` (now, if that is past)."""
        self._num_set += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._num_set, action, args))

    @property
    def next_at(self) -> float | None:
        """When the next action is due; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def advance(self, when: float) -> None:
        """Time passes without anything happening. It must not pass an action that is due."""
        assert self.next_at is None or when <= self.next_at, "an action would be passed over"
        self.now = max(self.now, when)

    def run_next(self) -> None:
        """Go to the next action and run it. IndexError when there is none."""
        when, _, action, args = heapq.heappop(self._heap)
        self.now = when
        action(*args)
