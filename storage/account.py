"""What a tier has and what it may have: bytes by key, reservations, and one writer per key at a time. Holds no data."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage.tier import TierFull


class Account:
    """Thread-safe bookkeeping of one tier.

    Bytes are reserved before anything is written and become the key's when the write has succeeded, so the sum is
    never above the budget. `adding`, `admitting` and `removing` hold their key: whoever else wants to change the same
    key waits until they are done.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 1:
            raise ValueError(f"a tier's budget must be at least one byte, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._sizes: dict[str, int] = {}
        self._held: set[str] = set()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Kept and reserved."""
        return self._used_bytes

    def get(self, key: str) -> int | None:
        """Bytes of a kept chunk."""
        return self._sizes.get(key)

    def keys(self) -> list[str]:
        """Kept chunks, those longest here first."""
        with self._changed:
            return list(self._sizes)

    def reserve(self, num_bytes: int) -> None:
        """Set bytes aside. TierFull, then nothing is."""
        with self._changed:
            free = self.budget_bytes - self._used_bytes
            if num_bytes > free:
                raise TierFull(
                    f"{num_bytes} bytes do not fit: {free} of the budget of {self.budget_bytes} are free; "
                    "delete chunks or raise the budget"
                )
            self._used_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give a reservation back."""
        with self._changed:
            assert 0 <= num_bytes <= self._used_bytes, "released more than was reserved"
            self._used_bytes -= num_bytes

    @contextmanager
    def adding(self, key: str, num_bytes: int, is_there: Callable[[], bool] = lambda: True) -> Iterator[bool]:
        """Around the writing of a chunk: reserves first; the chunk counts as kept when the block ends, and an error in
        it returns the bytes. Yields False, reserving nothing, if the chunk is kept already and, where others may have
        taken it away, `is_there()`. TierFull."""
        with self._alone(key):
            if key in self._sizes:
                if is_there():
                    yield False
                    return
                self._forget(key)
            self.reserve(num_bytes)
            with self._admitted(key, num_bytes):
                yield True

    @contextmanager
    def admitting(self, key: str, num_bytes: int) -> Iterator[bool]:
        """Like adding, for bytes that the caller has reserved already; they are released if the chunk is there."""
        with self._alone(key):
            if key in self._sizes:
                self.release(num_bytes)
                yield False
                return
            with self._admitted(key, num_bytes):
                yield True

    @contextmanager
    def removing(self, key: str) -> Iterator[bool]:
        """Around the removal of a chunk: its bytes are free when the block ends; an error in it keeps them counted.
        Yields whether the chunk was kept."""
        with self._alone(key):
            yield key in self._sizes
            self._forget(key)

    def forget_unless(self, key: str, is_there: Callable[[], bool]) -> None:
        """A kept chunk was not found: if it is still not there, with nobody writing it, it no longer counts."""
        with self._alone(key):
            if key in self._sizes and not is_there():
                self._forget(key)

    @contextmanager
    def _admitted(self, key: str, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release(num_bytes)
            raise
        with self._changed:
            self._sizes[key] = num_bytes

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._held)
            self._held.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(key)
                self._changed.notify_all()

    def _forget(self, key: str) -> None:
        with self._changed:
            self._used_bytes -= self._sizes.pop(key, 0)
