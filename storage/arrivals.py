"""Whole chunks on their way into this process's memory, each fetched once however many want it.

    expect   starts a fetch, or joins the one on its way; within a limit of bytes, beyond it does nothing
    take     waits for the bytes; what was not expected is fetched now
    forget   one of those who expected it will not take it

Knows neither places nor formats: whoever owns it says how a fetch begins.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from storage.header import Buffer, Bytes, byte_view


class Fetch(Protocol):
    """The bytes of one chunk on their way. Thread-safe."""

    def result(self) -> Buffer:
        """Waits for them, for a limited time. Raises what went wrong, every time it is called."""

    def cancel(self) -> None:
        """Nobody wants them any more."""


class Arrival:
    """One chunk, on its way or there. Whoever holds this holds its bytes, and others who come meanwhile share them."""

    def __init__(self, fetch: Fetch, num_bytes: int) -> None:
        self.fetch, self.num_bytes = fetch, num_bytes
        self.expected_at = 0.0
        """When it was last expected."""
        self.num_expecting = 0
        self.num_waiting = 0

    @property
    def data(self) -> Bytes:
        """What came; as many bytes as there were, which need not be `num_bytes`. Waits."""
        return byte_view(self.fetch.result())


class Arrivals:
    """Thread-safe. `limit_bytes`: of what is expected and not taken, together; a take is never refused. What nobody
    took within `keep_s` is dropped when there is a next time, so a lost `forget` costs memory for a while only."""

    def __init__(
        self,
        begin: Callable[[str, int], Fetch],
        *,
        limit_bytes: int,
        keep_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`begin(key, num_bytes)` starts a fetch without waiting, and may be called under a lock."""
        self._begin, self._limit_bytes, self._keep_s, self._clock = begin, limit_bytes, keep_s, clock
        self._lock = threading.Lock()
        self._expected: dict[str, Arrival] = {}
        self._alive: weakref.WeakValueDictionary[str, Arrival] = weakref.WeakValueDictionary()

    @property
    def expected_bytes(self) -> int:
        """Of the chunks expected and not taken, there or on their way."""
        with self._lock:
            return self._expected_bytes()

    def expect(self, key: str, num_bytes: int) -> None:
        """The chunk will be taken soon. Returns at once, and does nothing if it would exceed the limit."""
        with self._lock:
            self._drop_stale()
            arrival = self._expected.get(key)
            if arrival is None:
                if self._expected_bytes() + num_bytes > self._limit_bytes:
                    return
                arrival = self._expected[key] = self._alive.get(key) or self._start(key, num_bytes)
            arrival.num_expecting += 1
            arrival.expected_at = self._clock()

    def take(self, key: str, num_bytes: int | None = None) -> Arrival | None:
        """The chunk, there. Waits for it, and raises what its fetch raises; None for one that is not on its way, if
        its size is unknown."""
        with self._lock:
            arrival = self._alive.get(key)
            if num_bytes is not None and (arrival is None or arrival.num_bytes != num_bytes):
                arrival = self._start(key, num_bytes)  # who expected another size does not spoil it for this one
            if arrival is None:
                return None
            arrival.num_waiting += 1
        try:
            arrival.fetch.result()
        except BaseException:
            with self._lock:
                self._drop(key, arrival)  # whoever comes next tries again
            raise
        finally:
            with self._lock:
                arrival.num_waiting -= 1
                self._expect_less(key, arrival)
        return arrival

    def forget(self, key: str) -> None:
        """One of those who expected the chunk will not take it. The last of them drops it, or ends its fetch."""
        with self._lock:
            arrival = self._expected.get(key)
            if arrival is not None:
                self._expect_less(key, arrival)
                self._end_if_unwanted(key, arrival)

    def _start(self, key: str, num_bytes: int) -> Arrival:
        arrival = self._alive[key] = Arrival(self._begin(key, num_bytes), num_bytes)
        return arrival

    def _expect_less(self, key: str, arrival: Arrival) -> None:
        arrival.num_expecting = max(0, arrival.num_expecting - 1)
        if not arrival.num_expecting and self._expected.get(key) is arrival:
            del self._expected[key]  # readers that have it keep it alive

    def _end_if_unwanted(self, key: str, arrival: Arrival) -> None:
        if not arrival.num_expecting and not arrival.num_waiting:
            self._drop(key, arrival)
            arrival.fetch.cancel()

    def _drop(self, key: str, arrival: Arrival) -> None:
        arrival.num_expecting = 0
        for known in (self._expected, self._alive):
            if known.get(key) is arrival:
                del known[key]

    def _drop_stale(self) -> None:
        too_old = self._clock() - self._keep_s
        for key, arrival in list(self._expected.items()):
            if arrival.expected_at < too_old:
                arrival.num_expecting = 0
                del self._expected[key]
                self._end_if_unwanted(key, arrival)

    def _expected_bytes(self) -> int:
        return sum(arrival.num_bytes for arrival in self._expected.values())
