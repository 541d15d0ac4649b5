"""Whole scores: simulated runs of one trace under several policies. One job is one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from policies.simulator.lab.ceiling import timed_oracle
from policies.simulator.lab.jobs import Outcome
from policies.simulator.lab.naming import LRU, ORACLE, short_name
from policies.simulator.lab.source import Source
from policies.simulator.lab.untimed import regret
from policies.simulator.lab.wanted import Wanted
from policies.simulator.result import SimulationResult
from policies.simulator.simulation import simulate

MOVES = ("saved", "demoted.", "fetched.", "loaded.")
"""Traffic that moves bytes; `network` is a part of what was fetched."""


@dataclass(frozen=True, kw_only=True)
class TimedJob:
    """One simulated run."""

    source: Source
    wanted: Wanted
    eviction: str | None = None
    """An import path or ORACLE in place of the set-up's."""
    seed: int = 0
    is_whole: bool = False
    """Answer with all of the result, time series too."""

    @property
    def words(self) -> str:
        return f"{self.source.text}: {short_name(self.eviction or 'as set up')}, timed"

    def run(self, told: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        trace = self.source.load()
        setup = self.wanted.build(trace)
        policies: dict[str, object] = {}
        if self.eviction is not None:
            policies["eviction"] = timed_oracle(trace, setup) if self.eviction == ORACLE else self.eviction
        result = simulate(trace, setup, policies=policies, seed=self.seed, progress=told, stopwatch=time.thread_time)
        figures = score(result)
        figures |= {"trace": trace.name, "setup": setup.name, "chunk_tokens": setup.chunk_tokens}
        figures |= {"tier_bytes": {str(tier): size for tier, size in setup.tier_bytes.items()}}
        return figures | ({"result": result.as_dict()} if self.is_whole else {})


def score(result: SimulationResult) -> dict[str, Any]:
    """The figures that judge a policy: seconds, bytes, tokens, shares between 0 and 1."""
    return {
        "policies": dict(result.policies),
        "num_turns": result.num_turns,
        "input_tokens": result.input_tokens,
        "hit_rate": result.hit_rate,
        "dram_share": result.dram_share,
        "ttft_p50_s": result.ttft_s.p50,
        "ttft_p95_s": result.ttft_s.p95,
        "wait_mean_s": result.queue_wait_s.mean,
        "wait_p95_s": result.queue_wait_s.p95,
        "queue_mean": result.mean_queue_length,
        "queue_max": result.max_queue_length,
        "bytes_moved": bytes_moved(result.traffic),
        "reused": dict(result.reused),
        "recomputed": dict(result.recomputed),
        "policy_faults": dict(result.policy_faults),
        "policy_fault_texts": list(result.policy_fault_texts),
    }


def bytes_moved(traffic: Mapping[str, int]) -> int:
    """Saved, demoted, fetched and loaded."""
    return sum(num_bytes for name, num_bytes in traffic.items() if name.startswith(MOVES))


def timed_jobs(
    source: Source, wanteds: Sequence[Wanted], policies: Sequence[str], seed: int, *, with_oracle: bool = True
) -> list[TimedJob]:
    """For every set-up: LRU, the policies, the oracle."""
    names = list(dict.fromkeys((LRU, *policies, *((ORACLE,) if with_oracle else ()))))
    return [TimedJob(source=source, wanted=wanted, eviction=name, seed=seed) for wanted in wanteds for name in names]


def timed_rows(jobs: Sequence[TimedJob], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per run, with its regret in hit rate among the runs of the same trace and set-up."""
    rows = [_row(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
    for job, row in zip(jobs, rows):
        peers = [other for peer, other in zip(jobs, rows) if (peer.source, peer.wanted) == (job.source, job.wanted)]
        rates = {peer["policy"]: peer.get("hit_rate") for peer in peers}
        row["regret"] = regret(row.get("hit_rate"), rates.get(LRU), rates.get(ORACLE))
    return rows


def _row(job: TimedJob, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"trace": job.source.text, "policy": job.eviction, "load": job.wanted.load}
    size = job.wanted.dram
    row["capacity_percent"] = 100 * size.amount if size is not None and size.unit == "share" else None
    return row | outcome.found | ({"error": outcome.error} if outcome.error else {})


def by_load(wanted: Wanted, loads: Sequence[float], capacities: Sequence[Any]) -> list[Wanted]:
    """The set-up at every load and, if there are any, every size of DRAM."""
    return [replace(wanted, load=load, dram=dram) for load in loads for dram in capacities or (wanted.dram,)]
