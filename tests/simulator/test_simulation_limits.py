"""Limits in which the right answer is known: by formula, or by a cache without time that is written down here again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from policies.messages import Cause
from policies.simulator.clock import Clock
from policies.simulator.engine import Engine, Job
from policies.simulator.hardware import EngineSpeed, LinkSpeeds
from policies.simulator.links import Link
from policies.simulator.load import offered_work_s, recorded_load
from policies.simulator.records import QueueLog
from policies.simulator.result import Spread, cost_saving
from policies.simulator.setup import TierBudgets
from policies.simulator.simulation import simulate
from policies.simulator.trace import Request, Trace
from tests.simulator.small import BYTES, ENGINE, LINKS, random_trace, request, setup_of, trace_of

FAST = LinkSpeeds(
    **dict.fromkeys(("dram_load", "dram_save", "ssd_read", "ssd_write"), 1e15),
    network=1e15,
    object_read=1e15,
    object_write=1e15,
    ssd_latency_s=0.0,
    network_latency_s=0.0,
    object_latency_s=0.0,
)

# --- links ------------------------------------------------------------------------------------------------------------


def test_a_busy_link_goes_to_one_after_the_other() -> None:
    link = Link(bytes_per_s=100.0, latency_s=0.5)
    assert link.would_end(0.0, 200) == 2.5
    assert [link.send(0.0, 200), link.send(0.0, 200), link.send(10.0, 100)] == [2.5, 4.5, 11.5]
    assert link.num_bytes == 500


def test_two_loads_at_a_time_take_twice_as_long_as_one() -> None:
    """Two conversations of 400 tokens on one node's SSD, which reads 2,000 tokens a second."""
    setup = setup_of(
        budgets=TierBudgets(dram=33, ssd=2_000, unit="tokens"), links=replace(LINKS, ssd_write=1e9),
        scheduler={"prefetch": "policies.prefetch:Off", "high_watermark": 0.9, "low_watermark": 0.8},
        replicas_per_node=2, tick_s=0.01,
    )  # fmt: skip
    first = [request(i, 400, session_id=i) for i in range(2)]
    back = [request(2 + i, 401, session_id=i, parent=i, arrival_s=100.0 + wait) for i, wait in enumerate((0.0, 0.0))]
    alone = [back[0], replace(back[1], arrival_s=200.0)]
    together_s, alone_s = (
        sorted(record.started_at - record.dispatched_at for record in simulate(trace_of(*first, *rest), setup).turns)
        for rest in (back, alone)
    )
    one_s = alone_s[-1]
    assert one_s == pytest.approx(384 / 2000, rel=0.05)  # the last chunk is in DRAM
    assert alone_s[-2:] == pytest.approx([one_s, one_s], rel=0.05)
    assert together_s[-2:] == pytest.approx([one_s, 2 * one_s], rel=0.05)


# --- the engine -------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    first_token: float = -1.0
    end: float = -1.0


def run_engine(speed: EngineSpeed, jobs: list[tuple[float, int, int]]) -> list[Times]:
    """`jobs`: (arrival, prompt tokens, answer tokens); when each had its first token, and its last."""
    clock = Clock()
    engine = Engine(clock, speed)
    times = [Times() for _ in jobs]

    def note(i: int, name: str) -> None:
        setattr(times[i], name, clock.now)

    for i, (arrival_s, num_prompt, num_answer) in enumerate(jobs):
        job = Job(
            num_prompt_tokens=num_prompt,
            num_answer_tokens=num_answer,
            work_s=speed.prefill_s(0, num_prompt),
            on_first_token=lambda i=i: note(i, "first_token"),  # type: ignore[misc]
            on_end=lambda i=i: note(i, "end"),  # type: ignore[misc]
            is_loaded=True,
        )
        clock.at(arrival_s, engine.add, job)
    while clock.next_at is not None:
        clock.run_next()
    assert engine.num_turns == 0
    return times


def test_one_turn_alone_takes_what_its_tokens_take() -> None:
    (times,) = run_engine(ENGINE, [(0.0, 500, 11)])
    assert times.first_token == pytest.approx(0.5)
    assert times.end == pytest.approx(0.5 + 10 * 0.011)


