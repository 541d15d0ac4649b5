"""Memory for encoded chunks that is used again: touching fresh pages costs several times what filling them does.

Outside the main thread the C library asks the kernel for every array of this size anew, and gives it back at once.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

from storage.header import Bytes

STEP_BYTES = 256 * 1024
"""Sizes are rounded up to multiples of this: chunks of one model differ by the digits of their token ids."""


class Recycler:
    """Hands out arrays; when the last view of one is gone, its memory waits for the next. Thread-safe.

    At most `limit_bytes` wait; what exceeds them is freed. What is handed out is the business of who holds it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._waiting: dict[int, list[Bytes]] = {}
        self._waiting_bytes = 0
        self._lock = threading.RLock()  # a garbage collection inside the lock may bring memory back

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    def take(self, num_bytes: int) -> Bytes:
        """A writable array of that many bytes, not initialised."""
        size = -(-num_bytes // STEP_BYTES) * STEP_BYTES
        with self._lock:
            waiting = self._waiting.get(size)
            block = waiting.pop() if waiting else None
            if block is not None:
                self._waiting_bytes -= size
        if block is None:
            block = np.empty(size, np.uint8)
        array = np.frombuffer(block.data, np.uint8, num_bytes)  # an owner of its own: views of it keep it alive
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: Bytes) -> None:
        with self._lock:
            if self._waiting_bytes + block.nbytes <= self.limit_bytes:
                self._waiting_bytes += block.nbytes
                self._waiting.setdefault(block.nbytes, []).append(block)
