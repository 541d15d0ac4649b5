"""Independent jobs over the cores: in this process, or in Ray's when more than one core and job are there.

A job is a frozen dataclass that can be sent to another process; what it needs it loads itself, and the answer is a
dictionary of plain values. What one job cannot do does not keep the others from running.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from policies.plugins import PolicyError
from policies.simulator.hardware import SetupError
from policies.simulator.lab.errors import LabError
from policies.simulator.simulation import SimulationStuck
from policies.simulator.trace import TraceError

OBJECT_STORE_BYTES = 100 << 20
"""Of the Ray that is started here: only rows go through it."""

EXPECTED = (LabError, TraceError, SetupError, PolicyError, SimulationStuck)
"""What a job may raise: the words are for people, the others still run."""


class Job(Protocol):
    @property
    def words(self) -> str:
        """For the progress bar."""

    def run(self, told: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """The answer; raises EXPECTED. `told` hears now and then how much is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answer of one job, or one line that says why there is none."""

    found: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    is_input: bool = False
    """The error is about what was asked for, not about what happened."""


Told = Callable[[str, int, int, float], None]
"""Hears of a job under way (or one that just ended), how many are over, of how many, and the share of this one."""


def num_jobs_at_a_time(wanted: int | None, num_jobs: int) -> int:
    """`wanted`, or a job per core; no more than there are."""
    if wanted is not None and wanted < 1:
        raise LabError(f"--jobs is {wanted}: choose 1 or more, or leave it out for a job per core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or cores, num_jobs))


def run_all(jobs: Sequence[Job], at_a_time: int, told: Told) -> list[Outcome]:
    """The outcomes in the order of the jobs."""
    outcomes: dict[int, Outcome] = {}
    for number, outcome in _one_by_one(jobs, told) if at_a_time == 1 else _over_cores(jobs, at_a_time):
        outcomes[number] = outcome
        told(jobs[number].words, len(outcomes), len(jobs), 0.0)
    return [outcomes[number] for number in range(len(jobs))]


def run_one(job: Job, told: Callable[[int, int], None] | None = None) -> Outcome:
    try:
        return Outcome(found=job.run(told))
    except EXPECTED as error:
        return Outcome(error=str(error), is_input=isinstance(error, ValueError))


def _one_by_one(jobs: Sequence[Job], told: Told) -> Iterator[tuple[int, Outcome]]:
    for number, job in enumerate(jobs):
        told(job.words, number, len(jobs), 0.0)

        def share(done: int, of: int, words: str = job.words, number: int = number) -> None:
            told(words, number, len(jobs), done / max(1, of))

        yield number, run_one(job, share)


def _over_cores(jobs: Sequence[Job], at_a_time: int) -> Iterator[tuple[int, Outcome]]:
    """In Ray's workers; a Ray that is up already is used, one that is started here ends here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(
            address="local",
            num_cpus=at_a_time,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        work = ray.remote(num_cpus=1)(_work)
        number_of = {work.remote(os.getcwd(), job): number for number, job in enumerate(jobs)}
        while number_of:
            (done,), _ = ray.wait(list(number_of), num_returns=1)
            yield number_of.pop(done), ray.get(done)
    finally:
        if is_ours:
            ray.shutdown()


def _work(folder: str, job: Job) -> Outcome:
    """In a worker: files and modules are found from where the command was started."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    return run_one(job)
