"""Readers of public traces: Mooncake and Azure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from policies.simulator.readers import read_trace
from tests.simulator.files import fault, line, write_lines
from tests.simulator.invariants import check, check_blocks, shared_data

# --- Mooncake ---------------------------------------------------------------------------------------------------------


def test_mooncake_sessions_are_found_by_their_blocks(tmp_path: Path) -> None:
    lines = [
        line(0, 1100, [0, 1, 2]),  # 0: two full blocks
        line(0, 600, [0, 3]),  # 1: the system prompt alone
        line(1500, 1700, [0, 1, 4, 5]),  # 2: follows 0
        line(2000, 2100, [0, 1, 4, 6, 7]),  # 3: follows 2
        line(2500, 700, [0, 8]),  # 4: one block in common is no conversation
        line(3000, 1100, [0, 1, 9]),  # 5: 0 again
        line(4000, 1030, [0, 1, 10]),  # 6: 5 has the same full blocks as 0, and is later
        line(3500, 2000, [0, 1, 4, 11]),  # 7: the longest prefix is that of 2; arrives before 6
    ]
    trace = read_trace(write_lines(tmp_path / "conversation_trace.jsonl", lines))
    check(trace)
    assert (trace.name, trace.block_tokens) == ("conversation_trace", 512)
    assert [request.request_id for request in trace] == list(range(8))
    assert [request.arrival_s for request in trace] == [0, 0, 1.5, 2, 2.5, 3, 3.5, 4]
    assert [request.parent for request in trace] == [None, None, 0, 2, None, 0, 2, 5]
    assert [request.session_id for request in trace] == [0, 1, 0, 0, 4, 0, 0, 0]
    assert [request.turn for request in trace] == [0, 0, 1, 2, 0, 1, 2, 2]
    loose = read_trace(tmp_path / "conversation_trace.jsonl", format="mooncake:min_shared_blocks=1")
    assert loose.requests[4].parent == 1


@pytest.mark.parametrize("name", ["mooncake_conversation_first_half", "mooncake_synthetic"])
def test_mooncake_sessions_are_those_of_the_shared_traces(tmp_path: Path, name: str) -> None:
    theirs = read_trace(shared_data("traces", f"{name}.parquet"))
    lines = [line(r.arrival_s * 1000, r.input_tokens, list(r.blocks), r.output_tokens) for r in theirs]
    ours = read_trace(write_lines(tmp_path / "t.jsonl", lines))
    assert len(ours) == len(theirs)
    check_blocks(ours)
    assert [(r.parent, r.turn, r.blocks) for r in ours] == [(r.parent, r.turn, r.blocks) for r in theirs]


BAD_LINES = [
    ("{not json\n", "not JSON"),
    ("[1, 2]\n", "a JSON list, not an object"),
    ({"input_length": 5, "output_length": 1, "hash_ids": [1]}, "timestamp is missing"),
    (line(float("nan"), 5, [1]), "timestamp is nan"),
    (line(-5, 5, [1]), "timestamp is -5"),
    (line(0, 5, [1], output=-1), "output_length is -1"),
    (line(0, 5, ["a"]), "hash_ids is not a list of block ids"),  # type: ignore[list-item]
    (line(0, 5, [2**63]), "hash_ids is not a list of block ids"),
    ({**line(0, 5, []), "hash_ids": None}, "hash_ids is not a list of block ids"),
    ({**line(0, 5, [1]), "input_length": "5"}, "input_length is '5'"),
    ({**line(0, 5, [1]), "input_length": True}, "input_length is True"),
    (
        line(0, 2000, [1, 2]),
        "2 blocks of 512 tokens do not fit an input of 2000 tokens: 3 (full ones) or 4 were expected",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, message: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", [line(0, 5, [1]), "\n", bad, line(9, 5, [2])])
    assert f":3: {message}" in fault(path, format="mooncake")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [line(0, 5, [1]), '{"timestamp": 3, "inp'])
    assert len(read_trace(path)) == 1


# --- Azure ------------------------------------------------------------------------------------------------------------


def azure(path: Path, rows: Sequence[str], header: str = "TIMESTAMP,ContextTokens,GeneratedTokens") -> Path:
    path.write_text("\r\n".join([header, *rows]) + "\r\n")
    return path


def test_azure_in_both_spellings(tmp_path: Path) -> None:
    old = azure(tmp_path / "a.csv", ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"])
    new = azure(
        tmp_path / "b.csv",
        ["2024-05-10 00:00:01+00:00,30,4", "2024-05-10 00:00:00.500000+00:00,20,0", "2024-05-10 01:00:01+01:00,40,5"],
    )
    trace = read_trace(old)
    assert trace.block_tokens == 0
    assert [(r.input_tokens, r.output_tokens) for r in trace] == [(374, 44), (396, 109)]
    assert trace.requests[1].arrival_s == pytest.approx(4.314579)
    trace = read_trace(new)
    check(trace)
    assert [(r.arrival_s, r.input_tokens) for r in trace] == [(0.0, 20), (0.5, 30), (0.5, 40)]
    assert len({request.session_id for request in trace}) == 3
    assert len(read_trace(new, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("yesterday,1,1", "TIMESTAMP is 'yesterday': write it as 2024-"),
        ("2024-05-10 00:00:00,1.5,1", "ContextTokens is 1.5: it must be a whole number"),
        ("2024-05-10 00:00:00,0,1", "ContextTokens is 0: it must be 1 or more"),
        ("2024-05-10 00:00:00,1,-1", "GeneratedTokens is -1"),
        ("2024-05-10 00:00:00,1,nan", "GeneratedTokens is nan"),
        ("2024-05-10 00:00:00,1,", "GeneratedTokens is ''"),
        ("2024-05-10 00:00:00,1", "2 fields instead of 3"),
    ],
)
def test_a_bad_azure_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = azure(tmp_path / "t.csv", ["2024-05-10 00:00:00,1,1", row])
    assert f":3: {message}" in fault(path)


def test_azure_without_rows_or_columns(tmp_path: Path) -> None:
    assert "has no requests" in fault(azure(tmp_path / "a.csv", []))
    path = azure(tmp_path / "b.csv", ["1,2"], header="TIMESTAMP,ContextTokens")
    assert ":1: no column GeneratedTokens" in fault(path, format="azure")
