"""Reading traces: the Parquet format, telling formats apart, every fault named by file and row."""

from __future__ import annotations

import gzip
import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policies.simulator.generators import make_trace
from policies.simulator.readers import FORMATS, read_trace
from policies.simulator.trace import Trace, TraceError
from tests.simulator.files import fault, line, write_lines
from tests.simulator.invariants import check, shared_data

CHAT = make_trace("chat:sessions=20,seed=1")


def table_of(trace: Trace) -> dict[str, list[Any]]:
    """As the Parquet format has it."""
    return {
        "request_id": [request.request_id for request in trace],
        "arrival_s": [request.arrival_s for request in trace],
        "session_id": [request.session_id for request in trace],
        "turn": [request.turn for request in trace],
        "parent_request": [-1 if request.parent is None else request.parent for request in trace],
        "input_tokens": [request.input_tokens for request in trace],
        "output_tokens": [request.output_tokens for request in trace],
        "think_s": [request.think_s for request in trace],
        "block_tokens": [trace.block_tokens] * len(trace),
        "block_hashes": [list(request.blocks) for request in trace],
    }


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "some.chat.parquet", table_of(CHAT), row_group_size=17)
    assert read_trace(path) == replace(CHAT, name="some")
    assert read_trace(path, limit=40).requests == CHAT.requests[:40]
    assert read_trace(path.as_uri(), format="parquet").requests == CHAT.requests


def test_blocks_are_compact_and_whole_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.simulator.readers.parquet.BATCH_ROWS", 7)
    columns = table_of(CHAT)
    small = pa.array(columns["block_hashes"], pa.list_(pa.int32()))
    for hashes in (columns["block_hashes"], small):
        trace = read_trace(write_parquet(tmp_path / "t.parquet", {**columns, "block_hashes": hashes}))
        assert trace.requests == CHAT.requests
        assert all(isinstance(request.blocks, array) for request in trace)


def test_columns_that_may_be_left_out(tmp_path: Path) -> None:
    columns = table_of(CHAT)
    for name in ("think_s", "block_tokens", "block_hashes"):
        del columns[name]
    columns["parent_request"] = [None if parent == -1 else parent for parent in columns["parent_request"]]
    trace = read_trace(write_parquet(tmp_path / "t.parquet", {**columns, "tenant": ["a"] * len(CHAT)}))
    assert trace.block_tokens == 0
    assert trace.requests == tuple(replace(request, think_s=None, blocks=(), tenant="a") for request in CHAT)


def test_requests_are_put_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    columns = table_of(CHAT)
    backwards = {name: values[::-1] for name, values in columns.items()}
    assert read_trace(write_parquet(tmp_path / "t.parquet", backwards)).requests == CHAT.requests
    same_time = {name: values[:3] for name, values in columns.items()} | {
        "arrival_s": [0.0] * 3,
        "parent_request": [-1] * 3,
        "request_id": [5, 3, 4],
    }
    trace = read_trace(write_parquet(tmp_path / "t.parquet", same_time))
    assert [request.request_id for request in trace] == [5, 3, 4]


