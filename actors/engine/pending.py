"""Work handed to helper threads: what runs, and what is over since somebody last asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")


class Pending(Generic[Job]):
    """Jobs with their futures, in the order they came. Belongs to the thread that adds and takes."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Job, Future[Any]]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[tuple[Job, Future[Any]]]:
        return iter(self._jobs)

    def add(self, job: Job, future: Future[Any]) -> None:
        self._jobs.append((job, future))

    def take_done(self) -> list[tuple[Job, Future[Any]]]:
        """Those that are over, each handed out once. Every future is asked once: one that ends meanwhile is the next
        call's."""
        done: list[tuple[Job, Future[Any]]] = []
        running: list[tuple[Job, Future[Any]]] = []
        for job, future in self._jobs:
            (done if future.done() else running).append((job, future))
        self._jobs = running
        return done
