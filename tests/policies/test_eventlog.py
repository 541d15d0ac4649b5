"""The event log: whatever the scheduler hears and says can be written and read again; what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import messages as m
from policies.eventlog import (
    Entry,
    Header,
    Record,
    Stopped,
    from_json,
    read_lines,
    read_log,
    to_json,
    write_line,
)

KINDS = get_args(m.Event) + get_args(m.Command)
HEADER = Header(config=m.SchedulerConfig(eviction="policies.eviction:Lru", retry_s=0.1), began_unix_s=1.7e9)
TICK = Entry(now=1 / 3, event=m.Tick(), commands=())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_event_and_command_survives(kind: type, data: st.DataObject) -> None:
    value: Any = data.draw(st.from_type(kind))
    tree = to_json(value)
    assert tree["type"] == kind.__name__
    assert repr(from_json(json.loads(json.dumps(tree)))) == repr(value), "repr tells enums and exact floats"


@given(
    st.lists(
        st.builds(
            Entry,
            now=st.floats(allow_nan=False),
            event=st.from_type(m.Event),
            commands=st.lists(st.from_type(m.Command), max_size=3).map(tuple),
            benched=st.lists(st.text(), max_size=2).map(tuple),
            error=st.text(),
        )
        | st.builds(Stopped, stopped=st.text())
        | st.just(HEADER)
    )
)
@settings(max_examples=50, deadline=None)
def test_every_record_survives(records: list[Record]) -> None:
    written = [HEADER, *records]
    lines = [write_line(record) for record in written]
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)
    read = list(read_lines(lines))
    assert [number for number, _ in read] == list(range(1, len(written) + 1))
    assert [repr(record) for _, record in read] == [repr(record) for record in written]


def test_an_entry_is_short() -> None:
    assert write_line(TICK) == b'{"now":0.3333333333333333,"event":{"type":"Tick"},"commands":[]}\n'


def test_a_field_with_a_default_may_be_missing() -> None:
    """So a log from before the field existed can be read."""
    line = b'{"event_log":2,"config":{"eviction":"policies.eviction:Lru","retry_s":0.1},"began_unix_s":1.7e9}\n'
    assert list(read_lines([line])) == [(1, HEADER)]


def test_what_is_no_message_cannot_be_written() -> None:
    @dataclass(frozen=True)
    class Rumour:
        text: str

    with pytest.raises(TypeError, match=r"Rumour.*cannot be written"):
        write_line(Entry(now=0.0, event=Rumour("x"), commands=()))  # type: ignore[arg-type]


# --- broken files -----------------------------------------------------------------------------------------------------


def lines_of(*records: Record) -> list[bytes]:
    return [write_line(record) for record in records]


def read(lines: Iterable[bytes]) -> list[Record]:
    return [record for _, record in read_lines(lines, "a.jsonl")]


@pytest.mark.parametrize("kept", [1, 10, 60])
def test_a_torn_last_line_is_what_a_killed_process_leaves(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"".join(lines_of(HEADER, TICK, TICK))[: -len(write_line(TICK)) + kept])
    *whole, (line, last) = read_log(str(file))
    assert [record for _, record in whole] == [HEADER, TICK]
    assert line == 3
    assert isinstance(last, Stopped)
    assert "torn" in last.stopped


def test_a_whole_last_line_counts_without_its_end() -> None:
    assert read([*lines_of(HEADER), write_line(TICK).rstrip(b"\n")]) == [HEADER, TICK]


@pytest.mark.parametrize("damaged", [b'{"now":1.0,"eve\n', b"\n", b"\x00" * 20 + b"\n", b"\xff\xfe\n"])
def test_a_broken_line_in_the_middle_is_an_error(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not a line of JSON .*: the file is damaged; .* cut it off here"):
        read([*lines_of(HEADER, TICK), damaged, *lines_of(TICK)])


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (b'{"event_log":3,"config":{}}', r"version 3, but version 2 is read here: use its own Reprise"),
        (b'{"event_log":2,"config":{"retry_s":-1}}', r"Header.config: retry_s is -1: choose a number"),
        (b'{"event_log":2,"config":{"tries":3}}', r"Header.config: SchedulerConfig has no field 'tries': its fields"),
        (b"[1,2]", r"\[1, 2\] is not a record of an event log; is this the right file\?"),
        (b'{"now":1.0,"event":{"type":"Tick"}}', r"Entry lacks commands: the line was changed"),
        (b'{"now":1.0,"event":{"type":"Tick"},"commands":[],"mood":1}', r"Entry has no field 'mood': its fields"),
        (b'{"now":"1","event":{"type":"Tick"},"commands":[]}', r"Entry.now: '1' is not a number"),
        (b'{"now":true,"event":{"type":"Tick"},"commands":[]}', r"Entry.now: True is not a number"),
        (b'{"now":1.0,"event":{"type":"Tock"},"commands":[]}', r"Entry.event: unknown type 'Tock': known are TurnSub"),
        (b'{"now":1.0,"event":{"type":["Tick"]},"commands":[]}', r"unknown type \['Tick'\]"),
        (b'{"now":1.0,"event":{},"commands":[]}', r'Entry.event: \{\} is not an object with a "type"'),
        (b'{"now":1.0,"event":{"type":"Tick"},"commands":{}}', r"Entry.commands: \{\} is not an array"),
        (b'{"now":1.0,"event":{"type":"Tick"},"commands":[{"type":"Tick"}]}', r"unknown type 'Tick': known are"),
        (
            b'{"now":1.0,"event":{"type":"NodeLost","node_id":null},"commands":[]}',
            r"Entry.event: NodeLost.node_id: None is not a string",
        ),
        (
            b'{"now":1.0,"event":{"type":"ChunkDropped","node_id":"n","chunk":"k","tier":"tape"},"commands":[]}',
            r"ChunkDropped.tier: 'tape' is not one of hbm, dram, ssd, object",
        ),
        (
            b'{"now":1.0,"event":{"type":"Tick"},"commands":[{"type":"Dispatch","turn_id":"t","replica_id":"r",'
            b'"plan":{"steps":[],"recomputed":[["evicted",1,2]]}}]}',
            r"RestorePlan.recomputed: \['evicted', 1, 2\] is not an array of 2",
        ),
    ],
)
def test_a_strange_line_says_what_is_strange(line: bytes, advice: str) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*" + advice):
        read([*lines_of(HEADER), line + b"\n", *lines_of(TICK)])


def test_a_log_begins_with_a_header() -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not an event log: its first line must be a header"):
        read(lines_of(TICK))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not a line of JSON"):
        read([b"PAR1"])


def test_an_empty_log_has_no_records() -> None:
    assert read([]) == []


def test_records_come_as_they_are_read() -> None:
    """A log may be bigger than memory, and its beginning is good even if its end is not."""
    records = read_lines([*lines_of(HEADER, TICK), b"{\n"])
    assert [next(records)[1], next(records)[1]] == [HEADER, TICK]
    with pytest.raises(ValueError, match=":3:"):
        next(records)