@pytest.mark.parametrize("batch", [2, 7])
def test_tokens_at_batch_b_take_b_turns_steps(batch: int) -> None:
    speed = replace(ENGINE, prefill_s_per_token=1e-12)
    step_s = 0.01 + batch * 0.001
    for times in run_engine(speed, [(0.0, 10, 101)] * batch):
        assert times.end == pytest.approx(100 * step_s, abs=step_s)  # one step in which some are prefilled


def test_the_kv_that_decoding_reads_takes_time() -> None:
    speed = replace(ENGINE, prefill_s_per_token=1e-12, step_s_per_context_token=1e-4)
    (times,) = run_engine(speed, [(0.0, 1000, 2)])
    assert times.end == pytest.approx(0.011 + 0.1)


def test_prefill_goes_in_order_and_slows_decoding() -> None:
    """A step of 100 tokens: 1 decodes (11 ms) and 99 are prefilled (99 ms), so 1,000 tokens take 1,000/99 steps; the
    token comes with the end of the eleventh, and half a step passed before the first."""
    decoding, late = run_engine(ENGINE, [(0.0, 100, 1001), (1.0, 1000, 1)])
    shared_s = 1000 / 99 * 0.110
    assert late.first_token == pytest.approx(1.0 + 0.011 / 2 + 11 * 0.011 + 1000 * 0.001)
    assert decoding.first_token == pytest.approx(0.1)
    assert decoding.end == pytest.approx(0.1 + 1000 * 0.011 + shared_s - 1000 / 99 * 0.011)


@pytest.mark.parametrize("num_new", [1, 20, 60])
def test_a_turn_is_computed_in_the_step_that_admits_it(num_new: int) -> None:
    """As in the live engine: what is left of the running step, and one of its own, in which 12 others decode."""
    others = [(0.0, 1, 10_000)] * 12
    *_, late = run_engine(ENGINE, [*others, (50.0, num_new, 1)])
    step_s = 0.010 + 12 * 0.001
    assert late.first_token - 50.0 == pytest.approx(step_s / 2 + step_s + num_new * 0.001)


def test_nobody_waits_for_steps_of_an_idle_engine() -> None:
    (times,) = run_engine(ENGINE, [(3.0, 7, 1)])
    assert times.first_token == pytest.approx(3.007)


def test_nothing_is_computed_twice_and_the_engine_knows_when_it_worked() -> None:
    clock = Clock()
    engine = Engine(clock, ENGINE)
    done: list[float] = []
    for arrival_s in (0.0, 0.05, 5.0):
        job = Job(200, 21, ENGINE.prefill_s(0, 200), lambda: None, lambda: done.append(clock.now), is_loaded=True)
        clock.at(arrival_s, engine.add, job)
    while clock.next_at is not None:
        clock.run_next()
    assert engine.busy.prefill_s == pytest.approx(3 * 0.2)
    assert engine.busy.busy_s == pytest.approx(done[1] + done[2] - 5.0)


def test_loading_hides_behind_computing_and_the_longer_one_counts() -> None:
    clock = Clock()
    engine = Engine(clock, ENGINE)
    seen: list[tuple[str, float]] = []
    jobs = {
        name: Job(300, 1, 0.3, lambda name=name: seen.append((name, clock.now)), lambda: None, is_loaded=False)  # type: ignore[misc]
        for name in ("quick load", "slow load")
    }
    for name, loaded_at in (("slow load", 5.0), ("quick load", 0.1)):
        engine.add(jobs[name])
        clock.at(loaded_at, engine.loaded, jobs[name])
    while clock.next_at is not None:
        clock.run_next()
    assert seen == [("quick load", pytest.approx(0.6)), ("slow load", pytest.approx(5.0))]


# --- whole runs against formulas --------------------------------------------------------------------------------------


def test_without_reuse_the_first_token_comes_when_the_prompt_is_computed() -> None:
    trace = trace_of(*(request(i, 100 + 10 * i, arrival_s=10.0 * i) for i in range(20)))
    speed = replace(ENGINE, prefill_s_per_token_and_context=1e-6)
    for record in simulate(trace, setup_of(reuse=False, engine=speed)).turns:
        assert record.ttft_s == pytest.approx(speed.prefill_s(0, record.input_tokens))
        assert record.queue_wait_s == 0.0


