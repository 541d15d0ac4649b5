"""Records of conversations: what was put is there, the oldest leave, a damaged or full disk costs memory only."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.histories import Histories, Record

BIG = 1 << 20


def record(key: str, value: bytes = b"v", owner: str = "o", part: str = "") -> Record:
    return Record(key, owner, value, part)


def test_what_was_put_is_there_in_order_also_after_a_restart(tmp_path):
    path = tmp_path / "folder" / "h.sqlite3"
    first = Histories(path, BIG)
    first.put([record("a", b"1", part="x"), record("b", b"2"), record("a", b"3", part="y")])
    first.close()
    second = Histories(path, BIG)
    assert [(r.key, r.part, r.value) for r in second.get(["b", "a", "c"])] == [
        ("a", "x", b"1"),
        ("b", "", b"2"),
        ("a", "y", b"3"),
    ]
    assert second.used_bytes == first.used_bytes > 0


def test_the_newest_of_a_key():
    histories = Histories(None, BIG)
    histories.put([record("a", str(i).encode(), part=str(i)) for i in range(5)] + [record("b")])
    assert [r.part for r in histories.get(["a", "b", "a"], limit=2)] == ["3", "4", ""]


def test_the_same_name_again_replaces():
    histories = Histories(None, BIG)
    histories.put([record("a", b"old")])
    histories.put([record("a", b"newer")])
    assert [r.value for r in histories.get(["a"])] == [b"newer"]
    assert len(histories) == 1
    assert histories.used_bytes == record("a", b"newer").size


def test_many_keys_at_once():
    histories = Histories(None, BIG)
    histories.put([record(str(i)) for i in range(1500)])
    assert len(histories.get([str(i) for i in range(1500)])) == 1500


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 400)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_budget_holds_and_the_oldest_leave(puts):
    budget = 1500
    histories = Histories(None, budget)
    latest: dict[str, int] = {}
    for key, size in puts:
        histories.put([record(key, b"x" * size)])
        latest.pop(key, None)
        latest[key] = size
        assert histories.used_bytes <= budget
    kept = {r.key for r in histories.get(list(latest))}
    assert sum(record(key, b"x" * latest[key]).size for key in kept) == histories.used_bytes
    order = list(latest)
    assert kept == set(order[len(order) - len(kept) :])


def test_deleting_an_owner_leaves_no_trace_in_the_file(tmp_path):
    path = tmp_path / "h.sqlite3"
    histories = Histories(path, BIG)
    histories.put([record("a", b"SECRET-WORDS", owner="x"), record("b", b"OTHER-WORDS", owner="y")])
    assert histories.delete("x") == 1
    assert [r.key for r in histories.get(["a", "b"])] == ["b"]
    assert histories.used_bytes == record("b", b"OTHER-WORDS").size
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"OTHER-WORDS" in on_disk
    assert b"SECRET-WORDS" not in on_disk


def test_what_began_before_its_owner_was_deleted_is_not_put():
    histories = Histories(None, BIG)
    before = time.time()
    histories.put([record("a", owner="x")], since=before)
    histories.delete("x")
    histories.put([record("a", owner="x"), record("b", owner="y")], since=before)
    assert [r.key for r in histories.get(["a", "b"])] == ["b"]
    histories.put([record("c", owner="x")], since=time.time() + 2)
    assert [r.key for r in histories.get(["a", "c"])] == ["c"]


def test_a_damaged_file_is_set_aside(tmp_path):
    path = tmp_path / "h.sqlite3"
    path.write_bytes(b"this is no database" * 500)
    histories = Histories(path, BIG)
    histories.put([record("a")])
    assert len(histories) == 1
    assert (tmp_path / "h.sqlite3.damaged").exists()


def test_a_refusing_disk_changes_nothing(tmp_path):
    histories = Histories(tmp_path / "h.sqlite3", BIG)
    histories.put([record("a", b"x" * 100)])
    used = histories.used_bytes
    pages = histories._db.execute("PRAGMA page_count").fetchone()[0]
    histories._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
    with pytest.raises(OSError, match="not kept"):
        histories.put([record(str(i), os.urandom(4000)) for i in range(50)])
    assert histories.used_bytes == used
    assert [r.key for r in histories.get(["a", "0"])] == ["a"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises((OSError, sqlite3.Error), match="cannot write"):
        Histories(path, BIG)
