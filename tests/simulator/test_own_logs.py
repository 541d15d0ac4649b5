"""Traces from what our own system wrote: batch results and event logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.results import ResultWriter, Row
from policies import messages as m
from policies.eventlog import Entry, Header, Record, write_line
from policies.simulator.readers import read_trace
from policies.simulator.shaping import with_private_blocks
from storage.keys import KeySpace, chain
from tests.simulator.files import fault, write_lines
from tests.simulator.invariants import check, extends, num_common

# --- batch results ----------------------------------------------------------------------------------------------------


def row(session: str, turn: int, prompt: int, answer: int, at: float = 0.0, took: float = 2.0, **more: Any) -> Row:
    return Row(
        conversation_id=session,
        turn=turn,
        where=f"f.jsonl:{turn + 1}",
        prompt_tokens=prompt,
        answer="",
        answer_token_ids=list(range(answer)),
        finish_reason="stop",
        submitted_at=at,
        end_to_end_s=took,
        **more,
    )


def results(folder: Path, rows: Sequence[Row]) -> Path:
    with ResultWriter(folder, {}, resume=False) as writer:
        for one in rows:
            writer.write(one)
    return folder


def test_batch_results_are_a_trace(tmp_path: Path) -> None:
    rows = [
        row("b", 0, 30, 3, at=1001.0),
        row("a", 0, 20, 5, at=1000.0, took=4.0),
        row("a", 1, 40, 6, at=1010.0),
        row("b", 1, 50, 7, at=1002.0),  # sooner than the answer was there
    ]
    folder = results(tmp_path / "run7", rows)
    trace = read_trace(folder)
    check(trace)
    assert (trace.name, trace.block_tokens) == ("run7", 0)
    assert trace == read_trace(folder / "turns.jsonl")
    figures = [(r.arrival_s, r.input_tokens, r.output_tokens, r.parent, r.think_s) for r in trace]
    assert figures == [
        (0.0, 20, 5, None, None),
        (1.0, 30, 3, None, None),
        (2.0, 50, 7, 1, 0.0),
        (10.0, 40, 6, 0, 6.0),
    ]
    blocks = with_private_blocks(trace, 8).requests
    assert extends(blocks[3], blocks[0], 8)
    assert len(read_trace(folder, limit=2)) == 2


def test_failed_turns_are_left_out(tmp_path: Path) -> None:
    failed = row("a", 1, 0, 0, at=11.0, error="out of memory")
    trace = read_trace(results(tmp_path, [row("a", 0, 20, 5, at=10.0), failed, row("a", 2, 60, 5, at=20.0)]))
    assert [(r.turn, r.parent, r.think_s) for r in trace] == [(0, None, None), (2, 0, 8.0)]
    assert "only failed turns" in fault(write_lines(tmp_path / "turns.jsonl", [failed.to_dict()]))


def test_without_submission_times_nobody_thinks(tmp_path: Path) -> None:
    trace = read_trace(results(tmp_path, [row("a", 0, 9, 1, took=4.0), row("b", 0, 9, 1), row("a", 1, 19, 1)]))
    assert [(r.arrival_s, r.turn, r.think_s) for r in trace] == [(0.0, 0, None), (0.0, 0, None), (4.0, 1, 0.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation_id": None}, ":3: no conversation_id"),
        ({"turn": "x"}, ":3: turn is 'x'"),
        ({"turn": 1}, ":3: turn 1 of 'a' comes after turn 1 in row 2"),
        ({"prompt_tokens": 0}, ":3: prompt_tokens is 0"),
        ({"submitted_at": 0.0}, ":3: submitted_at is missing, other turns have it"),
        ({"submitted_at": float("nan")}, ":3: submitted_at is nan"),
        ({"end_to_end_s": -1}, ":3: end_to_end_s is -1"),
    ],
)
def test_a_bad_result_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [row("a", turn, 9 + turn, 1, at=10.0 + turn).to_dict() for turn in range(3)]
    assert message in fault(write_lines(tmp_path / "turns.jsonl", [*rows[:2], {**rows[2], **change}]))


# --- event logs -------------------------------------------------------------------------------------------------------

C = 8
ROOT = KeySpace(model="m", tokenizer="t", dtype="float32").root()
SYSTEM, HELLO, ANSWER, MORE = list(range(11)), [50, 51, 52, 53], [60, 61, 62, 63, 64, 65], [70, 71]


def turn(turn_id: str, session: str, tokens: list[int], cuts: Sequence[int] = (), **more: Any) -> m.Turn:
    marks = tuple(m.Mark(end, key) for end, key in chain(ROOT, tokens, C, cuts))
    return m.Turn(
        turn_id=turn_id, session_id=session, prompt=marks, num_prompt_tokens=len(tokens), max_new_tokens=100, **more
    )


def saved(session: str, start: int, end: int) -> m.ChunksReady:
    info = m.ChunkInfo(key="k", parent=None, start=start, end=end, num_bytes=1, marks=(m.Mark(end, "k"),))
    return m.ChunksReady(replica_id="r", node_id="n", session_id=session, chunks=(info,))


def log(path: Path, *lives: Sequence[tuple[float, m.Event]]) -> Path:
    """Each life begins 100 s after the one before."""
    records: list[Record] = []
    for number, life in enumerate(lives):
        records.append(Header(config=m.SchedulerConfig(), began_unix_s=1e9 + 100 * number))
        records += [Entry(now=now, event=event, commands=()) for now, event in life]
    path.write_bytes(b"".join(map(write_line, records)))
    return path


FIRST = SYSTEM + HELLO
SECOND = [*FIRST, *ANSWER, *MORE]
LIFE: list[tuple[float, m.Event]] = [
    (7.0, m.Tick()),
    (10.0, m.TurnSubmitted(turn("t1", "a", FIRST, cuts=[11]))),
    (10.5, m.TurnSubmitted(turn("t2", "b", [*SYSTEM, 90, 91], cuts=[11], priority=3))),
    (11.0, m.TurnSubmitted(turn("t1", "a", FIRST, cuts=[11]))),  # another attempt
    (12.0, saved("a", 0, 8)),
    (12.5, saved("a", 8, 16)),
    (12.6, saved("a", 16, 20)),  # 15 of the prompt and 5 of 6 of the answer
    (13.0, m.TurnFinished(turn_id="t1", replica_id="r")),
    (20.0, m.TurnSubmitted(turn("t3", "a", SECOND, cuts=[11, 15, 20]))),
]


def test_an_event_log_is_a_trace(tmp_path: Path) -> None:
    later: list[tuple[float, m.Event]] = [
        (500.0, m.Tick()),
        (502.0, m.TurnSubmitted(turn("t4", "b", [*SYSTEM, 90, 91]))),
    ]
    trace = read_trace(log(tmp_path / "events.jsonl", LIFE, later))
    check(trace)
    assert (trace.name, trace.block_tokens) == ("events", C)
    figures = [(r.arrival_s, r.session_id, r.turn, r.parent, r.think_s) for r in trace]
    assert figures == [
        (0.0, 0, 0, None, None),
        (0.5, 1, 0, None, None),
        (10.0, 0, 1, 0, 7.0),
        (99.0, 1, 0, None, None),  # t2 never ended
    ]
    assert [(r.input_tokens, r.output_tokens) for r in trace] == [(15, 6), (13, 100), (23, 100), (13, 100)]
    t1, t2, t3, t4 = trace.requests
    assert (num_common(t1, t2), num_common(t1, t3), list(t2.blocks)) == (1, 1, list(t4.blocks))
    assert t2.priority == 3
    assert len(read_trace(tmp_path / "events.jsonl", limit=2)) == 2


def test_an_answer_is_no_longer_than_its_follow_up_has_room_for(tmp_path: Path) -> None:
    without = [(now, event) for now, event in LIFE if not isinstance(event, m.ChunksReady)]
    assert read_trace(log(tmp_path / "e.jsonl", without)).requests[0].output_tokens == len(SECOND) - len(FIRST)


def test_a_turn_follows_the_latest_one_that_has_ended(tmp_path: Path) -> None:
    def ended(turn_id: str) -> m.Event:
        return m.TurnFinished(turn_id=turn_id, replica_id="r")

    third, fourth = turn("t5", "a", [*SECOND, 1, 2, 3]), turn("t6", "a", [*SECOND, 4])
    more = [(25.0, ended("t3")), (30.0, m.TurnSubmitted(third)), (31.0, m.TurnSubmitted(fourth))]
    trace = read_trace(log(tmp_path / "e.jsonl", [*LIFE, *more]))
    assert [(r.parent, r.turn, r.think_s) for r in trace][3:] == [(2, 2, 5.0), (2, 2, 6.0)]


def test_marks_between_chunks_are_not_taken_for_their_ends(tmp_path: Path) -> None:
    tokens, cuts = list(range(24)), range(4, 24, 4)
    life = [(1.0, m.TurnSubmitted(turn("t1", "a", tokens, cuts=cuts))), (2.0, saved("a", 0, 8))]
    assert read_trace(log(tmp_path / "e.jsonl", life)).block_tokens == 8


def test_the_size_of_chunks_is_found_or_asked_for(tmp_path: Path) -> None:
    short = log(tmp_path / "e.jsonl", LIFE[:5])
    assert "too short to tell the size of chunks" in fault(short)
    assert read_trace(short, format="events:block_tokens=8").block_tokens == 8
    assert ":3: its prompt has no mark at token 4" in fault(short, format="events:block_tokens=4")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    path = log(tmp_path / "e.jsonl", LIFE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # a killed process
    assert len(read_trace(path, format="events:block_tokens=8")) == 2
    path.write_bytes(whole.replace(b'"num_prompt_tokens":13', b'"num_prompt_tokens":"13"'))
    assert ":4: " in fault(path)
    path.write_bytes(json.dumps({"event_log": 99}).encode() + b"\n")
    assert ":1: written in version 99" in fault(path)
    assert "has no requests" in fault(log(tmp_path / "f.jsonl", [(1.0, m.Tick())]))
