"""What the scheduler costs: CPU time an event, and memory a session, with very many sessions, waiting turns and nodes.

No Ray and no model: the pure scheduler with its default policies, and actors that answer at once (see `crowd`). Three
sizes, each ten times the one before, in processes of their own, so that memory can be told and growth be seen.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

from actors.garbage import settle
from cluster.bench.crowd import NUM_SLOTS, Crowd
from cluster.bench.options import BenchOptions, machine, versions
from cluster.bench.result import Result, Table, Target

TARGET_MEDIAN_US, TARGET_P99_US, TARGET_BYTES, TARGET_RUN_S = 50.0, 500.0, 2048, 600.0
SIZES = ((10_000, 10, 100), (100_000, 100, 1_000), (1_000_000, 1_000, 10_000))
QUICK_SIZES = ((500, 2, 20), (1_000, 4, 40), (2_000, 8, 80))
NUM_EVENTS, QUICK_NUM_EVENTS = 100_000, 2_000
WARM_UP = 0.2  # of the events, not counted
SETTLE_EVERY = 5_000  # events; the live scheduler does it every second

LIMITS = (
    "Python: an event is some 300 calls of functions. Most of its time goes into keeping indexes in step (who needs"
    " which chunk, who may be evicted, in which order), a part into finding where a prompt's chunks are.",
    "One thread: at the mean cost shown a scheduler handles its inverse in events per second, a turn being about"
    " a dozen of them.",
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One size. Times in seconds of CPU; `event_s` by kind of event."""

    num_sessions: int
    num_nodes: int
    num_waiting: int
    event_s: dict[str, list[float]]
    bytes_per_session: float
    fill_s: float
    run_s: float
    settle_s: float

    @property
    def all_s(self) -> list[float]:
        return sorted(seconds for of_kind in self.event_s.values() for seconds in of_kind)


def run(options: BenchOptions) -> Result:
    sizes, num_events = (QUICK_SIZES, QUICK_NUM_EVENTS) if options.quick else (SIZES, NUM_EVENTS)
    samples = []
    for size in sizes:
        options.progress(f"{size[0]:,} sessions, {size[1]:,} nodes, {size[2]:,} waiting turns")
        samples.append(_in_a_process(size, num_events))
    return _result(options, samples, num_events)


def measure(num_sessions: int, num_nodes: int, num_waiting: int, num_events: int) -> Sample:
    """In this process, which should not have done much before: memory is what it grows by."""
    gc.disable()
    began, before = time.monotonic(), _resident_bytes()
    crowd = Crowd(num_sessions, num_nodes, num_waiting)
    for _ in crowd.fill():
        pass
    fill_s, size = time.monotonic() - began, _resident_bytes() - before
    settle()
    gc.enable()
    event_s: dict[str, list[float]] = defaultdict(list)
    began, settle_s = time.monotonic(), 0.0
    num_warm_up = int(WARM_UP * num_events)
    for number, event in enumerate(islice(crowd.events(), num_events + num_warm_up)):
        watch: list[float] = []
        crowd.hear(event, lambda event, now: _timed(crowd, event, now, watch))  # noqa: B023 - used at once
        if number >= num_warm_up:
            event_s[type(event).__name__] += watch
        if number % SETTLE_EVERY == SETTLE_EVERY - 1:
            settled = time.monotonic()
            settle()
            settle_s = max(settle_s, time.monotonic() - settled)
    return Sample(
        num_sessions=num_sessions,
        num_nodes=num_nodes,
        num_waiting=crowd.scheduler.num_waiting,
        event_s=dict(event_s),
        bytes_per_session=size / num_sessions,
        fill_s=fill_s,
        run_s=time.monotonic() - began,
        settle_s=settle_s,
    )


def _timed(crowd: Crowd, event: Any, now: float, watch: list[float]) -> list[Any]:
    began = time.thread_time()
    commands = crowd.scheduler.handle(event, now)
    watch.append(time.thread_time() - began)
    return commands


