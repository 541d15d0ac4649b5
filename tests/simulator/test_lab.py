"""The laboratory's work: names, set-ups, jobs, hit rates between LRU and the oracle, logs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.eviction import Lru
from policies.messages import Tier
from policies.simulator.lab import logs
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.jobs import Outcome, run_all, run_one
from policies.simulator.lab.naming import LRU, ORACLE, Size, parse_numbers, parse_size, policy_path, short_name
from policies.simulator.lab.score import faults_of, look_into, mean_regrets
from policies.simulator.lab.source import Source
from policies.simulator.lab.timed import TimedJob, bytes_moved, timed_jobs, timed_rows
from policies.simulator.lab.untimed import HitRateJob, hit_rate_jobs, hit_rate_rows, levels_of, regret
from policies.simulator.lab.wanted import SETUPS, Wanted
from policies.simulator.replay import Level

ZIPF = Source(text="zipf:sessions=30,seed=2")
CHAT = Source(text="chat:sessions=8,seed=2")


class Breaks(Lru):
    """Understands nothing."""

    def add(self, *_: Any) -> None:
        raise RuntimeError("no idea")


class Strange(Lru):
    """Names what is not there."""

    def victims(self, *_: Any) -> list[str]:
        return ["nope"]


class Slow(Lru):
    """Thinks for longer than it may."""

    def victims(self, *arguments: Any) -> Any:
        end = time.thread_time() + 0.15
        while time.thread_time() < end:
            pass
        return super().victims(*arguments)


class Lacks:
    """Has no verb but one."""

    def add(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64GiB", Size(64 * 2**30, "bytes")),
        ("1.5TB", Size(1.5e12, "bytes")),
        ("1e9", Size(1e9, "bytes")),
        ("0", Size(0, "bytes")),
        ("1Mtok", Size(1e6, "tokens")),
        ("500 tokens", Size(500, "tokens")),
        ("5%", Size(0.05, "share")),
    ],
)
def test_sizes(text: str, size: Size) -> None:
    assert parse_size("--dram", text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "5XB", "1.2.3GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(LabError, match="--dram is"):
        parse_size("--dram", text)


def test_numbers_are_once_and_ascending() -> None:
    assert parse_numbers("--capacity", "10,1%,10", 100) == [1.0, 10.0]
    for text in ("0", "101", "x", "", "nan"):
        with pytest.raises(LabError, match="--capacity"):
            parse_numbers("--capacity", text, 100)


def test_policies_by_name() -> None:
    assert policy_path("eviction", "Lru") == LRU
    assert policy_path("eviction", LRU) == LRU
    assert short_name("folder/file.py:Mine(n=1)") == "file.py:Mine(n=1)"
    assert short_name(LRU) == "Lru"
    with pytest.raises(LabError, match="has no class 'Nope'"):
        policy_path("eviction", "Nope")
    with pytest.raises(LabError, match="has no remove, victims"):
        policy_path("eviction", f"{__name__}:Lacks")


def test_sources() -> None:
    assert len(replace(ZIPF, limit=5).load()) == len(replace(ZIPF, max_turns=5).load()) == 5
    with pytest.raises(LabError, match="unknown parameter"):
        Source(text="chat:x=1").load()
    with pytest.raises(LabError, match="choose 1 or more"):
        replace(ZIPF, limit=0).load()


@pytest.mark.parametrize("name", SETUPS)
def test_wishes_change_named_set_ups(name: str) -> None:
    trace = ZIPF.load()
    wanted = Wanted(setup=name, load=1.3, nodes=2, dram=Size(1e9, "bytes"), ssd=Size(0, "bytes"), warm_up=0.1)
    setup = wanted.build(trace)
    assert (setup.offered_load, setup.num_nodes, setup.warm_up) == (1.3, 2, 0.1)
    assert setup.tier_bytes == {Tier.DRAM: 10**9}
    assert setup.chunk_tokens % trace.block_tokens == 0
    assert Wanted(setup=name, load="recorded").build(trace).offered_load is None


def test_shares_are_of_the_footprint() -> None:
    trace = ZIPF.load()
    setup = Wanted(dram=Size(0.5, "share"), model="llama-3-8b").build(trace)
    assert setup.tier_bytes[Tier.DRAM] == int(0.5 * trace.footprint_tokens * setup.model.kv_bytes_per_token)


@pytest.mark.parametrize("level", Level)
def test_hit_rates_lie_between_nothing_and_the_oracle(level: Level) -> None:
    jobs = hit_rate_jobs(ZIPF, [level], [10, 100], ["policies.eviction:Fifo"])
    small, full = hit_rate_rows(jobs, [run_one(job) for job in jobs])
    fifo = small["policies"]["policies.eviction:Fifo"]
    assert 0 < small["lru"] < small["oracle"] < full["oracle"]
    assert fifo["hit_rate"] < small["oracle"]
    assert fifo["regret"] == pytest.approx(regret(fifo["hit_rate"], small["lru"], small["oracle"]))
    assert full["lru"] == full["oracle"]
    assert full["policies"]["policies.eviction:Fifo"]["regret"] is None
    assert list(mean_regrets([small, full])[str(level)].values()) == [fifo["regret"]]


def test_regret() -> None:
    assert regret(0.3, 0.2, 0.4) == pytest.approx(0.5)
    assert regret(0.1, 0.2, 0.4) == pytest.approx(-0.5)
    assert regret(0.2, 0.2, 0.2) is regret(None, 0.1, 0.2) is None


def test_levels() -> None:
    trace = ZIPF.load()
    assert levels_of(trace) == [Level.BLOCK, Level.SESSION]
    alone = [replace(request, parent=None) for request in trace]
    assert levels_of(replace(trace, requests=alone)) == [Level.BLOCK]
    assert levels_of(replace(trace, requests=alone, block_tokens=0)) == [Level.SESSION]


def test_the_whole_score_of_a_run() -> None:
    source = Source(text="chat:sessions=15,seed=2,window_tokens=0")
    jobs = timed_jobs(source, [Wanted(dram=Size(0.2, "share"), ssd=Size(0, "bytes"))], [], 0)
    lru, oracle = timed_rows(jobs, [run_one(job) for job in jobs])
    assert (lru["policy"], oracle["policy"]) == (LRU, ORACLE)
    assert 0 < lru["hit_rate"] < oracle["hit_rate"]
    assert (lru["regret"], oracle["regret"], lru["dram_share"]) == (0, 1, 1)
    assert lru["bytes_moved"] > 0
    assert lru["capacity_percent"] == 20
    assert sum(lru["reused"].values()) + sum(lru["recomputed"].values()) == lru["input_tokens"]


def test_bytes_are_counted_once() -> None:
    assert bytes_moved({"saved": 1, "demoted.ssd": 2, "fetched.dram": 4, "loaded.dram": 8, "network": 16}) == 15
    assert bytes_moved({"dropped.dram": 1, "refused.save.full": 1}) == 0


@pytest.mark.parametrize("job_type", [HitRateJob, TimedJob])
def test_a_policy_that_breaks_is_named_and_the_others_run(job_type: type) -> None:
    broken = f"{__name__}:Breaks"
    if job_type is HitRateJob:
        jobs: list[Any] = hit_rate_jobs(ZIPF, [Level.BLOCK], [10], [broken], is_strict=True)
    else:
        jobs = timed_jobs(CHAT, [Wanted(is_strict=True)], [broken], 0)
    told: list[int] = []
    outcomes = run_all(jobs, 1, lambda words, done, of, share: told.append(done))
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    assert "Breaks" in outcomes[1].error
    assert told[-1] == 3


@pytest.mark.parametrize("name", ["Breaks", "Strange"])
@pytest.mark.parametrize("level", list(Level))
def test_without_strict_the_safe_default_decides_and_the_fault_is_named(name: str, level: Level) -> None:
    jobs = hit_rate_jobs(ZIPF, [level], [10], [f"{__name__}:{name}"])
    (row,) = hit_rate_rows(jobs, [run_one(job) for job in jobs])
    assert row["policies"][f"{__name__}:{name}"]["hit_rate"] > 0
    assert any(f"{name}." in words and __file__ in words for words in faults_of([row]))


def test_a_slow_policy_is_named() -> None:
    outcome = run_one(TimedJob(source=CHAT, wanted=Wanted(dram=Size(0.05, "share")), eviction=f"{__name__}:Slow"))
    assert any("more than policy_limit_s" in text and __file__ in text for text in faults_of([outcome.found]))


def test_a_folder_is_judged_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "README.md").write_text("words")
    found = look_into(str(tmp_path))
    assert [Path(source.text).name for source, _ in found.traces] == ["a.jsonl"]
    assert [Path(path).name for path in found.skipped] == ["broken.parquet"]
    with pytest.raises(LabError, match="not a folder"):
        look_into(str(tmp_path / "none"))


def test_a_recorded_run_is_relived(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    made = logs.record(path, TimedJob(source=CHAT, wanted=Wanted(policies={"eviction": LRU})))
    found = logs.relived(path)
    assert found["is_equal"]
    assert made["num_events"] == found["num_events"] > 100
    with pytest.raises(LabError, match="exists"):
        logs.record(path, TimedJob(source=CHAT, wanted=Wanted()))
    anew = logs.decided_anew(path, {"prefetch": "policies.prefetch:Off"})
    assert anew["num_events"] == made["num_events"]
    assert anew["recorded"]["commands"]["Dispatch"] == len(CHAT.load())
    assert not logs.decided_anew(path, {"eviction": LRU})["num_events_answered_otherwise"]


def test_an_outcome_knows_whose_fault_it_is() -> None:
    assert run_one(TimedJob(source=Source(text="chat:x=1"), wanted=Wanted())).is_input
    assert run_one(TimedJob(source=CHAT, wanted=Wanted(hardware="abacus"))).is_input
    assert Outcome(found={"a": 1}).error == ""
