"""Hit rates without time: policies between LRU and the oracle, by capacity. One job is one replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from policies.eviction import EvictionPolicy
from policies.import_path import describe
from policies.plugins import Guard, PolicyError, load_policy
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.jobs import Outcome
from policies.simulator.lab.naming import LRU, ORACLE, short_name
from policies.simulator.lab.source import Source
from policies.simulator.oracle import block_oracle, session_oracle
from policies.simulator.replay import Level, replay
from policies.simulator.shaping import with_private_blocks
from policies.simulator.trace import Trace, TraceError

PRIVATE_BLOCK_TOKENS = 64
"""For traces of lengths only, at block level."""


@dataclass(frozen=True, kw_only=True)
class HitRateJob:
    """One policy over one trace at one capacity."""

    source: Source
    level: Level
    percent: float
    """Capacity, of the trace's footprint."""
    policy: str
    """An import path, or ORACLE."""
    warm_up: float = 0.0
    """Share of the requests, from the first on, that are replayed and not counted."""
    is_strict: bool = False
    """The policy's first fault ends the run; otherwise its faults are told and a safe default decides."""

    @property
    def words(self) -> str:
        return f"{self.source.text}: {short_name(self.policy)}, {self.percent:g} % {self.level}"

    def run(self, told: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """hit_rate (0 to 1), capacity_tokens, footprint_tokens, and policy_faults in words if there are any."""
        trace = _with_blocks(self.source.load(), self.level)
        policy, max_run = self._policy(trace), 1 if self.policy == ORACLE else 1 << 30
        progress = None if told is None else lambda done: told(done, len(trace))
        guard = Guard(is_strict=self.is_strict)
        try:
            done = replay(
                trace,
                policy,
                self.percent / 100,
                level=self.level,
                max_run=max_run,
                warm_up=self.warm_up,
                progress=progress,
                guard=guard,
            )
        except (TraceError, PolicyError):
            raise
        except Exception as error:  # foreign code
            raise PolicyError(f"eviction policy {self.policy!r} on {trace.name}: {describe(error)}") from error
        return {
            "trace": trace.name,
            "hit_rate": done.hit_rate,
            "capacity_tokens": round(done.capacity_tokens),
            "footprint_tokens": done.footprint_tokens,
            **({"policy_faults": guard.texts()} if guard.num_faults else {}),
        }

    def _policy(self, trace: Trace) -> EvictionPolicy:
        if self.policy == ORACLE:
            return block_oracle(trace) if self.level is Level.BLOCK else session_oracle(trace)
        try:
            return load_policy("eviction", self.policy)  # type: ignore[return-value]
        except ValueError as error:
            raise LabError(str(error)) from None


def levels_of(trace: Trace) -> list[Level]:
    """The levels at which a trace has something to be found again; session level if there is nothing at all."""
    has_sessions = any(request.parent is not None for request in trace)
    blocks = [Level.BLOCK] if trace.block_tokens else []
    return blocks + ([Level.SESSION] if has_sessions or not blocks else [])


def hit_rate_jobs(
    source: Source,
    levels: Iterable[Level],
    percents: Sequence[float],
    policies: Sequence[str],
    warm_up: float = 0.0,
    *,
    is_strict: bool = False,
) -> list[HitRateJob]:
    """For every level and capacity: LRU, the policies, the oracle. LabError for a warm-up of everything."""
    if not 0 <= warm_up < 1:
        raise LabError(f"--warm-up is {warm_up}: give a share from 0 to below 1")
    names = list(dict.fromkeys((LRU, *policies, ORACLE)))
    return [
        HitRateJob(source=source, level=level, percent=percent, policy=name, warm_up=warm_up, is_strict=is_strict)
        for level in levels
        for percent in percents
        for name in names
    ]


def hit_rate_rows(jobs: Sequence[HitRateJob], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per trace, level and capacity: lru, oracle, and hit_rate and regret of each policy by import path."""
    rows: dict[tuple[Source, Level, float], dict[str, Any]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        row = rows.setdefault(
            (job.source, job.level, job.percent),
            {"trace": job.source.text, "level": str(job.level), "capacity_percent": job.percent, "policies": {}},
        )
        plain = {name: value for name, value in outcome.found.items() if name not in ("hit_rate", "policy_faults")}
        row.update(plain)
        row.setdefault("policy_faults", []).extend(outcome.found.get("policy_faults", ()))
        if outcome.error:
            row.setdefault("errors", []).append(outcome.error)
        rate = outcome.found.get("hit_rate")
        if job.policy in (LRU, ORACLE):
            row["lru" if job.policy == LRU else "oracle"] = rate
        else:
            row["policies"][job.policy] = {"hit_rate": rate}
    for row in rows.values():
        for figures in row["policies"].values():
            figures["regret"] = regret(figures["hit_rate"], row.get("lru"), row.get("oracle"))
    return list(rows.values())


def regret(policy: float | None, lru: float | None, oracle: float | None) -> float | None:
    """(policy - LRU) / (oracle - LRU): 0 is LRU, 1 the oracle. None where the oracle gains nothing over LRU."""
    if policy is None or lru is None or oracle is None or oracle - lru < 1e-4:
        return None
    return (policy - lru) / (oracle - lru)


def _with_blocks(trace: Trace, level: Level) -> Trace:
    if level is Level.SESSION or trace.block_tokens:
        return trace
    return with_private_blocks(trace, PRIVATE_BLOCK_TOKENS)
