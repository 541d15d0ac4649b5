"""Chunks move between nodes: a turn placed away from its session's KV fetches it from the other node's store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(200)
def test_chunks_follow_their_sessions(small_model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = []
    for i in range(2):
        messages = [{"role": "user", "content": f"Question {turn} of {i}, please. " * 10} for turn in range(4)]
        lines.append(json.dumps({"id": f"chat-{i}", "messages": messages}))
    chats.write_text("\n".join(lines) + "\n")
    run = subprocess.run(
        [sys.executable, "-m", "tests.cluster.two_nodes", str(small_model), str(chats), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert (report["turns"], report["failed_turns"], report["unaccounted_tokens"]) == (8, 0, 0)
    assert report["answers_differing"] == 0
    assert report["replicas"] == ["replica-0", "replica-1"]
    assert report["moved_bytes"]["fetched"]["dram"] > 0, "nothing came from the other node"
    found = sum(report["reused_tokens"].values()) + report["recomputed_tokens"].get("computed_sooner", 0)
    assert found > 0.5 * report["prompt_tokens"]  # the model computes as fast as chunks travel: some it computes sooner