def test_a_returning_turn_waits_for_its_load_or_computes_what_is_new() -> None:
    """1,000 tokens of history at 10,000 a second: 0.1 s, hidden behind 500 new tokens but not behind 10."""
    first = request(0, 1000, session_id=0)
    slow_links = replace(LINKS, dram_save=1e9)
    for num_new, ttft_s in ((500, 0.5), (10, 0.1)):
        back = request(1, 1000 + num_new, session_id=0, parent=0, arrival_s=50.0)
        result = simulate(trace_of(first, back), setup_of(links=slow_links))
        assert result.turns[1].num_reused == 1000
        assert result.turns[1].ttft_s == pytest.approx(ttft_s)


def test_restores_wait_for_a_loader_and_not_for_ever() -> None:
    """Three conversations of 1,000 tokens, 0.1 s of loading each, come back together to a replica with one loader."""
    first = [request(i, 1000, session_id=i) for i in range(3)]
    back = [request(3 + i, 1001, session_id=i, parent=i, arrival_s=50.0) for i in range(3)]
    roomy = setup_of(engine=replace(ENGINE, kv_tokens=10_000), num_loaders=1)
    turns = simulate(trace_of(*first, *back), roomy).turns[3:]
    assert [turn.started_at - turn.dispatched_at for turn in turns] == pytest.approx([0.1, 0.2, 0.3])
    turns = simulate(trace_of(*first, *back), replace(roomy, load_deadline_s=0.15)).turns[3:]
    assert [turn.num_reused for turn in turns] == [1000, 480, 0]
    assert [turn.recomputed.get(Cause.LATE, 0) for turn in turns] == [0, 520, 1000]
    assert [turn.started_at - turn.dispatched_at for turn in turns] == pytest.approx([0.1, 0.15, 0.15])


def test_waiting_in_a_queue_of_equal_turns_is_as_long_as_the_formula_says() -> None:
    """M/D/1: Poisson arrivals, one slot, 0.1 s each, 70 % busy: mean wait = rho s / (2 (1 - rho))."""
    chance, when, requests = Random(0), 0.0, []
    for i in range(6000):
        when += chance.expovariate(7.0)
        requests.append(request(i, 100, arrival_s=when))
    result = simulate(trace_of(*requests), setup_of(reuse=False, max_running_turns=1))
    assert result.utilisation == pytest.approx(0.7, rel=0.03)
    assert result.queue_wait_s.mean == pytest.approx(0.7 * 0.1 / (2 * 0.3), rel=0.1)
    assert result.mean_queue_length == pytest.approx(7.0 * result.queue_wait_s.mean, rel=0.03)  # Little


def test_the_offered_load_is_the_work_over_the_time() -> None:
    trace = random_trace(0)
    setup = setup_of(reuse=False, offered_load=0.5, replicas_per_node=2, max_running_turns=2)
    scaled = [replace(one, arrival_s=one.arrival_s * recorded_load(trace, setup) / 0.5, think_s=None) for one in trace]
    assert offered_work_s(trace, setup) / (2 * Trace(name="", block_tokens=0, requests=scaled).duration_s) == (
        pytest.approx(0.5)
    )
    submitted = [record.submitted_at for record in simulate(trace, setup).turns]
    assert max(submitted) >= scaled[-1].arrival_s - scaled[0].arrival_s
    one = trace_of(request(0, 1000, 11), request(1, 1000, 11))  # each: 1 s of prefill, 10 steps of 12 ms for two
    assert recorded_load(one, setup_of(max_running_turns=2)) == pytest.approx(2 * (1.0 + 10 * 0.012 / 2))


def test_twice_the_load_is_twice_as_fast() -> None:
    trace = trace_of(*(request(i, 50, arrival_s=float(i)) for i in range(50)))
    slow, fast = (simulate(trace, setup_of(reuse=False, offered_load=load)) for load in (0.2, 0.4))
    assert slow.turns[-1].submitted_at == pytest.approx(2 * fast.turns[-1].submitted_at)
    assert fast.utilisation == pytest.approx(2 * slow.utilisation, rel=0.1)


# --- against a cache without time -------------------------------------------------------------------------------------


