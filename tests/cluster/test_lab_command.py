"""`reprise lab` as a user meets it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from policies.simulator.lab import jobs

TRACE = "chat:sessions=6,seed=2"


def lab(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """(exit code, the one JSON object or the text, stderr)."""
    code = main(["lab", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out) if "--json" in arguments else said.out, said.err


def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = lab(capsys, "run", TRACE, "--eviction", "Fifo", "--dram", "10%", "--ssd", "0", "--json")
    assert code == 0
    assert found["policies"]["eviction"] == "policies.eviction:Fifo"
    assert 0 < found["hit_rate"] < 1
    assert found["result"]["series"]["queue_length"]


def test_compare_has_lru_the_policies_and_the_oracle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--eviction", "Fifo", "--jobs", "1", "--out", str(tmp_path))
    code, text, _ = lab(capsys, "compare", TRACE, *arguments)
    assert code == 0
    assert [text.index(name) for name in ("Lru", "Fifo", "oracle")] == sorted(
        text.index(name) for name in ("Lru", "Fifo", "oracle")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "recomputed.png"}


def test_sweeps_draw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common = ("--jobs", "1", "--json", "--out", str(tmp_path))
    code, found, _ = lab(capsys, "sweep", TRACE, "--capacity", "5,50", *common)
    assert (code, [row["capacity_percent"] for row in found["rows"]]) == (0, [5, 50])
    code, found, _ = lab(capsys, "sweep", TRACE, "--load", "0.5,2", *common)
    assert (code, {row["load"] for row in found["rows"]}) == (0, {0.5, 2})
    assert {"load.png", "recomputed.png"} < {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("hit_rate") for path in tmp_path.iterdir())


def test_without_matplotlib_there_is_a_hint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, words = lab(capsys, "sweep", TRACE, "--capacity", "5", "--jobs", "1", "--out", str(tmp_path))
    assert code == 0
    assert "reprise[lab]" in words
    assert (tmp_path / "result.json").exists()


def test_a_log_that_diverges_is_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    assert lab(capsys, "record", str(log), "--trace", TRACE, "--json")[0] == 0
    assert lab(capsys, "replay", str(log), "--json")[1]["is_equal"]
    code, text, _ = lab(capsys, "replay", str(log), "--eviction", "Fifo")
    assert code == 0
    assert "OPEN LOOP" in text
    lines = log.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"type":"Dispatch"' in line)
    tree = json.loads(lines[number])
    lines[number] = json.dumps({**tree, "commands": []}).encode() + b"\n"
    log.write_bytes(b"".join(lines))
    code, text, _ = lab(capsys, "replay", str(log))
    assert code == 1
    assert f"line {number + 1} " in text.replace("\n", " ")


def test_score_skips_what_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000 * i, "input_length": 1500, "output_length": 3, "hash_ids": [i % 3, 10 + i % 3, 20 + i % 3]}
        for i in range(12)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("score", str(tmp_path), "--capacity", "50", "--timed-turns", "8", "--jobs", "1", "--json")
    code, found, _ = lab(capsys, *arguments)
    assert code == 0
    row = next(row for row in found["rows"] if row["level"] == "block")
    assert row["lru"] < row["oracle"]
    assert [run["num_turns"] for run in found["timed"]] == [8, 8]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    code, found, words = lab(capsys, *arguments)
    assert code == 1
    assert "broken.parquet" in words
    assert list(found["skipped"]) == [str(tmp_path / "broken.parquet")]


def test_a_folder_without_traces_is_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, said = lab(capsys, "score", str(tmp_path))
    assert code == 2
    assert "holds no traces" in said


def test_what_a_policy_does_wrong_is_said_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    strange = "tests.simulator.test_lab:Strange"
    for verb in ("run", "compare", "oracle"):
        jobs = () if verb == "run" else ("--jobs", "1")
        sizes = ("--capacity", "10") if verb == "oracle" else ("--dram", "10%", "--ssd", "0")
        code, _, said = lab(capsys, verb, TRACE, "--eviction", strange, *sizes, *jobs)
        assert code == 0
        assert "Strange.victims" in said.replace("\n", "")
        assert "test_lab.py:" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nothing.parquet"), "does not exist"),
        (("run", TRACE, "--dram", "much"), "--dram"),
        (("run", TRACE, "--load", "high"), "--load"),
        (("run", TRACE, "--hardware", "abacus"), "abacus"),
        (("run", TRACE, "--eviction", "Nope"), "Nope"),
        (("run", TRACE, "--limit", "0"), "limit"),
        (("sweep", TRACE), "--capacity"),
        (("oracle", TRACE, "--capacity", "200"), "--capacity"),
        (("oracle", TRACE, "--warm-up", "1"), "--warm-up"),
        (("compare", TRACE, "--jobs", "0"), "--jobs"),
        (("replay", "nothing.jsonl"), "nothing.jsonl"),
        (("score", "nothing"), "nothing"),
        (("score", str(Path(__file__).parent / "__init__.py")), "not a folder"),
        (("sweep", TRACE, "--capacity", "5", "--nodes", "2", "--placement", "RoundRobin"), "--nodes, --placement"),
        (("run", TRACE, "--bucket", "much"), "--bucket"),
        (("run", "bogus:foo=1"), "zipf:"),
    ],
)
def test_wrong_input_is_one_line_and_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, said = lab(capsys, *arguments)
    assert (code, text) == (2, "")
    assert len(said.splitlines()) == 1
    assert said.startswith("reprise: ")
    assert words in said


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "run_one", interrupt)
    assert lab(capsys, "oracle", TRACE, "--jobs", "1")[0] == 130


@pytest.mark.parametrize("verb", ["run", "compare", "sweep", "oracle", "record", "replay", "score"])
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["lab", verb, "--help"])
    assert end.value.code == 0
    assert f"  reprise lab {verb}" in capsys.readouterr().out


def test_the_example_experiment_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "policy_experiment.py"))
    assert script["experiment"](script["LOYAL"], str(tmp_path / "run.jsonl")) == 0
    assert "all commands equal" in capsys.readouterr().out