def _in_a_process(size: tuple[int, int, int], num_events: int) -> Sample:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (*size, num_events))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the result -------------------------------------------------------------------------------------------------------


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _result(options: BenchOptions, samples: list[Sample], num_events: int) -> Result:
    small, big = samples[0], samples[-1]
    mean_small, mean_big = (sum(sample.all_s) / len(sample.all_s) for sample in (small, big))
    growth = mean_big / mean_small
    allowed = log(big.num_sessions) / log(small.num_sessions)
    of_big = f"{big.num_sessions:,} sessions, {big.num_waiting:,} waiting"
    return Result(
        name="scheduler",
        setup={
            "events": num_events,
            "slots_per_node": NUM_SLOTS,
            "quick": options.quick,
            "machine": machine("cpu"),
            "versions": versions(),
        },
        tables=[_sizes(samples), _kinds(big)],
        figures={f"{sample.num_sessions}": _figures(sample) for sample in samples} | {"growth": growth},
        targets=[
            _target(f"CPU time of an event, median, us ({of_big})", TARGET_MEDIAN_US, 1e6 * quantile(big.all_s, 0.5)),
            _target("CPU time of an event, p99, us", TARGET_P99_US, 1e6 * quantile(big.all_s, 0.99)),
            _target("memory of a session with one stored chunk, bytes", TARGET_BYTES, big.bytes_per_session),
            _target(f"mean cost at {big.num_sessions:,} / at {small.num_sessions:,}", round(allowed, 2), growth),
            _target(f"{big.num_nodes:,} nodes: filling and running, s", TARGET_RUN_S, big.fill_s + big.run_s),
        ],
        limits=LIMITS,
    )


def _target(measure: str, bound: float, value: float) -> Target:
    return Target(measure=measure, comparison="<=", bound=bound, value=value)


def _figures(sample: Sample) -> dict[str, Any]:
    ordered = sample.all_s
    return {
        "nodes": sample.num_nodes,
        "waiting": sample.num_waiting,
        "mean_s": sum(ordered) / len(ordered),
        "quantiles_s": {f"{share:g}": quantile(ordered, share) for share in (0.5, 0.9, 0.99, 0.999, 1.0)},
        "kinds": {
            kind: {
                "num": len(seconds),
                "median_s": quantile(sorted(seconds), 0.5),
                "p99_s": quantile(sorted(seconds), 0.99),
            }
            for kind, seconds in sorted(sample.event_s.items())
        },
        "bytes_per_session": sample.bytes_per_session,
        "fill_s": sample.fill_s,
        "run_s": sample.run_s,
        "settle_s": sample.settle_s,
    }


def _sizes(samples: list[Sample]) -> Table:
    rows = []
    for sample in samples:
        ordered = sample.all_s
        times = [sum(ordered) / len(ordered), *(quantile(ordered, share) for share in (0.5, 0.99, 0.999))]
        rows.append(
            [
                f"{sample.num_sessions:,}",
                f"{sample.num_nodes:,}",
                f"{sample.num_waiting:,}",
                *(f"{1e6 * seconds:.0f}" for seconds in times),
                f"{sample.bytes_per_session:,.0f}",
                f"{1e3 * sample.settle_s:.0f}",
            ]
        )
    columns = ("sessions", "nodes", "waiting", "mean us", "median", "p99", "p99.9", "bytes a session", "settling, ms")
    return Table(title="CPU time of an event", columns=columns, rows=rows)


def _kinds(sample: Sample) -> Table:
    rows = [
        [kind, f"{len(seconds):,}", *(f"{1e6 * quantile(sorted(seconds), share):.0f}" for share in (0.5, 0.99))]
        for kind, seconds in sorted(sample.event_s.items())
    ]
    title = f"by kind, {sample.num_sessions:,} sessions"
    return Table(title=title, columns=("event", "number", "median us", "p99"), rows=rows)