class UntimedLru:
    """Least recently used chunks go first, but no chunk before those that follow it; at a tie the deeper one."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.used: dict[tuple[int, ...], int] = {}  # by the prefix of blocks
        self.now = 0

    def run(self, blocks: tuple[int, ...], chunk_blocks: int) -> int:
        """The number of chunks found; all are there afterwards."""
        prefixes = [blocks[:end] for end in range(chunk_blocks, len(blocks) + 1, chunk_blocks)]
        found = next((i for i, prefix in enumerate(prefixes) if prefix not in self.used), len(prefixes))
        self.now += 1
        self.used.update(dict.fromkeys(prefixes[:found], self.now))
        self.now += 1
        for prefix in prefixes[found:]:
            if len(self.used) == self.num_chunks:
                del self.used[self._victim(chunk_blocks)]
            self.used[prefix] = self.now
        return found

    def _victim(self, chunk_blocks: int) -> tuple[int, ...]:
        parents = {prefix[:-chunk_blocks] for prefix in self.used}
        leaves = [prefix for prefix in self.used if prefix not in parents]
        return min(leaves, key=lambda prefix: (self.used[prefix], -len(prefix)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_chunks", [16, 24, 60])
def test_one_turn_at_a_time_over_endless_links_hits_what_an_untimed_lru_hits(seed: int, num_chunks: int) -> None:
    """Whole chunks of 32 tokens, no answers; each turn comes when the one before is long over."""
    made = random_trace(seed, num_sessions=6, num_turns=6, num_system=32, unit=32, answers=False)
    requests = [replace(one, arrival_s=60.0 * i, think_s=None) for i, one in enumerate(made)]
    setup = setup_of(
        links=FAST, drop_s=0.0, budgets=TierBudgets(dram=32 * num_chunks, unit="tokens"),
        scheduler={"high_watermark": 1.0, "low_watermark": 1.0, "session_ttl_s": 1e9,
                   "eviction": "policies.eviction:Lru"},
    )  # fmt: skip
    result = simulate(Trace(name=made.name, block_tokens=16, requests=requests), setup)
    cache = UntimedLru(num_chunks)
    expected = [_reused(one, cache.run(tuple(one.blocks), 2)) for one in requests]
    assert [record.num_reused for record in result.turns] == expected
    assert sum(expected) > 0


def _reused(one: Request, num_chunks: int) -> int:
    """One token is always computed."""
    return min(32 * num_chunks, one.input_tokens - 1)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_percentiles_and_means() -> None:
    spread = Spread.of(range(1, 101))
    assert (spread.mean, spread.p50, spread.p95, spread.p99, spread.highest) == (50.5, 50, 95, 99, 100)
    assert Spread.of([]) == Spread()
    assert Spread.of([3.0]).p95 == 3.0


def test_the_queue_over_time() -> None:
    log = QueueLog()
    for now, by in ((1.0, 1), (1.0, 1), (3.0, -1), (5.0, -1)):
        log.change(now, by)
    assert log.mean(0.0, 10.0) == pytest.approx((2 * 2 + 2 * 1) / 10)
    assert log.mean(2.0, 4.0) == pytest.approx(1.5)
    assert log.longest(0.0, 10.0) == 2
    assert log.longest(3.0, 10.0) == 1
    assert log.windows(0.0, 2.0, 3) == pytest.approx([1.0, 1.5, 0.5])
    assert (log.mean(4.0, 4.0), log.longest(20.0, 20.0)) == (0.0, 0)


@pytest.mark.parametrize(("speed_up", "saving"), [(4.0, 0.725), (1.9, 0.422)])
def test_the_papers_cost_formula(speed_up: float, saving: float) -> None:
    """128 GB of DRAM and 10 TB of SSD beside four GPUs: $1.95 an hour."""
    assert cost_saving(speed_up, 4, 128e9, 10e12) == pytest.approx(1 - (1 + 1.946 / 20) / speed_up, abs=1e-3)
    assert cost_saving(speed_up, 4, 128e9, 10e12) == pytest.approx(saving, abs=0.02)


def test_bytes_are_those_of_the_tokens() -> None:
    result = simulate(trace_of(request(0, 100, 29), request(1, 1, arrival_s=50.0)), setup_of())
    assert result.traffic["saved"] == 128 * BYTES  # what the last turn leaves is not waited for
    assert result.peak_bytes == {"dram": 129 * BYTES}
