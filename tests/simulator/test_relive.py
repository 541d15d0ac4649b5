"""A recorded log, relived by the real scheduler: the same commands, or the first line that differs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from policies import messages as m
from policies.eventlog import Entry, Header, Record, Stopped, read_log, write_line
from policies.eviction import Lru
from policies.messages import SchedulerConfig
from policies.scheduler import Scheduler
from policies.simulator.relive import Comparison, decide_anew, relive
from tests.policies.driver import Driver, only
from tests.policies.parts import Setup
from tests.policies.runs import run
from tests.policies.texts import key_of, text
from tests.policies.world import World

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SchedulerConfig(low_watermark=0.5, high_watermark=0.8)


def record(scheduler: Scheduler, records: list[Record]) -> None:
    """From now on everything the scheduler hears and answers is in `records`, as actors/scheduler.py would have it."""
    records.append(Header(config=scheduler.config))
    handle = scheduler.handle

    def recorded(event: m.Event, now: float) -> list[m.Command]:
        commands = handle(event, now)
        benched = scheduler.board.guard.last_benched
        records.append(Entry(now=now, event=event, commands=tuple(commands), benched=benched))
        return commands

    scheduler.handle = recorded  # type: ignore[method-assign]


def world_log(seed: int, *, config: SchedulerConfig = CONFIG, is_reliable: bool = False) -> list[Record]:
    """What happened in a small cluster with little room: turns, evictions, losses, restarts."""
    setup = Setup(
        config=config,
        num_nodes=3,
        num_replicas=4,
        dram_bytes=200,
        ssd_bytes=300,
        object_bytes=400,
        is_reliable=is_reliable,
    )
    world, records = World(setup, Random(seed).randbytes(1500)), list[Record]()
    record(world.scheduler, records)
    run(world)
    return records


def numbered(records: Sequence[Record]) -> list[tuple[int, Record]]:
    return list(enumerate(records, 1))


@pytest.fixture(scope="module")
def log() -> list[Record]:
    return world_log(1)


# --- the same ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_relived_log_gives_the_same_commands(seed: int) -> None:
    records = world_log(seed, is_reliable=seed % 2 == 0)
    result = relive(numbered(records))
    assert result.divergence is None, str(result)
    assert result.num_events == len(records) - 1
    assert result.num_commands == sum(len(record.commands) for record in records if isinstance(record, Entry))
    assert result.num_commands > 100
    assert str(result).endswith("the same commands")


RELIVE = """
import sys
from policies.eventlog import read_log
from policies.simulator.relive import relive
result = relive(read_log(sys.argv[1]))
print(result)
sys.exit(result.divergence is not None)
"""


def test_another_process_with_other_hashes_gives_the_same_commands(tmp_path: Path) -> None:
    """Sets of strings iterate in another order in every process: no command may depend on it."""
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"".join(write_line(one) for seed in (5, 6, 7) for one in world_log(seed)))
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", RELIVE, str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "in 3 lives" in done.stdout


def test_lives_are_apart(log: list[Record], tmp_path: Path) -> None:
    """Every header is a new scheduler; the killed process before it had recorded less than it did."""
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"".join(map(write_line, [*log[:50], *log, *log[:3], Stopped(stopped="max_bytes: full")])))
    result = relive(read_log(str(file)))
    assert (result.num_lives, result.divergence) == (3, None)
    assert result.num_events == 49 + len(log) - 1 + 2
    line = 50 + len(log) + 3 + 1
    assert result.cut_short == [f"life 3 was recorded up to line {line} only: max_bytes: full"]


# --- not the same -----------------------------------------------------------------------------------------------------


def test_another_policy_diverges_and_is_reported(log: list[Record]) -> None:
    def with_fifo(config: SchedulerConfig) -> Scheduler:
        return Scheduler(replace(config, eviction="policies.eviction:Fifo"))

    result = relive(numbered(log), with_fifo)
    found = result.divergence
    assert found is not None
    assert found.answered != found.recorded
    recorded = log[found.line - 1]
    assert isinstance(recorded, Entry)
    assert (found.event, found.recorded, found.now) == (recorded.event, recorded.commands, recorded.now)
    assert result.num_events == found.line - 1, "it ends there"
    assert f"diverges at line {found.line} (life 1, at " in str(result)


def test_the_first_wrong_command_is_named(log: list[Record]) -> None:
    line = next(n for n, one in numbered(log) if isinstance(one, Entry) and len(one.commands) > 1)
    entry = log[line - 1]
    assert isinstance(entry, Entry)
    forged = m.Drop(node_id="n0", chunk="k-forged", tier=m.Tier.SSD)
    commands = (entry.commands[0], forged, *entry.commands[2:])
    result = relive(numbered([*log[: line - 1], replace(entry, commands=commands), *log[line:]]))
    assert f"line {line} " in str(result)
    assert f"command 2: recorded {forged}, got {entry.commands[1]}" in str(result)
    shorter = relive(numbered([*log[: line - 1], replace(entry, commands=entry.commands[:1]), *log[line:]]))
    assert f"command 2: recorded none, got {entry.commands[1]}" in str(shorter)


def test_a_policy_that_is_not_here_is_named_with_its_line() -> None:
    header = Header(config=SchedulerConfig(eviction="nowhere.at_all:Mine"))
    with pytest.raises(ValueError, match=r"line 1: the recorded scheduler cannot be made here: eviction policy"):
        relive(numbered([header]))


def test_an_error_that_was_recorded_is_relived() -> None:
    nonsense = Entry(now=1.0, event=m.CommandFailed(command=m.Tick(), reason="?"), commands=())  # type: ignore[arg-type]
    bad = replace(nonsense, event=m.TurnSubmitted(turn=None), error="AttributeError: it broke")  # type: ignore[arg-type]
    result = relive(numbered([Header(config=CONFIG), nonsense, bad]))
    assert result.divergence is not None
    assert "recorded AttributeError: it broke, got AttributeError: 'NoneType' object" in str(result)
    with pytest.raises(AttributeError) as caught:
        relive(numbered([Header(config=CONFIG), nonsense, replace(bad, error="")]))
    assert caught.value.__notes__ == ["while reliving line 3 of the event log"]


# --- slow policies ----------------------------------------------------------------------------------------------------


class Dawdler(Lru):
    """Takes its time, and evicts the youngest."""

    now = 0.0

    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        Dawdler.now += 1.0
        return list(reversed(super().victims(place, 1000, outlook)))[:count]


def test_a_benched_policy_is_benched_at_the_same_event() -> None:
    config = SchedulerConfig(
        eviction=f"{__name__}:Dawdler", write_through=False, low_watermark=0.6, high_watermark=0.8, policy_limit_s=0.5
    )
    driver, records = Driver(config), list[Record]()
    driver.scheduler = Scheduler(config, stopwatch=lambda: Dawdler.now)
    record(driver.scheduler, records)
    driver.join(dram=200)
    driver.replica()
    for number in range(1, 12):
        driver.store(text(number, 4))
    dropped = [drop.chunk for drop in only(driver.log, m.Drop)]
    oldest = key_of(text(1, 4))
    assert dropped[0] != oldest, "the policy decided"
    assert oldest in dropped, "the safe default decided"
    benched = [one.benched for one in records if isinstance(one, Entry) and one.benched]
    assert benched == [(f"{__name__}:Dawdler.victims",)]
    assert relive(numbered(records)).divergence is None, "although nobody measures time now"
    forgetful = [replace(one, benched=()) if isinstance(one, Entry) else one for one in records]
    assert relive(numbered(forgetful)).divergence is not None


# --- deciding anew ----------------------------------------------------------------------------------------------------


def compare(log: list[Record], **changes: Any) -> Comparison:
    return decide_anew(numbered(log), lambda config: Scheduler(replace(config, **changes)))


def test_the_same_policies_decide_the_same_anew(log: list[Record]) -> None:
    result = compare(log)
    assert result.decided == result.recorded
    assert (result.num_events, result.num_events_answered_otherwise) == (len(log) - 1, 0)
    dispatches = [
        command for one in log if isinstance(one, Entry) for command in one.commands if isinstance(command, m.Dispatch)
    ]
    assert result.recorded.commands["Dispatch"] == len(dispatches) > 0
    assert result.recorded.reused_tokens.total() == sum(dispatch.plan.num_reused for dispatch in dispatches)
    assert set(result.recorded.reused_tokens) <= {"dram", "ssd", "object"}
    assert "never_stored" in result.recorded.recomputed_tokens


def test_other_policies_are_counted(log: list[Record]) -> None:
    without = compare(log, prefetch="policies.prefetch:Off", write_through=False)
    assert without.num_events_answered_otherwise > 0
    assert without.decided.commands["Demote"] < without.recorded.commands["Demote"]
    assert not without.policy_faults


def test_a_file_of_ones_own_is_a_policy_too(log: list[Record], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from policies.eviction import Lru\n\n\nclass Mine(Lru):\n    victims = None\n")
    with pytest.raises(ValueError, match=r"line 1: .*Mine has no victims"):
        compare(log, eviction=f"{file}:Mine")
    file.write_text("from policies.eviction import Lru\n\n\nclass Mine(Lru):\n    pass\n")
    assert compare(log, eviction=f"{file}:Mine").decided == compare(log, eviction="policies.eviction:Lru").decided
