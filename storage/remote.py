"""A place below an fsspec URL, and its operations: each is on its way at once and over at a deadline.

Knows paths and errors, nothing of budgets or of what a chunk looks like; `storage.bucket` builds on it.
"""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import fsspec.core

from storage.tier import TierError, TierFull, chunk_path


class Operation:
    """One operation of a file system on its way. Several threads may wait for the same one."""

    def __init__(self, name: str, url: str, limit_s: float, future: Future[Any]) -> None:
        self._name, self._url, self._limit_s, self._future = name, url, limit_s, future
        self._ends_at = time.monotonic() + limit_s

    def result(self) -> Any:
        """Waits for the outcome, at most until the deadline, which began with the operation.

        FileNotFoundError, or TierError for everything else that the file system may raise.
        """
        try:
            return self._future.result(max(0.0, self._ends_at - time.monotonic()))
        except FileNotFoundError:
            raise
        except TimeoutError as error:
            self.cancel()
            raise TierError(f"{self._url}: {self._name} was not done after {self._limit_s} s") from error
        except PermissionError as error:
            raise TierError(
                f"{self._url}: {self._name} denied; check the credentials and their rights: {error}"
            ) from error
        except Exception as error:  # each driver brings its own classes
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (TierFull if full else TierError)(f"{self._url}: {self._name} failed: {error!r}") from error

    def cancel(self) -> None:
        """Nobody waits for it any more: ends the request where the file system is asynchronous, else lets it run."""
        self._future.cancel()


class Bucket:
    """The place below a URL, and its operations with a deadline. Counts and keeps nothing."""

    def __init__(self, url: str, deadline_s: float, options: Mapping[str, object] | None) -> None:
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be > 0, got {deadline_s}")
        self.deadline_s = deadline_s
        self._url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **(options or {})})
        except (ImportError, ValueError) as error:
            raise TierError(f"{url}: {error}") from error
        self.root = root.rstrip("/")

    def path(self, key: str) -> str:
        return f"{self.root}/{chunk_path(key)}"

    def size(self, key: str) -> int | None:
        """Bytes of a chunk's file; None where there is none."""
        try:
            info = self.call("info", self.path(key))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def get(self, key: str, start: int, end: int | None) -> bytes:
        """One ranged request, up to the end of the file if `end` is None. FileNotFoundError."""
        return bytes(self.begin_get(key, start, end).result())

    def begin_get(self, key: str, start: int, end: int | None) -> Operation:
        """The same, on its way. The range is always given: without one, s3fs asks for the size first."""
        return self.begin("cat_file", self.path(key), start=start, end=end)

    def call(self, operation: str, *args: object, deadline_s: float | None = None, **options: object) -> Any:
        """One operation of the file system. FileNotFoundError, or TierError for everything else it may raise."""
        return self.begin(operation, *args, deadline_s=deadline_s, **options).result()

    def begin(self, operation: str, *args: object, deadline_s: float | None = None, **options: object) -> Operation:
        """Starts an operation and returns at once; raises nothing, its result tells."""
        limit_s = self.deadline_s if deadline_s is None else deadline_s
        future = (
            self._in_loop(operation, *args, **options)
            if self._fs.async_impl
            else _in_thread(lambda: getattr(self._fs, operation)(*args, **options))
        )
        return Operation(operation, self._url, limit_s, future)

    def _in_loop(self, operation: str, *args: object, **options: object) -> Future[Any]:
        async def run() -> Any:
            return await getattr(self._fs, "_" + operation)(*args, **options)

        return asyncio.run_coroutine_threadsafe(run(), self._fs.loop)


def _in_thread(function: Callable[[], object]) -> Future[Any]:
    """A blocking call in a thread of its own, which stays behind if the call does not end."""
    future: Future[Any] = Future()

    def run() -> None:
        outcome, error = None, None
        try:
            outcome = function()
        except BaseException as raised:  # noqa: BLE001 - raised again where the result is asked for
            error = raised
        if not future.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="object-tier").start()
    return future
