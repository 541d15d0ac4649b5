"""What other threads hand to the thread that steps the engine: new turns, aborts, what is to be forgotten, and news
that something is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from threading import Condition

from actors.engine.turns import Request


class Mailbox:
    """Thread-safe. A turn is known from `add` until `forget`; only known turns can be aborted."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._requests: list[Request] = []
        self._aborts: set[str] = set()
        self._known: set[str] = set()
        self._doomed: set[str] = set()
        self._num_changes = 0

    def add(self, request: Request) -> None:
        """ValueError if a turn of this id is known."""
        with self._changed:
            if request.turn_id in self._known:
                raise ValueError(f"turn {request.turn_id} is running already; wait until it has finished")
            self._known.add(request.turn_id)
            self._requests.append(request)
            self.wake()

    def abort(self, turn_id: str) -> None:
        """Unknown turns are ignored."""
        with self._changed:
            if turn_id in self._known:
                self._aborts.add(turn_id)
                self.wake()

    def take_requests(self) -> list[Request]:
        with self._changed:
            requests, self._requests = self._requests, []
            return requests

    def aborts(self, turn_ids: Set[str]) -> set[str]:
        """Those of `turn_ids` that are to be aborted; they stay so until they are forgotten."""
        with self._changed:
            return self._aborts & turn_ids

    def forget(self, turn_id: str) -> None:
        """The turn is over; its id may be used again."""
        with self._changed:
            self._known.discard(turn_id)
            self._aborts.discard(turn_id)

    def doom(self, marks: Iterable[str]) -> None:
        """Nothing that begins with one of these prefixes is to be found any more."""
        with self._changed:
            self._doomed.update(marks)
            self.wake()

    def take_doomed(self) -> set[str]:
        with self._changed:
            doomed, self._doomed = self._doomed, set()
            return doomed

    @property
    def num_doomed(self) -> int:
        """Prefixes that nobody took yet."""
        return len(self._doomed)

    @property
    def num_waiting(self) -> int:
        """Requests that nobody took yet."""
        return len(self._requests)

    @property
    def num_changes(self) -> int:
        return self._num_changes

    def wake(self) -> None:
        """Something changed: whoever waits looks again."""
        with self._changed:
            self._num_changes += 1
            self._changed.notify_all()

    def wait_for_change(self, since: int, timeout_s: float) -> None:
        """Returns when `num_changes` is no longer `since`, or after the timeout."""
        self.wait_for(lambda: self._num_changes != since, timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Looks at the condition at every change; what it is at the end."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)
