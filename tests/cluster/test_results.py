import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.results import OutputError, ResultWriter, Row

SETTINGS = {"input": "a.jsonl", "seed": 0}
ROW = Row(
    conversation_id="c",
    turn=0,
    where="a.jsonl:1",
    prompt_tokens=5,
    answer="grüße",
    answer_token_ids=[1, 2],
    finish_reason="stop",
    reused_tokens={"dram": 3},
    recomputed_tokens={"never_stored": 2},
)


def rows(count: int) -> list[Row]:
    return [replace(ROW, turn=turn) for turn in range(count)]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SETTINGS, resume=False) as writer:
        writer.write(ROW)
        (line,) = (tmp_path / "turns.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["answer"] == "grüße"
    assert json.loads(line)["answer_tokens"] == 2


def test_parquet_holds_every_row_once(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SETTINGS, resume=False) as writer:
        for row in rows(3):
            writer.write(row)
    table = pq.read_table(tmp_path / "parquet")
    assert table.column("turn").to_pylist() == [0, 1, 2]
    assert table.column("reused_tokens").to_pylist()[0]["dram"] == 3


def test_a_killed_job_resumes_from_its_whole_rows(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, SETTINGS, resume=False)
    for row in rows(3):
        writer.write(row)
    with (tmp_path / "turns.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"conversation_id": "c", "tu')  # killed in the middle of a line, before any part was written
    with ResultWriter(tmp_path, SETTINGS, resume=True) as resumed:
        assert resumed.done == rows(3)
        resumed.write(replace(ROW, turn=3))
    assert pq.read_table(tmp_path / "parquet").column("turn").to_pylist() == [0, 1, 2, 3]
    assert len((tmp_path / "turns.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_failed_turns_are_tried_again(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SETTINGS, resume=False) as writer:
        writer.write(ROW)
        writer.write(replace(ROW, turn=1, error="the replica died"))
    with ResultWriter(tmp_path, SETTINGS, resume=True) as resumed:
        assert resumed.done == [ROW]
        resumed.write(replace(ROW, turn=1))
    assert pq.read_table(tmp_path / "parquet").column("error").to_pylist() == ["", ""]


def test_a_used_folder_is_not_overwritten(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SETTINGS, resume=False) as writer:
        writer.write(ROW)
    with pytest.raises(OutputError, match="--resume"):
        ResultWriter(tmp_path, SETTINGS, resume=False)


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    ResultWriter(tmp_path, SETTINGS, resume=False).close()
    with pytest.raises(OutputError, match=r"input='a\.jsonl', not 'b\.jsonl'"):
        ResultWriter(tmp_path, {**SETTINGS, "input": "b.jsonl"}, resume=True)


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "new", SETTINGS, resume=True) as writer:
        assert writer.done == []


def test_a_broken_journal_is_named_by_line(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SETTINGS, resume=False) as writer:
        writer.write(ROW)
    with (tmp_path / "turns.jsonl").open("a", encoding="utf-8") as file:
        file.write("not a row\n")
    with pytest.raises(OutputError, match=r"turns\.jsonl:2 is not a row"):
        ResultWriter(tmp_path, SETTINGS, resume=True)


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        ResultWriter(tmp_path / "file" / "out", SETTINGS, resume=False)


def test_a_full_disk_is_told_and_keeps_what_was_written(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, SETTINGS, resume=False)
    writer.write(ROW)
    writer._file.close()
    writer._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 - the writer closes it
    with pytest.raises(OutputError, match="make room and run again with --resume"):
        writer.write(replace(ROW, turn=1))
    assert ResultWriter(tmp_path, SETTINGS, resume=True).done == [ROW]
