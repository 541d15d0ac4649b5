"""Event logs of a live cluster: what it did can be relived, with the same commands, also after a restart."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import bringup
from cluster.batch import Listener, run_on
from cluster.config import Config, ConfigError
from cluster.results import Row
from policies.eventlog import Entry, read_log
from policies.messages import SchedulerConfig
from policies.scheduler import Scheduler
from policies.simulator.relive import decide_anew, relive
from tests.cluster.jobs import KIB, config_for, options_for

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

NUM_CONVERSATIONS, NUM_TURNS = 4, 3

MOODY = """
from policies.eviction import Lru

class Moody(Lru):
    '''Cannot decide now and then.'''

    def __init__(self, patience: int = 99) -> None:
        super().__init__()
        self.patience, self.asked = patience, 0

    def victims(self, *arguments):
        self.asked += 1
        if self.asked % self.patience == 0:
            raise RuntimeError("not in the mood")
        return super().victims(*arguments)
"""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations whose KV is more than the little DRAM below."""
    file = tmp_path_factory.mktemp("input") / "chats.jsonl"
    lines = []
    for i in range(NUM_CONVERSATIONS):
        messages = [
            {"role": "user", "content": f"Question {turn} of traveller {i}: what about place {i * 7 + turn}? " * 6}
            for turn in range(NUM_TURNS)
        ]
        lines.append(json.dumps({"id": f"chat-{i}", "messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file


def config_that_records(model: Path, log: Path, ssd: Path, **scheduler: Any) -> Config:
    """One turn runs at a time: the others wait, and their chunks are fetched for them."""
    config = config_for(model, keep_finished=False, dram_bytes=600 * KIB, ssd_url=str(ssd), ssd_bytes=64 << 20)
    return replace(
        config,
        model=replace(config.model, max_running_turns=1),
        cluster=replace(config.cluster, record=str(log)),
        scheduler=replace(config.scheduler, **scheduler),
    )


@dataclass(frozen=True)
class Recording:
    log: str
    policy: Path
    undisturbed: dict[str, Any]  # the report of a batch,
    disturbed: dict[str, Any]  # and of one more, during which the scheduler died

    def commands(self) -> Counter[str]:
        entries = [record for _, record in read_log(self.log) if isinstance(record, Entry)]
        return Counter(type(command).__name__ for entry in entries for command in entry.commands)


@pytest.fixture(scope="module")
def recording(local_ray: None, small_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """With a policy of one's own, from a file, that is not always fit to decide."""
    folder = tmp_path_factory.mktemp("recording")
    log, policy, num_done = folder / "events.jsonl", folder / "moody.py", 0
    policy.write_text(MOODY)
    config = config_that_records(small_model, log, folder / "ssd", eviction=f"{policy}:Moody(patience=3)")

    def turn_done(_: Row) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == 4:
            threading.Thread(target=lambda: ray.kill(cluster.scheduler, no_restart=False)).start()

    with bringup.running(config) as cluster:
        undisturbed = run_on(cluster, options_for(chats, folder / "first", concurrency=4), Listener())
        harmful = Listener(turn_done=turn_done)
        disturbed = run_on(cluster, options_for(chats, folder / "again", concurrency=4), harmful)
    return Recording(str(log), policy, undisturbed, disturbed)


def test_a_live_cluster_is_relived_with_the_same_commands(recording: Recording) -> None:
    """Every life of its scheduler, the killed one too."""
    result = relive(read_log(recording.log))
    assert result.divergence is None, str(result)
    assert (result.num_lives, result.cut_short) == (2, [])
    commands = recording.commands()
    assert {"Dispatch", "Save", "Fetch", "Demote", "Drop"} <= commands.keys()
    assert result.num_commands == commands.total()
    assert commands["Dispatch"] >= 2 * NUM_CONVERSATIONS * NUM_TURNS


def test_recording_disturbs_nothing_and_is_reported(recording: Recording) -> None:
    for report in (recording.undisturbed, recording.disturbed):
        assert (report["turns"], report["failed_turns"]) == (NUM_CONVERSATIONS * NUM_TURNS, 0)
        assert report["unaccounted_tokens"] == 0
        assert report["recording"]["problem"] == ""
        assert report["recording"]["path"] == recording.log
        assert report["recording"]["num_events"] > 2 * report["turns"]


def test_a_policy_that_raises_is_replaced_and_reported(recording: Recording) -> None:
    report = recording.undisturbed
    assert report["policy_faults"]["Moody.victims"] > 0
    (line,) = (line for line in report["policy_fault_texts"] if "raised" in line)
    where = f"{recording.policy}:14"
    assert line.startswith(f"Moody.victims ({where}) raised RuntimeError: not in the mood; the safe default decided")


def test_other_policies_hear_the_same_events(recording: Recording) -> None:
    def with_fifo(config: SchedulerConfig) -> Scheduler:
        return Scheduler(replace(config, eviction="policies.eviction:Fifo"))

    result = decide_anew(read_log(recording.log), with_fifo)
    assert result.recorded.commands == recording.commands()
    assert result.recorded.reused_tokens.total() > 0
    assert result.decided.commands["Dispatch"] > 0
    assert not result.policy_faults


def test_a_log_that_cannot_be_written_is_told_before_anything_runs(small_model: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    config = config_that_records(small_model, notes, tmp_path / "ssd")
    with (
        pytest.raises(ConfigError, match=r"cluster.record: cannot record to .*notes.txt: it holds something else"),
        bringup.running(config),
    ):
        pass
    assert notes.read_text() == "precious"
