"""The timed simulator as a whole: the protocol is kept, nothing is lost, the same seed gives the same run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies import messages as m
from policies.catalog import CopyState
from policies.eviction import Lru
from policies.simulator.hardware import SetupError
from policies.simulator.setup import Setup, TierBudgets
from policies.simulator.simulation import Simulation, SimulationStuck, simulate
from policies.simulator.trace import Trace
from tests.simulator.small import random_trace, request, setup_of, trace_of

ROOT = Path(__file__).parents[2]

SETUPS = {
    "roomy": setup_of(),
    "dram only, tight": setup_of(budgets=TierBudgets(dram=700, unit="tokens")),
    "dram and ssd": setup_of(budgets=TierBudgets(dram=700, ssd=1500, unit="tokens")),
    "all tiers, two nodes": setup_of(
        budgets=TierBudgets(dram=500, ssd=700, bucket=2000, unit="tokens"), num_nodes=2, replicas_per_node=2
    ),
    "failures": setup_of(
        budgets=TierBudgets(dram=500, ssd=700, bucket=1000, unit="tokens"),
        num_nodes=2,
        failure_share=0.2,
        scheduler={"retry_s": 0.5, "command_deadline_s": 3.0, "offer_deadline_s": 1.0},
    ),
    "no store": setup_of(budgets=TierBudgets(dram=0)),
    "no reuse": setup_of(reuse=False),
    "late offers": setup_of(offer_early=False, budgets=TierBudgets(dram=700, ssd=1500, unit="tokens")),
    "short deadline": setup_of(
        budgets=TierBudgets(dram=300, ssd=4000, unit="tokens"),
        load_deadline_s=0.02,
        scheduler={"prefetch": "policies.prefetch:Off"},
    ),
}


class Watch:
    """Looks at everything after every event."""

    def __init__(self, trace: Trace, setup: Setup, **rest: Any) -> None:
        self.simulation = Simulation(trace, setup, event_sink=self.look, **rest)
        self.events: Counter[str] = Counter()

    def look(self, now: float, event: m.Event, commands: list[m.Command]) -> None:
        self.events[type(event).__name__] += 1
        self.simulation.scheduler.check()
        self._compare_stores()

    def _compare_stores(self) -> None:
        """What the scheduler takes for readable is there, and no shelf holds more than its budget."""
        for place, chunks in self.simulation.scheduler.board.catalog.at.items():
            shelf = self._shelf(place.node_id, place.tier)
            readable = {key for key, chunk in chunks.items() if chunk.copies[place].state is CopyState.RESIDENT}
            assert readable <= shelf.chunks.keys()
        for store in self.simulation.stores.values():
            for shelf in store.shelves.values():
                assert shelf.used_bytes == sum(shelf.chunks.values()) + sum(shelf.coming.values())
                assert shelf.used_bytes <= shelf.budget_bytes

    def _shelf(self, node_id: str, tier: m.Tier) -> Any:
        simulation = self.simulation
        return simulation.bucket if tier is m.Tier.OBJECT else simulation.stores[node_id].shelves[tier]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_every_turn_ends_and_every_token_is_accounted_for(setup: Setup, seed: int) -> None:
    trace = random_trace(seed, gap_s=0.05)
    watch = Watch(trace, setup, seed=seed)
    result = watch.simulation.run()
    assert [record.request_id for record in sorted(result.turns, key=lambda r: r.request_id)] == list(range(len(trace)))
    for record in result.turns:
        assert record.num_reused + sum(record.recomputed.values()) == record.input_tokens
        assert all(count > 0 for count in [*record.reused.values(), *record.recomputed.values()])
        times = record.submitted_at, record.dispatched_at, record.started_at, record.first_token_at, record.ended_at
        assert list(times) == sorted(times)
    assert watch.events["TurnFinished"] == watch.events["TurnStarted"] == len(trace)
    assert sum(result.reused.values()) + sum(result.recomputed.values()) == trace.input_tokens
    assert not [name for name in result.counters if name.startswith("stale.Turn")]
    if not setup.failure_share:
        assert not [name for name in result.traffic if name.startswith("refused.")]


def test_what_the_setups_above_are_for() -> None:
    """They move bytes in every way there is."""
    trace = random_trace(0, gap_s=0.05)
    found = {name: simulate(trace, setup) for name, setup in SETUPS.items()}
    assert found["roomy"].hit_rate > 0.6 > found["dram only, tight"].hit_rate > 0.0
    assert found["dram and ssd"].traffic["demoted.ssd"] > 0
    assert found["all tiers, two nodes"].traffic["demoted.object"] > 0
    assert found["all tiers, two nodes"].traffic["network"] > 0
    assert any(name.startswith("refused.") for name in found["failures"].traffic)
    assert found["no store"].reused == {}
    assert found["no reuse"].recomputed == {"reuse_off": trace.input_tokens}
    assert found["short deadline"].recomputed["late"] > 0


def test_a_follow_up_never_starts_before_its_parent_ends() -> None:
    trace = random_trace(1, gap_s=0.01)
    setup = setup_of(max_running_turns=2)
    result = simulate(trace, setup)
    by_id = {record.request_id: record for record in result.turns}
    first = trace.requests[0].arrival_s
    for one in trace:
        submitted = by_id[one.request_id].submitted_at
        assert submitted >= one.arrival_s - first
        if one.parent is not None:
            assert one.think_s is not None
            earliest = by_id[one.parent].ended_at + one.think_s
            assert submitted == pytest.approx(max(earliest, one.arrival_s - first))


def test_truncated_contexts_are_new_text_or_are_reused() -> None:
    """One conversation of 600 tokens, cut to 300 and gone on with; another one tells how much people type."""
    cut = [
        request(0, 600, 40, session_id=0, arrival_s=0.0),
        request(1, 300, 40, session_id=0, arrival_s=10.0, parent=0),
        request(2, 400, 1, session_id=0, arrival_s=20.0, parent=1),
    ]
    other = [request(3, 50, 20, arrival_s=30.0), request(4, 90, 1, session_id=3, arrival_s=40.0, parent=3)]
    trace = trace_of(*cut, *other)
    new, kept = (simulate(trace, setup_of(reuse_after_truncation=reuses)).turns for reuses in (False, True))
    typed = ((400 - 340) + (90 - 70)) // 2
    assert new[1].recomputed == {m.Cause.TRUNCATED: 300 - typed, m.Cause.NEVER_STORED: typed}
    assert new[2].num_reused == 339
    assert kept[1].num_reused == 300 - typed
    assert kept[1].recomputed == {m.Cause.NEVER_STORED: typed}
    assert kept[2].num_reused == 339


def test_the_same_seed_gives_the_same_run_and_another_one_other_failures() -> None:
    trace, setup = random_trace(2, gap_s=0.05), SETUPS["failures"]
    one, again, other = (simulate(trace, setup, seed=seed).as_dict(with_turns=True) for seed in (1, 1, 2))
    assert one == again
    assert one["traffic"] != other["traffic"]


PROGRAM = """
import hashlib, json
from tests.simulator.small import random_trace
from tests.simulator.test_simulation import SETUPS
from policies.simulator.simulation import simulate
log, trace, setup = [], random_trace(3, gap_s=0.05), SETUPS["all tiers, two nodes"]
result = simulate(trace, setup, event_sink=lambda *seen: log.append(repr(seen)))
told = json.dumps(result.as_dict(with_turns=True), sort_keys=True) + "".join(log)
print(hashlib.sha256(told.encode()).hexdigest())
"""


def test_the_hash_seed_makes_no_difference() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    digests = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**environment, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


def test_policies_are_paths_or_objects() -> None:
    trace, setup = random_trace(4, gap_s=0.05), SETUPS["dram only, tight"]
    by_path = simulate(trace, setup, policies={"eviction": "policies.eviction:Lru"})
    by_object = simulate(trace, setup, policies={"eviction": Lru()})
    assert by_path.hit_rate == by_object.hit_rate
    assert by_path.policies["eviction"] == "policies.eviction:Lru"
    assert by_object.policies["eviction"].endswith(":Lru")
    with pytest.raises(SetupError, match="choose from eviction"):
        simulate(trace, setup, policies={"evicton": Lru()})
    with pytest.raises(ValueError, match="has no class"):
        simulate(trace, setup, policies={"eviction": "policies.eviction:Nothing"})


def test_a_sink_hears_every_event_in_order() -> None:
    log: list[tuple[float, m.Event, list[m.Command]]] = []
    result = simulate(random_trace(5), setup_of(), event_sink=lambda *seen: log.append(seen))
    counted = Counter(f"events.{type(event).__name__}" for _, event, _ in log)
    assert counted == {name: n for name, n in result.counters.items() if name.startswith("events.")}
    assert [now for now, _, _ in log] == sorted(now for now, _, _ in log)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    trace = trace_of(*(request(i, 10, arrival_s=0.1 * i) for i in range(1200)))
    simulate(trace, setup_of(reuse=False), progress=lambda done, of: told.append((done, of)))
    assert told == [(500, 1200), (1000, 1200)]


def test_the_warm_up_is_left_out() -> None:
    trace = random_trace(6)
    whole, warm = simulate(trace, setup_of()), simulate(trace, setup_of(warm_up=0.5))
    assert warm.num_turns == len(trace) // 2
    assert warm.input_tokens == sum(record.input_tokens for record in whole.turns[len(trace) // 2 :])
    assert warm.hit_rate > whole.hit_rate
    assert len(warm.turns) == len(trace)


def test_the_result_is_plain() -> None:
    result = simulate(random_trace(7), setup_of(num_windows=10))
    found = json.loads(json.dumps(result.as_dict()))
    assert found["hit_rate"] == result.hit_rate
    assert len(found["series"]["queue_length"]) == 10
    assert "turns" not in found
    assert len(result.as_dict(with_turns=True)["turns"]) == result.num_turns


def test_a_scheduler_that_forgets_turns_is_found_out() -> None:
    simulation = Simulation(trace_of(request(0, 10), request(1, 10)), setup_of())
    handle = simulation.scheduler.handle
    simulation.scheduler.handle = (  # type: ignore[method-assign]
        lambda event, now: handle(event, now) if not isinstance(event, m.TurnSubmitted) else []
    )
    with pytest.raises(SimulationStuck, match="2 turns wait"):
        simulation.run()


def test_an_empty_trace_is_over_at_once() -> None:
    result = simulate(trace_of(), replace(setup_of(), offered_load=None))
    assert (result.num_turns, result.hit_rate, result.mean_queue_length) == (0, 0.0, 0.0)


def test_who_says_that_he_is_about_to_speak_finds_his_chunks_in_dram() -> None:
    """Two conversations and DRAM for one of them: without a word the one that comes back is read from the SSD."""
    requests = [request(0, 400, session_id=0), request(1, 400, session_id=1, arrival_s=20.0)]
    back = request(2, 401, session_id=0, parent=0, arrival_s=60.0)
    figures = {}
    for advice_s in (0.0, 5.0):
        setup = setup_of(budgets=TierBudgets(dram=500, ssd=4_000, unit="tokens"), advice_s=advice_s)
        heard: list[m.Event] = []
        result = simulate(
            trace_of(*requests, back),
            setup,
            event_sink=lambda now, event, commands: heard.append(event),  # noqa: B023
        )
        assert sum(isinstance(event, m.SessionExpected) for event in heard) == (1 if advice_s else 0)
        figures[advice_s] = result.reused
    assert figures[0.0].get("ssd", 0) > 100
    assert figures[5.0].get("ssd", 0) == 0
    assert sum(figures[5.0].values()) == sum(figures[0.0].values())
