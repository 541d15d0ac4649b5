"""What a simulation found: figures of the whole run, a record per turn, time series. Plain values, ready for JSON.

Turns of the warm-up are left out of token counts and latencies, and the time before the first turn that counts is left
out of the queue's and the replicas' figures. Bytes and counters are of the whole run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from policies.messages import Tier
from policies.simulator.records import TurnRecord

if TYPE_CHECKING:
    from policies.simulator.simulation import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A measure over turns."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    highest: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """All 0 when there are none. A percentile is the smallest value that so many do not exceed."""
        ranked = sorted(values)
        if not ranked:
            return cls()
        p50, p95, p99 = (ranked[max(0, -(-percent * len(ranked) // 100) - 1)] for percent in (50, 95, 99))
        return cls(mean=sum(ranked) / len(ranked), p50=p50, p95=p95, p99=p99, highest=ranked[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Figures over time, window by window from 0 on, of all turns."""

    window_s: float
    queue_length: tuple[float, ...]
    """Mean number of waiting turns."""
    hit_rate: tuple[float | None, ...]
    """Of the turns dispatched in the window; None: there was none."""
    ttft_s: tuple[float | None, ...]
    """Mean of the turns submitted in the window."""


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """Seconds are virtual. Shares are between 0 and 1."""

    trace: str
    setup: str
    policies: Mapping[str, str]
    seed: int
    num_turns: int
    """That count."""
    duration_s: float
    """Over which queue and replicas are judged: from the submission of the first turn that counts to the last end."""
    input_tokens: int
    reused: Mapping[str, int]
    """Prompt tokens by the tier they came from."""
    recomputed: Mapping[str, int]
    """Prompt tokens by cause. Together with `reused`: all input tokens."""
    ttft_s: Spread
    """From submission to the first token."""
    queue_wait_s: Spread
    """From submission to the dispatch."""
    load_s: Spread
    """From the dispatch until the restore was over."""
    itl_s: Spread
    """Of the turns' means."""
    mean_queue_length: float
    max_queue_length: int
    busy_s: float
    """All replicas together, of the whole run: GPU time but for the factor of GPUs per replica."""
    prefill_s: float
    """The part of it in which prefill was computed; shared steps by shares."""
    utilisation: float
    """busy_s per replica and second of the whole run."""
    traffic: Mapping[str, int]
    """Bytes: saved, demoted.TIER, fetched.TIER, network (part of fetched), loaded.TIER, dropped.TIER; and the number of
    commands refused.COMMAND.REASON."""
    peak_bytes: Mapping[str, int]
    """The fullest that any one node's tier was."""
    counters: Mapping[str, int]
    """The scheduler's."""
    policy_faults: Mapping[str, int]
    policy_fault_texts: Sequence[str]
    """The first of each kind, with file and line."""
    turns: Sequence[TurnRecord]
    """All turns in the order of submission, the warm-up first."""
    series: Series

    @property
    def hit_rate(self) -> float:
        """Share of the input tokens that was reused."""
        return sum(self.reused.values()) / self.input_tokens if self.input_tokens else 0.0

    @property
    def dram_share(self) -> float:
        """Of the reused tokens: how many came from DRAM."""
        num_reused = sum(self.reused.values())
        return self.reused.get(Tier.DRAM, 0) / num_reused if num_reused else 0.0

    @property
    def turns_per_s(self) -> float:
        return self.num_turns / self.duration_s if self.duration_s else 0.0

    def as_dict(self, *, with_turns: bool = False) -> dict[str, Any]:
        """For JSON. The single turns are many: only if asked for."""
        found = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "turns"}
        found |= {"hit_rate": self.hit_rate, "dram_share": self.dram_share, "turns_per_s": self.turns_per_s}
        if with_turns:
            found["turns"] = [_plain(record) for record in self.turns]
        return found


def cost_saving(speed_up: float, num_gpus: int, dram_bytes: float, ssd_bytes: float) -> float:
    """The paper's formula: share of the cost saved when GPU time (at 5 $/h a GPU) shrinks by the factor `speed_up` and
    storage is paid for (0.0088 $/h a GB of DRAM, 0.000082 of SSD)."""
    storage = 0.0088 * dram_bytes / 1e9 + 0.000082 * ssd_bytes / 1e9
    return 1 - (1 + storage / (5 * num_gpus)) / speed_up


def summarise(simulation: Simulation, seed: int) -> SimulationResult:
    """The result of a run that is over."""
    records = list(simulation.records.values())
    counted = records[int(simulation.setup.warm_up * len(records)) :]
    start = min((record.submitted_at for record in counted), default=0.0)
    end = max((record.ended_at for record in records), default=0.0)
    engines = [replica.engine for replica in simulation.replicas.values()]
    busy_s = sum(engine.busy.busy_s for engine in engines)
    snapshot = simulation.scheduler.snapshot()
    return SimulationResult(
        trace=simulation.trace.name,
        setup=simulation.setup.name,
        policies=dict(simulation.policy_names),
        seed=seed,
        num_turns=len(counted),
        duration_s=end - start,
        input_tokens=sum(record.input_tokens for record in counted),
        reused=_total(record.reused for record in counted),
        recomputed=_total(record.recomputed for record in counted),
        ttft_s=Spread.of(record.ttft_s for record in counted),
        queue_wait_s=Spread.of(record.queue_wait_s for record in counted),
        load_s=Spread.of(record.started_at - record.dispatched_at for record in counted),
        itl_s=Spread.of(record.itl_s for record in counted if record.itl_s is not None),
        mean_queue_length=simulation.queue.mean(start, end),
        max_queue_length=simulation.queue.longest(start, end),
        busy_s=busy_s,
        prefill_s=sum(engine.busy.prefill_s for engine in engines),
        utilisation=busy_s / (len(engines) * end) if end else 0.0,
        traffic=dict(sorted(simulation.around.traffic.items())),
        peak_bytes=_peaks(simulation),
        counters=dict(sorted(snapshot["counters"].items())),
        policy_faults=snapshot["policy_faults"],
        policy_fault_texts=tuple(snapshot["policy_fault_texts"]),
        turns=records,
        series=_series(simulation, records, end),
    )


def _total(counts: Iterable[Mapping[Any, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        for name, count in part.items():
            total[str(name)] += count
    return dict(sorted(total.items()))


def _peaks(simulation: Simulation) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for store in simulation.stores.values():
        for tier, shelf in store.shelves.items():
            peaks[str(tier)] = max(peaks.get(str(tier), 0), shelf.peak_bytes)
    return peaks


def _series(simulation: Simulation, records: Sequence[TurnRecord], end: float) -> Series:
    count = simulation.setup.num_windows
    window_s = end / count or 1.0

    def means(
        at: Callable[[TurnRecord], float], what: Callable[[TurnRecord], tuple[float, float]]
    ) -> list[float | None]:
        """Sum of the first over sum of the second figure, window by window."""
        above, below = [0.0] * count, [0.0] * count
        for record in records:
            index = min(int(at(record) / window_s), count - 1)
            part, whole = what(record)
            above[index] += part
            below[index] += whole
        return [a / b if b else None for a, b in zip(above, below)]

    hits = means(lambda record: record.dispatched_at, lambda record: (record.num_reused, record.input_tokens))
    ttft = means(lambda record: record.submitted_at, lambda record: (record.ttft_s, 1.0))
    queue = simulation.queue.windows(0.0, window_s, count)
    return Series(window_s=window_s, queue_length=tuple(queue), hit_rate=tuple(hits), ttft_s=tuple(ttft))


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries with plain keys."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
