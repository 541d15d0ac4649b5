"""Conversations without times as traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from policies.simulator.readers import read_trace
from policies.simulator.readers.messages import Message, TextTurn, turns_of
from policies.simulator.readers.sharegpt import ShareGpt
from policies.simulator.trace import TraceError
from tests.simulator.files import fault, write_lines
from tests.simulator.invariants import by_id, check, extends, num_common, shared_data


def openai(*texts: str, system: str = "") -> dict[str, Any]:
    """A user's message, an answer, and so on."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


def sharegpt(*texts: str) -> dict[str, Any]:
    roles = ("human", "gpt") * len(texts)
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in zip(roles, texts)]}


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "turns"),
    [
        ("user assistant", ["user/assistant"]),
        ("user", ["user/"]),
        ("user user assistant", ["user/", "user/assistant"]),
        ("system user assistant user", ["system user/assistant", "user/"]),
        ("assistant user assistant", ["assistant user/assistant"]),
        ("user assistant assistant user assistant", ["user/assistant\n\nassistant", "user/assistant"]),
        ("user assistant tool tool assistant", ["user/assistant", "tool tool/assistant"]),
        ("user assistant system", ["user/assistant"]),
    ],
)
def test_turns(roles: str, turns: list[str]) -> None:
    found = turns_of([Message(role, role) for role in roles.split()])
    assert [f"{' '.join(message.role for message in turn.messages)}/{turn.answer}" for turn in found] == turns


def test_a_turn_has_the_texts() -> None:
    turns = turns_of([Message("human", "a"), Message("gpt", "b"), Message("gpt", "c")])
    assert turns == [TextTurn((Message("human", "a"),), "b\n\nc")]


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True])
def test_lengths_are_estimated_and_histories_grow(tmp_path: Path, as_list: bool) -> None:
    path = tmp_path / "talk.json"
    records = [sharegpt("a" * 400, "b" * 41, "c" * 7), openai("d" * 8, "e" * 4)]
    if as_list:
        path.write_text(json.dumps(records, indent=1))
    else:
        write_lines(path, records)
    trace = read_trace(path, format="sharegpt:block_tokens=16,unanswered_tokens=9")
    check(trace)
    lengths = {(r.session_id, r.turn): (r.input_tokens, r.output_tokens) for r in trace}
    assert lengths == {(0, 0): (100, 11), (0, 1): (100 + 11 + 2, 9), (1, 0): (2, 1)}
    requests = {(r.session_id, r.turn): r for r in trace}
    assert extends(requests[0, 1], requests[0, 0], 16)
    assert num_common(requests[0, 0], requests[1, 0]) == 0
    assert len(read_trace(path, limit=1)) == 2


def test_a_tokenizer_counts_if_there_is_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [openai("one two three", "four", "five six", "seven")])
    trace = ShareGpt(count_tokens=lambda text: len(text.split())).read(str(path), "t", None)
    assert [(r.input_tokens, r.output_tokens) for r in trace] == [(3, 1), (6, 1)]


def test_the_same_beginning_is_the_same_blocks(tmp_path: Path) -> None:
    system = "s" * 640
    records = [openai("a" * 400, "b", system=system), openai("c" * 400, "d", system=system), openai("a" * 400, "b")]
    trace = read_trace(write_lines(tmp_path / "t.jsonl", records), format="sharegpt:block_tokens=16")
    one, two, other = sorted(trace, key=lambda request: request.session_id)
    assert (num_common(one, two), num_common(one, other)) == (160 // 16, 0)
    check(trace)


def test_times_come_from_the_seed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [openai(*["text"] * 8)] * 400)
    trace = read_trace(path, format="sharegpt:sessions_per_s=5,mean_think_s=20,seed=1")
    assert trace == read_trace(path, format="sharegpt:sessions_per_s=5,mean_think_s=20,seed=1")
    assert trace != read_trace(path, format="sharegpt:sessions_per_s=5,mean_think_s=20,seed=2")
    starts = [request.arrival_s for request in trace if request.parent is None]
    assert len(starts) / starts[-1] == pytest.approx(5, rel=0.15)
    thoughts = [request.think_s for request in trace if request.think_s is not None]
    assert sum(thoughts) / len(thoughts) == pytest.approx(20, rel=0.1)
    requests = by_id(trace)
    for request in trace:
        if request.parent is not None and request.think_s is not None:
            parent = requests[request.parent]
            assert request.arrival_s == pytest.approx(parent.arrival_s + parent.output_tokens / 50 + request.think_s)


def test_a_window_drops_the_oldest_half(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [openai(*["text" * 30] * 20)])
    trace = read_trace(path, format="sharegpt:window_tokens=128,block_tokens=8")
    check(trace)
    assert [request.input_tokens for request in trace] == [30, 90, 64, 64, 64, 64, 64, 64, 64, 64]
    requests = by_id(trace)
    assert [num_common(r, requests[r.parent]) for r in trace if r.parent is not None] == [3, *[0] * 8]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "hello"}, 'no list of messages: put them under "messages"'),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": ["hello"]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, "message 2 has no role"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has no text"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: object, message: str) -> None:
    good = openai("a", "b")
    assert f":2: {message}" in fault(write_lines(tmp_path / "t.jsonl", [good, record]))
    (tmp_path / "t.json").write_text(json.dumps([good, record]))
    assert f" item 2: {message}" in fault(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"messages": [}', " item 1: not JSON"),
        ('[{"messages": [{"role": "user", "content": "a"}]} {}]', " item 1: no comma and no ] after it"),
        ('[{"messages": [{"role": "user", "content": "a"}]}', " item 1: no comma and no ] after it"),
        ('[{"messages": []}]', " has no conversation with a user's message"),
        ('{"messages": []}', " has no conversation with a user's message"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    assert message in fault(tmp_path / "t.json")


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.simulator.readers.messages.READ_BYTES", 7)
    path = tmp_path / "t.json"
    path.write_text(" " + json.dumps([openai(f"{number} äöü " * number, "b") for number in range(1, 9)]) + "\n")
    assert len(read_trace(path)) == 8
    path.write_text(path.read_text()[:-90] + "?")
    assert len(read_trace(path, limit=7)) == 7
    with pytest.raises(TraceError, match="item 8"):
        read_trace(path)


def test_real_conversations() -> None:
    trace = read_trace(shared_data("conversations", "tau_bench_airline.jsonl.zst"))
    check(trace)
    assert len({request.session_id for request in trace}) == 200
    first = [request for request in trace if request.turn == 0]
    assert min(num_common(first[0], request) for request in first) > 10  # a long system prompt
    assert len(read_trace(shared_data("conversations", "mt_bench.jsonl.zst"))) == 160
