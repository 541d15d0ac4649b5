"""The `reprise` command as a user meets it: real processes, wrong input, Ctrl-C, a killed job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.engine.params import SamplingParams
from cluster.batch import Listener, run_on
from cluster.bringup import Running
from cluster.cli import main
from cluster.conversations import InputError
from tests.cluster.jobs import options_for

ROOT = Path(__file__).resolve().parents[2]


def reprise(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    lines = []
    for i in range(3):
        messages = [{"role": "user", "content": f"Question {turn} of {i}, please. " * 8} for turn in range(4)]
        lines.append(json.dumps({"id": f"chat-{i}", "messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file


def batch(chats: Path, model: Path, out: Path, *more: str) -> tuple[str, ...]:
    small = ("model.chunk_tokens=32", "model.block_tokens=8", "model.kv_tokens=4096", "store.dram_bytes=64MiB")
    sets = [word for field in (*small, "model.num_threads=1") for word in ("--set", field)]
    plain = (
        "batch",
        str(chats),
        "--model",
        str(model),
        "--out",
        str(out),
        "--max-new-tokens",
        "8",
        "--concurrency",
        "2",
    )
    return (*plain, *sets, *more)


def answers(out: Path) -> dict[tuple[str, int], list[int]]:
    rows = [json.loads(line) for line in (out / "turns.jsonl").read_text().splitlines()]
    assert len({(row["conversation_id"], row["turn"]) for row in rows}) == len(rows), "a turn was done twice"
    return {(row["conversation_id"], row["turn"]): row["answer_token_ids"] for row in rows}


def wait_until(condition: Callable[[], bool], limit_s: float = 150.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def descendants(pid: int) -> set[int]:
    """Processes whose chain of parents leads to `pid`, as /proc shows them now."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    found: set[int] = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.timeout(400)
def test_a_killed_job_resumes_and_ends_as_if_undisturbed(
    chats: Path, small_model: Path, cluster: Running, tmp_path: Path
) -> None:
    killed = reprise(*batch(chats, small_model, tmp_path / "out", "--think-time", "0.4"))
    journal = tmp_path / "out" / "turns.jsonl"
    wait_until(lambda: journal.exists() and journal.read_text().count("\n") >= 4)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = journal.read_text().count("\n")
    assert 4 <= before < 12

    resumed = reprise(*batch(chats, small_model, tmp_path / "out", "--resume", "--json"))
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    report = json.loads(output)
    assert (report["turns"], report["failed_turns"], report["unaccounted_tokens"]) == (12, 0, 0)

    run_on(cluster, options_for(chats, tmp_path / "whole", sampling=SamplingParams(max_new_tokens=8)), Listener())
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")


@pytest.mark.timeout(300)
def test_ctrl_c_leaves_nothing_running(chats: Path, small_model: Path, tmp_path: Path) -> None:
    job = reprise(*batch(chats, small_model, tmp_path / "out", "--think-time", "5"))
    journal = tmp_path / "out" / "turns.jsonl"
    wait_until(lambda: journal.exists() and journal.read_text().count("\n") >= 1)
    left = descendants(job.pid)
    assert left
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "interrupted; finished turns are kept" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not alive(left), 30)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "./no-such-model"}, "no-such-model"),
        ({"more": ("--set", "store.dram=1")}, "store.dram is not a field"),
        ({"more": ("--max-new-tokens", "0")}, "max_new_tokens"),
        ({"more": ("--temperature", "-1")}, "temperature"),
        ({"more": ("--concurrency", "0")}, "concurrency"),
        ({"more": ("--out", "s3://bucket/out")}, "s3://bucket/out"),
        ({"more": ("--set", "scheduler.eviction=nowhere:Policy")}, "eviction policy 'nowhere:Policy'"),
    ],
)
def test_wrong_input_is_one_line(
    changes: dict[str, Any],
    words: str,
    chats: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = batch(
        changes.get("input", chats), changes.get("model", small_model), tmp_path / "out", *changes.get("more", ())
    )
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reprise: ")]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--size", "1m"), "unknown size '1m': choose one of test, 50m, 125m"),
        (("--architecture", "gpt"), "unknown architecture 'gpt'"),
        (("--out", "/dev/null/model"), "cannot write a model to /dev/null/model"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(
    more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "tiny", "--out", str(tmp_path / "model"), *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reprise: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["batch", "--help"])
    assert end.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_wrong_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["batch", "--no-such-flag"])
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_model_check_speaks_json(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "check", str(small_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["kv_bytes_per_token"] > 0


def test_config_show_is_a_file_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--set", "cluster.num_replicas=3"]) == 0
    file = tmp_path / "reprise.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "show", "--config", str(file)]) == 0
    assert "num_replicas: 3" in capsys.readouterr().out


def test_policies_of_ones_own_are_found_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert main(["config", "show"]) == 0
    assert sys.path[-1] == str(tmp_path), "after everything that is installed"


def test_an_event_log_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run_batch(config: Any, *_: Any) -> None:
        seen.append(config.cluster.record)
        raise InputError("enough")

    monkeypatch.setattr("cluster.batch.run_batch", run_batch)
    assert main(["batch", "chats", "--model", "m", "--out", str(tmp_path), "--record", "logs/a b.jsonl"]) == 2
    assert main(["batch", "chats", "--model", "m", "--out", str(tmp_path)]) == 2
    assert seen == ["logs/a b.jsonl", None]


def test_an_unwritable_output_is_told(chats: Path, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if os.geteuid() == 0:
        assert main(batch(chats, small_model, tmp_path / "file" / "out")) == 2
