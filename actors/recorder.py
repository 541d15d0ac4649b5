"""Keeps the scheduler's event log (policies/eventlog.py) in a file, out of the way of the scheduler's event loop.

    note()    on the loop: puts the event and its answer on a list
    flush()   on a worker thread, now and then: writes what is on the list
    close()   writes the rest

The log serves the scheduler, never the other way round: a full disk, a slow one or a full log ends the recording with a
warning and a last line that says why. A file that holds a log already goes on with a new header: a restarted scheduler,
or another run. Decides nothing and knows no Ray.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies import messages as m
from policies.eventlog import Entry, Header, Record, Stopped, write_line

log = logging.getLogger(__name__)

MAX_PENDING = 100_000  # events that may wait for the disk
BEGINNING = b'{"event_log":'


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """Where to record."""

    path: str
    max_bytes: int = 1 << 30  # of the file; then the recording ends


class Recorder:
    """One life of a scheduler in a log. `note` on one thread, `flush` on any; nothing here raises."""

    def __init__(self, plan: RecordPlan, config: m.SchedulerConfig, began_unix_s: float = 0.0) -> None:
        """Writes the header. What prevents it is the `problem` in `state`."""
        self._plan = plan
        self._pending: deque[Record] = deque([Header(config=config, began_unix_s=began_unix_s)])
        self._writing = threading.Lock()
        self._fd: int | None = None
        self._num_events = 0
        self._num_bytes = 0
        self._problem = ""
        try:
            self._fd, self._num_bytes = _open(plan.path)
        except (OSError, ValueError) as error:
            self._give_up(str(error))
        self.flush()
        self._num_events = 0  # a header is none

    @property
    def state(self) -> dict[str, Any]:
        """Plain values. `num_bytes` is the file's size, `problem` why the recording ended early, if it did."""
        return {
            "path": self._plan.path,
            "host": socket.gethostname(),
            "num_events": self._num_events,
            "num_bytes": self._num_bytes,
            "problem": self._problem,
        }

    def note(
        self,
        now: float,
        event: m.Event,
        commands: Sequence[m.Command],
        benched: tuple[str, ...] = (),
        error: str = "",
    ) -> None:
        """Record one event and what came of it. Waits for nothing."""
        if self._fd is None or self._problem:
            return
        if len(self._pending) >= MAX_PENDING:
            self._problem = f"the disk is too slow: {MAX_PENDING:,} events wait to be written"
            return
        self._pending.append(Entry(now=now, event=event, commands=tuple(commands), benched=benched, error=error))

    def flush(self) -> None:
        """Write what was noted so far; returns at once if another thread is doing it."""
        if self._writing.acquire(blocking=False):
            try:
                self._write_pending()
            finally:
                self._writing.release()

    def close(self) -> None:
        """Write everything; nothing is recorded any more."""
        with self._writing:
            self._write_pending()
            self._close()

    # --- with the lock held, or before anybody else knows of this object ----------------------------------------------

    def _write_pending(self) -> None:
        lines: list[bytes] = []
        num_bytes = self._num_bytes
        try:
            for _ in range(len(self._pending)):
                line = write_line(self._pending.popleft())
                num_bytes += len(line)
                if num_bytes > self._plan.max_bytes:
                    self._problem = self._problem or f"max_bytes: the log has its full size of {self._plan.max_bytes:,}"
                    break
                lines.append(line)
            self._append(lines)
            self._num_events += len(lines)
        except (OSError, TypeError) as error:
            self._problem = str(error)
        if self._problem and self._fd is not None:
            self._give_up(self._problem)

    def _append(self, lines: list[bytes]) -> None:
        """All of these lines, or none and OSError."""
        if self._fd is None or not lines:
            return
        data = memoryview(b"".join(lines))
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._num_bytes + written)
        except OSError:
            os.ftruncate(self._fd, self._num_bytes)  # no torn line before what may follow
            raise
        self._num_bytes += len(data)

    def _give_up(self, reason: str) -> None:
        self._problem = reason
        log.warning("the event log %s ends here, the scheduler goes on: %s", self._plan.path, reason)
        try:
            self._append([write_line(Stopped(stopped=reason))])
        except OSError as error:
            log.warning("the event log %s has no last line: %s", self._plan.path, error)
        self._close()
        self._pending.clear()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                os.close(fd)
            except OSError as error:  # some file systems tell of a full disk only now
                log.warning("the end of the event log %s may be missing: %s", self._plan.path, error)


def _open(path: str) -> tuple[int, int]:
    """The file, locked, and its size up to the end of its last whole line; created with its folder when missing.

    ValueError for a file that is something else, or in use; OSError.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a regular file; name one that is, or a new one")
        beginning = os.pread(fd, len(BEGINNING), 0)
        if not BEGINNING.startswith(beginning):
            raise ValueError("it holds something else than an event log; name another file, or a new one")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another scheduler is recording to it; name another file") from None
        size = _end_of_last_line(fd)
        os.ftruncate(fd, size)  # what a killed process left of its last line
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def _end_of_last_line(fd: int, step: int = 1 << 16) -> int:
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - step)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
