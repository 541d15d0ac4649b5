"""`reprise bench` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bench import runner
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Target
from cluster.cli import main

ROOT = Path(__file__).resolve().parents[2]


def good(options: BenchOptions) -> Result:
    print("a library talks")
    options.progress("working")
    return _result("good", 2.0)


def misses(_: BenchOptions) -> Result:
    return _result("misses", 0.5)


def breaks(_: BenchOptions) -> Result:
    raise RuntimeError("the disk is full\nand more")


def interrupted(_: BenchOptions) -> Result:
    raise KeyboardInterrupt


def _result(name: str, value: float) -> Result:
    target = Target(measure="speed", comparison=">=", bound=1, value=value)
    return Result(name=name, setup={}, tables=[], figures={"value": value}, targets=[target])


@pytest.fixture(autouse=True)
def own_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has ours in the place of some real names: the parser knows those already."""
    for name, function in (("ttft", good), ("overlap", misses), ("save", breaks), ("tiers", interrupted)):
        monkeypatch.setitem(runner.BENCHMARKS, name, f"{__name__}:{function.__name__}")


def bench(model: Path, *arguments: str) -> int:
    return main(["bench", *arguments, "--model", str(model)])


def test_json_is_one_object_a_line_and_nothing_else(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(small_model, "ttft", "overlap", "--json") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["benchmark"] == "good"
    assert first["targets"][0]["holds"] is True
    assert second["targets"][0]["holds"] is False


def test_one_that_fails_does_not_keep_the_others_from_running(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(small_model, "save", "ttft", "--json") == 1
    output = capsys.readouterr()
    first, second = (json.loads(line) for line in output.out.splitlines())
    assert first == {"benchmark": "save", "error": "RuntimeError: the disk is full"}
    assert second["benchmark"] == "good"
    assert "reprise: save: RuntimeError: the disk is full" in output.err
    assert "Traceback" not in output.err


def test_check_is_about_targets(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(small_model, "ttft", "--check") == 0
    assert bench(small_model, "overlap") == 0
    assert bench(small_model, "overlap", "--check") == 1
    assert "✗" in capsys.readouterr().out


def test_out_holds_json_and_pictures(small_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert bench(small_model, "ttft", "save", "--out", str(tmp_path / "out")) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ttft.json", "save.json", "good.png"}
    assert json.loads((tmp_path / "out" / "save.json").read_text())["error"]


def test_without_matplotlib_there_is_a_hint(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(small_model, "ttft", "--out", str(tmp_path)) == 0
    assert "reprise[lab]" in capsys.readouterr().err
    assert (tmp_path / "ttft.json").exists()


def test_ctrl_c_is_130(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(small_model, "ttft", "tiers", "overlap", "--json") == 130
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    assert "interrupted" in output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ttft", "--model", "./no-such-model"), "no-such-model"),
        (("ttft", "--repeats", "0"), "repeats"),
        (("ttft", "--dtype", "int8"), "dtype"),
        (("ttft", "--data", "/no/such"), "--data"),
        (("ttft", "--out", "s3://bucket/x"), "s3://bucket/x"),
    ],
)
def test_wrong_input_is_one_line_and_2(
    arguments: tuple[str, ...], words: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = () if "--model" in arguments else ("--model", str(small_model))
    assert main(["bench", *arguments, *model]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reprise: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_wrong_name_is_2_and_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "speed"])
    assert end.value.code == 2
    assert "overhead" in capsys.readouterr().err


def test_help_lists_benchmarks_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert all(f"\n  {name}" in text for name in (*runner.BENCHMARKS, "all"))


def test_all_is_every_name_once() -> None:
    assert runner.expand(["save", "all"]) == list(runner.BENCHMARKS)
    assert runner.expand(["save", "tiers", "save"]) == ["save", "tiers"]
    with pytest.raises(ValueError, match="unknown benchmark 'x'"):
        runner.expand(["x"])


@pytest.mark.timeout(120)
def test_a_real_ctrl_c(small_model: Path) -> None:
    """In a process of its own, with threads under way."""
    command = [sys.executable, "-m", "cluster.cli", "bench", "save", "--json", "--quick", "--repeats", "100000"]
    job = subprocess.Popen(
        [*command, "--model", str(small_model)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stderr is not None
    for line in job.stderr:
        if "prefill" in line:
            break
    os.kill(job.pid, signal.SIGINT)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert output == ""
    assert "interrupted" in errors
    assert "Traceback" not in errors
