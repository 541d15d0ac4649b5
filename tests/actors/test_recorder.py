"""The recorder: every event is in the file, and no trouble with the file is the scheduler's trouble."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors import recorder as recorder_module
from actors import scheduler as scheduler_module
from actors.recorder import Recorder, RecordPlan
from actors.scheduler import SchedulerActor
from policies import messages as m
from policies.eventlog import Entry, Header, Record, Stopped, read_log
from policies.scheduler import Scheduler
from policies.simulator.relive import relive

CONFIG = m.SchedulerConfig()
LOST = m.NodeLost("n1")


def recorder_for(file: Path, **plan: Any) -> Recorder:
    return Recorder(RecordPlan(path=str(file), **plan), CONFIG, began_unix_s=1.0)


def records_of(file: Path) -> list[Record]:
    return [record for _, record in read_log(str(file))]


def note(recorder: Recorder, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        recorder.note(float(number), LOST, [])


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to make files bigger, after writing the part that fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_noted_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "log"
    recorder = recorder_for(file)
    assert records_of(file) == [Header(config=CONFIG, began_unix_s=1.0)], "from the start"
    drop = m.Drop(node_id="n1", chunk="k", tier=m.Tier.SSD)
    recorder.note(1.5, LOST, [drop], ("some:Policy.verb",), "error")
    assert len(records_of(file)) == 1, "noting does not write"
    recorder.flush()
    entry = Entry(now=1.5, event=LOST, commands=(drop,), benched=("some:Policy.verb",), error="error")
    assert records_of(file)[1:] == [entry]
    recorder.note(2.0, LOST, [])
    recorder.close()
    recorder.note(3.0, LOST, [])
    recorder.flush()
    assert [record.now for record in records_of(file) if isinstance(record, Entry)] == [1.5, 2.0]
    size = file.stat().st_size
    host = socket.gethostname()
    assert recorder.state == {"path": str(file), "host": host, "num_events": 2, "num_bytes": size, "problem": ""}


def test_a_restart_goes_on_behind_a_new_header_and_without_the_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    first = recorder_for(file)
    note(first, 3)
    first.close()
    file.write_bytes(file.read_bytes()[:-10])
    second = recorder_for(file)
    note(second, 1, first=7)
    second.close()
    kinds = [record.now if isinstance(record, Entry) else type(record) for record in records_of(file)]
    assert kinds == [Header, 0.0, 1.0, Header, 7.0]


def test_a_header_torn_by_a_kill_is_written_anew(tmp_path: Path) -> None:
    for kept in (0, 1, 5, 40):
        file = tmp_path / f"log{kept}"
        recorder_for(file).close()
        file.write_bytes(file.read_bytes()[:kept])
        recorder_for(file).close()
        assert records_of(file) == [Header(config=CONFIG, began_unix_s=1.0)]


@pytest.mark.parametrize("step", [7, 1 << 16])
def test_the_last_line_is_found_however_long_it_is(tmp_path: Path, step: int) -> None:
    file = tmp_path / "log"
    for content, end in ((b"", 0), (b"abc", 0), (b"abc\n", 4), (b"abc\n" + b"x" * 100, 4), (b"a\nb\n" + b"x" * 6, 4)):
        file.write_bytes(content)
        with file.open("rb") as opened:
            assert recorder_module._end_of_last_line(opened.fileno(), step) == end


def test_events_noted_while_others_are_written_stay_in_order(tmp_path: Path) -> None:
    file = tmp_path / "log"
    recorder, is_done = recorder_for(file), threading.Event()

    def flush() -> None:
        while not is_done.is_set():
            recorder.flush()

    threads = [threading.Thread(target=flush) for _ in range(2)]
    for thread in threads:
        thread.start()
    note(recorder, 5000)
    is_done.set()
    for thread in threads:
        thread.join()
    recorder.close()
    assert [record.now for record in records_of(file)[1:] if isinstance(record, Entry)] == list(range(5000))


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_full_log_ends_with_a_line_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "log"
    recorder = recorder_for(file, max_bytes=2000)
    for first in range(0, 60, 7):
        note(recorder, 7, first)
        recorder.flush()
    recorder.close()
    *entries, last = records_of(file)[1:]
    assert last == Stopped(stopped="max_bytes: the log has its full size of 2,000")
    assert [entry.now for entry in entries if isinstance(entry, Entry)] == list(range(len(entries)))
    assert len(entries) == recorder.state["num_events"] > 5
    assert 1800 < file.stat().st_size < 2100
    assert "full size" in recorder.state["problem"]
    again = recorder_for(file, max_bytes=2000)
    assert "full size" in again.state["problem"]


def test_a_full_disk_ends_the_recording_at_a_whole_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "log"
    recorder = recorder_for(file)
    note(recorder, 3)
    recorder.flush()
    with files_of_at_most(file.stat().st_size + 200):
        note(recorder, 100, first=3)
        recorder.flush()
        note(recorder, 100, first=103)
        recorder.flush()
    recorder.close()
    *entries, last = records_of(file)[1:]
    assert [entry.now for entry in entries if isinstance(entry, Entry)] == [0, 1, 2], "whole flushes only"
    assert last == Stopped(stopped="[Errno 27] File too large"), "there was room for that"
    assert recorder.state["problem"] == "[Errno 27] File too large"
    assert [line for line in caplog.messages if "ends here, the scheduler goes on" in line] == caplog.messages


def test_a_disk_without_room_for_a_last_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    recorder = recorder_for(file)
    with files_of_at_most(file.stat().st_size + 10):
        note(recorder, 1)
        recorder.flush()
    assert records_of(file) == [Header(config=CONFIG, began_unix_s=1.0)]
    assert recorder.state["problem"]


def test_a_slow_disk_ends_the_recording_before_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_PENDING", 10)
    recorder = recorder_for(tmp_path / "log")
    note(recorder, 30)
    recorder.flush()
    note(recorder, 5)
    recorder.close()
    *entries, last = records_of(tmp_path / "log")[1:]
    assert len(entries) == 10, "without a gap"
    assert isinstance(last, Stopped)
    assert "too slow" in last.stopped


def test_what_cannot_be_written_ends_the_recording(tmp_path: Path) -> None:
    recorder = recorder_for(tmp_path / "log")
    recorder.note(0.0, m.NodeLost(object()), [])  # type: ignore[arg-type]
    recorder.flush()
    assert "cannot be written to an event log" in recorder.state["problem"]


def test_a_file_that_cannot_hold_a_log_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    problems = {
        notes: "something else than an event log",
        tmp_path: "Is a directory",
        Path("/dev/null"): "not a regular file",
        notes / "log": "exists|Not a directory",
    }
    for path, problem in problems.items():
        recorder = recorder_for(path)
        note(recorder, 1)
        recorder.flush()
        recorder.close()
        assert any(part in recorder.state["problem"] for part in problem.split("|")), recorder.state
    assert notes.read_text() == "precious"


def test_two_schedulers_do_not_mix_in_one_file(tmp_path: Path) -> None:
    first = recorder_for(tmp_path / "log")
    second = recorder_for(tmp_path / "log")
    assert "another scheduler is recording to it" in second.state["problem"]
    note(second, 1)
    second.close()
    note(first, 1)
    first.close()
    assert len(records_of(tmp_path / "log")) == 2


# --- in the scheduler's actor -----------------------------------------------------------------------------------------


def test_the_actor_records_what_it_hears_and_how_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log"
    exits: list[int] = []

    def breaks(scheduler: Scheduler, event: m.ReplicaLost) -> None:
        raise KeyError(event.replica_id)

    monkeypatch.setattr(Scheduler, "_on_replica_lost", breaks)
    monkeypatch.setattr(scheduler_module.os, "_exit", exits.append)
    joined = m.NodeJoined(node_id="n1", tiers=(m.TierSpec(tier=m.Tier.DRAM, budget_bytes=1000),))

    async def live() -> None:
        actor = SchedulerActor(CONFIG, silence_s=60.0, record=RecordPlan(path=str(file)))
        await actor.join_node(joined, None)
        await asyncio.sleep(4 * scheduler_module.TICK_S)
        assert len(records_of(file)) > 2, "written now and then"
        assert (await actor.snapshot())["recording"]["problem"] == ""
        await actor.report([m.ReplicaLost("r1"), m.Tick()])

    asyncio.run(live())
    assert exits == [1]
    header, first, *ticks, last = records_of(file)
    assert isinstance(header, Header)
    assert isinstance(first, Entry)
    assert isinstance(last, Entry)
    assert first.event == joined
    assert {type(tick.event) for tick in ticks if isinstance(tick, Entry)} == {m.Tick}
    assert last.error == "KeyError: 'r1'"
    assert relive(read_log(str(file))).divergence is None
