"""Chunks move between nodes: a turn placed away from its session's KV fetches it from the other node's store."""

import json
from pathlib import Path

import pytest

from tests.programs import run_program


@pytest.mark.timeout(200)
def test_chunks_follow_their_sessions(small_model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = []
    for i in range(2):
        messages = [{"role": "user", "content": f"Question {turn} of {i}, please. " * 10} for turn in range(4)]
        lines.append(json.dumps({"id": f"chat-{i}", "messages": messages}))
    chats.write_text("\n".join(lines) + "\n")
    report = run_program("tests.cluster.two_nodes", small_model, chats, tmp_path / "out")
    assert (report["turns"], report["failed_turns"], report["unaccounted_tokens"]) == (8, 0, 0)
    assert report["answers_differing"] == 0
    assert report["replicas"] == ["replica-0", "replica-1"]
    assert report["moved_bytes"]["fetched"]["dram"] > 0, "nothing came from the other node"
    found = sum(report["reused_tokens"].values()) + report["recomputed_tokens"].get("computed_sooner", 0)
    assert found > 0.5 * report["prompt_tokens"]  # the model computes as fast as chunks travel: some it computes sooner