BAD_CELLS = [
    ("arrival_s", -1.0, ":8: arrival_s is -1.0: it must be a number, 0 or more"),
    ("arrival_s", float("nan"), ":8: arrival_s is nan"),
    ("arrival_s", None, ":8: arrival_s is missing"),
    ("think_s", float("inf"), ":8: think_s is inf"),
    ("input_tokens", 0, ":8: input_tokens is 0: it must be 1 or more"),
    ("output_tokens", -3, ":8: output_tokens is -3: it must be 0 or more"),
    ("output_tokens", None, ":8: output_tokens is missing"),
    ("turn", -1, ":8: turn is -1"),
    ("block_tokens", 32, ":8: block_tokens is 32, before 64: use one size"),
    ("block_hashes", [], ":8: 0 blocks of 64 tokens do not fit an input of 2048 tokens: 32 were expected"),
    ("parent_request", 999, ":8: its parent, request 999, does not exist"),
    ("parent_request", -7, ":8: parent_request is -7"),
    ("request_id", 0, ":8: request_id 0 was already used in row 1"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_CELLS)
def test_a_bad_cell_is_named(tmp_path: Path, column: str, value: object, message: str) -> None:
    columns = {name: values[:12] for name, values in table_of(CHAT).items()}
    columns["input_tokens"][7], columns["block_hashes"][7] = 2048, list(range(10**6, 10**6 + 32))
    columns["parent_request"] = [-1] * 12
    columns[column][7] = value
    assert message in fault(write_parquet(tmp_path / "t.parquet", columns))


def test_a_parent_that_comes_later_is_named(tmp_path: Path) -> None:
    columns = {name: values[:3] for name, values in table_of(CHAT).items()}
    columns["parent_request"] = [2, -1, -1]
    path = write_parquet(tmp_path / "t.parquet", columns)
    assert ":1: its parent, request 2 in row 3, arrives after it" in fault(path)


def test_what_is_wrong_with_a_whole_parquet_file(tmp_path: Path) -> None:
    columns = table_of(CHAT)
    other = write_parquet(tmp_path / "a.parquet", {"x": [1], "turn": [0]})
    assert "it has no request_id, arrival_s, session_id" in fault(other)
    nothing = {name: pa.array(values, pa.int64())[:0] for name, values in columns.items() if name != "block_hashes"}
    assert "has no requests" in fault(write_parquet(tmp_path / "b.parquet", nothing))
    columns["block_hashes"][30] = [1, None]
    assert ":31: block_hashes holds a null" in fault(write_parquet(tmp_path / "c.parquet", columns))
    torn = tmp_path / "d.parquet"
    torn.write_bytes(other.read_bytes()[:-20])
    assert "cannot be read" in fault(torn)


ROWS = {
    "mooncake_conversation_first_half": 5719,
    "mooncake_synthetic": 3993,
    "agent_sessions_even": 24_015,
    "miniswe_b64approx": 402,
    "azure2023_conv": 19_366,
    "sharegpt_like_generated": 51_308,
}
INPUT_TOKENS = {"agent_sessions_even": 3_012_680_174, "azure2023_conv": 22_361_870, "miniswe_b64approx": 2_418_416}


@pytest.mark.parametrize("name", ["agent_sessions_even", "miniswe_b64approx", "azure2023_conv"])
def test_the_real_traces_are_read_whole(name: str) -> None:
    trace = read_trace(shared_data("traces", f"{name}.parquet"))
    assert (len(trace), trace.input_tokens) == (ROWS[name], INPUT_TOKENS[name])
    if name != "agent_sessions_even":  # a second and a half
        check(trace)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line(0, 5, [1])).encode() + b"\n"))
    assert len(read_trace(path)) == 1
    path.write_bytes(path.read_bytes()[:-12])
    assert "cannot be read" in fault(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "nothing.parquet")
    assert "is a folder without turns.jsonl" in fault(tmp_path)
    (tmp_path / "empty.jsonl").write_text(" \n\n")
    assert "is empty" in fault(tmp_path / "empty.jsonl")
    (tmp_path / "empty.json").touch()
    assert "is empty" in fault(tmp_path / "empty.json")
    (tmp_path / "essay.txt").write_text("It was a dark and stormy night\n")
    assert f"not a trace of a known format ({', '.join(FORMATS)})" in fault(tmp_path / "essay.txt")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(line(0, 5, [1])).encode() + b"\n\xe9\n")
    assert ":2: not UTF-8 (byte 0xe9)" in fault(tmp_path / "latin.jsonl")
    with pytest.raises(TraceError, match="gopher://x cannot be read"):
        read_trace("gopher://x")


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [line(0, 5, [1])])
    with pytest.raises(ValueError, match="limit is 0"):
        read_trace(path, limit=0)
    with pytest.raises(ValueError, match="unknown format 'csv': choose one of azure, batch"):
        read_trace(path, format="csv")
    with pytest.raises(ValueError, match="it takes block_tokens=512, min_shared_blocks=2"):
        read_trace(path, format="mooncake:blocks=3")
    with pytest.raises(ValueError, match="block_tokens is 0"):
        read_trace(path, format="mooncake:block_tokens=0")
    assert "cannot be read" in fault(path, format="parquet")
