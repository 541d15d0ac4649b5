"""The main job on a real local cluster: real actors, real files, a small model in fp32."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from actors.engine.params import SamplingParams
from cluster import bringup
from cluster.batch import Listener, run_batch, run_on
from cluster.config import Config, config_from
from cluster.conversations import InputError
from cluster.results import Row
from tests.cluster.jobs import ANSWER_TOKENS, KIB, answers, config_for, options_for, wait_until_at_rest

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

SYSTEM = "You are a careful guide. " * 12
NUM_CONVERSATIONS, NUM_TURNS = 4, 4


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with a shared system prompt and long first questions."""
    file = tmp_path_factory.mktemp("input") / "chats.jsonl"
    lines = []
    for i in range(NUM_CONVERSATIONS):
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in range(NUM_TURNS):
            words = f"Question {turn} of traveller {i}: what about place {i * 7 + turn}? " * (6 if turn == 0 else 2)
            messages.append({"role": "user", "content": words})
            messages.append({"role": "assistant", "content": f"Recorded answer {turn} for {i}."})
        lines.append(json.dumps({"id": f"chat-{i}", "messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def undisturbed(
    cluster: bringup.Running, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, run_on(cluster, options_for(chats, out, compare=True), Listener())


def num_found(row: dict[str, Any]) -> int:
    """Tokens whose KV was there: reused, or (this model computes faster than files are read) computed meanwhile."""
    return sum(row["reused_tokens"].values()) + row["recomputed_tokens"].get("computed_sooner", 0)


def check_accounts(report: dict[str, Any]) -> None:
    assert report["turns"] == NUM_CONVERSATIONS * NUM_TURNS
    assert report["failed_turns"] == 0
    assert report["unaccounted_tokens"] == 0
    assert report["ray_spilled_bytes"] == 0
    assert report["ray_fallback_bytes"] == 0
    for tier, peak in report["peak_bytes"].items():
        assert peak <= report["budget_bytes"][tier]


def test_reuse_changes_no_answer_and_every_token_is_accounted_for(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, report = undisturbed
    check_accounts(report)
    assert report["answers_differing"] == 0
    assert report["hit_rate"] > 0.6
    assert set(report["recomputed_tokens"]) <= {"never_stored", "last_token", "computed_sooner"}
    assert all(len(ids) == ANSWER_TOKENS for ids in answers(out).values())
    rows = pq.read_table(out / "parquet").to_pylist()
    assert len(rows) == report["turns"]
    for row in rows:
        counts = [*row["reused_tokens"].values(), *row["recomputed_tokens"].values()]
        assert sum(count or 0 for count in counts) == row["prompt_tokens"]
    reuse_off = pq.read_table(out / "reuse_off" / "parquet").to_pylist()
    assert all(row["recomputed_tokens"]["reuse_off"] == row["prompt_tokens"] for row in reuse_off)


def test_returning_turns_reuse_all_of_their_history(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, _ = undisturbed
    rows = {
        (row["conversation_id"], row["turn"]): row
        for row in map(json.loads, (out / "turns.jsonl").read_text().splitlines())
    }
    for (conversation, turn), row in rows.items():
        if turn:
            before = rows[conversation, turn - 1]
            history = before["prompt_tokens"] + before["answer_tokens"] - 1  # the last token's KV was never computed
            accounts = (conversation, turn, row["reused_tokens"], row["recomputed_tokens"])
            assert num_found(row) == history, accounts


def test_the_shared_system_prompt_is_hit_across_sessions(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, _ = undisturbed
    first_turns = [json.loads(line) for line in (out / "turns.jsonl").read_text().splitlines()]
    reused = [sum(row["reused_tokens"].values()) for row in first_turns if row["turn"] == 0]
    assert sum(count >= 32 for count in reused) >= 1


def with_little_dram(model: Path, ssd: Path, *, keep_finished: bool) -> Config:
    return config_for(
        model, keep_finished=keep_finished, dram_bytes=300 * KIB, ssd_url=f"file://{ssd}", ssd_bytes=64 << 20
    )


@pytest.fixture(scope="module")
def on_ssd(
    local_ray: None, small_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder with the files and the answers that a cluster with little DRAM left; and its report. Not to be changed.

    Without HBM: all has to come from there, and what the store declines while it is in HBM is not offered again.
    """
    folder = tmp_path_factory.mktemp("on_ssd")
    config = with_little_dram(small_model, folder / "ssd", keep_finished=False)
    with bringup.running(config) as running:
        report = run_on(running, options_for(chats, folder / "out"), Listener())
        wait_until_at_rest(running)
    return folder, report


def test_little_dram_and_an_ssd_give_the_same_answers(
    undisturbed: tuple[Path, dict[str, Any]],
    on_ssd: tuple[Path, dict[str, Any]],
    small_model: Path,
    chats: Path,
    tmp_path: Path,
) -> None:
    folder, report = on_ssd
    check_accounts(report)
    assert answers(folder / "out") == answers(undisturbed[0])
    assert report["peak_bytes"]["dram"] <= 300 * KIB < report["stored_bytes"]["ssd"]
    assert report["reused_tokens"]["ssd"] > 0

    shutil.copytree(folder / "ssd", tmp_path / "ssd")
    config = with_little_dram(small_model, tmp_path / "ssd", keep_finished=False)
    again = run_batch(config, options_for(chats, tmp_path / "again"), Listener())
    check_accounts(again)
    assert answers(tmp_path / "again") == answers(undisturbed[0])
    for row in map(json.loads, (tmp_path / "again" / "turns.jsonl").read_text().splitlines()):
        accounts = (row["conversation_id"], row["turn"], row["reused_tokens"], row["recomputed_tokens"])
        assert num_found(row) == row["prompt_tokens"] - 1, accounts


def test_without_room_nothing_is_wrong(
    undisturbed: tuple[Path, dict[str, Any]], small_model: Path, chats: Path, tmp_path: Path
) -> None:
    config = config_for(small_model, dram_bytes=120 * KIB)
    report = run_batch(config, options_for(chats, tmp_path / "out"), Listener())
    check_accounts(report)
    assert answers(tmp_path / "out") == answers(undisturbed[0])
    assert {"evicted", "declined"} & set(report["recomputed_tokens"])


def test_two_replicas_share_the_store(
    undisturbed: tuple[Path, dict[str, Any]], small_model: Path, chats: Path, tmp_path: Path
) -> None:
    report = run_batch(config_for(small_model, replicas=2), options_for(chats, tmp_path / "out"), Listener())
    check_accounts(report)
    assert answers(tmp_path / "out") == answers(undisturbed[0])


def test_recorded_answers_can_be_the_history(cluster: bringup.Running, chats: Path, tmp_path: Path) -> None:
    options = options_for(chats, tmp_path / "out", history="recorded", compare=True)
    report = run_on(cluster, options, Listener())
    check_accounts(report)
    assert report["answers_differing"] == 0
    assert report["hit_rate"] > 0.5


def _kill_replica(cluster: bringup.Running) -> None:
    ray.kill(next(iter(cluster.replicas.values())), no_restart=False)


def _kill_scheduler(cluster: bringup.Running) -> None:
    ray.kill(cluster.scheduler, no_restart=False)


def _kill_store(cluster: bringup.Running) -> None:
    ray.kill(next(iter(cluster.stores.values())), no_restart=False)


def _kill_shard(cluster: bringup.Running) -> None:
    pid = cluster.replica_stats()[0]["pid"]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("harm", [_kill_replica, _kill_scheduler, _kill_store, _kill_shard])
def test_a_dead_actor_costs_time_and_nothing_else(
    harm: Callable[[bringup.Running], None],
    undisturbed: tuple[Path, dict[str, Any]],
    cluster: bringup.Running,
    chats: Path,
    tmp_path: Path,
) -> None:
    seen: list[Row] = []

    def turn_done(row: Row) -> None:
        seen.append(row)
        if len(seen) == 5:
            threading.Thread(target=harm, args=(cluster,)).start()

    report = run_on(cluster, options_for(chats, tmp_path / "out"), Listener(turn_done=turn_done))
    assert report["turns"] == NUM_CONVERSATIONS * NUM_TURNS
    assert report["failed_turns"] == 0
    assert report["unaccounted_tokens"] == 0
    assert answers(tmp_path / "out") == answers(undisturbed[0])


def test_preempted_turns_go_on_from_their_saved_chunks(
    cluster: bringup.Running, small_model: Path, chats: Path, tmp_path: Path
) -> None:
    """A pool that holds the prompts but not the answers: the scheduler is told to reserve nothing for those."""
    sampling = SamplingParams(max_new_tokens=150, ignore_eos=True)
    tree = asdict(config_for(small_model, dram_bytes=64 << 20))
    tree["model"]["kv_tokens"] = 1100
    tree["scheduler"]["answer_reserve"] = 0.0
    options = options_for(chats, tmp_path / "out", sampling=sampling, limit=3)
    report = run_batch(config_from(tree), options, Listener())
    assert (report["failed_turns"], report["unaccounted_tokens"]) == (0, 0)
    rows = map(json.loads, (tmp_path / "out" / "turns.jsonl").read_text().splitlines())
    assert any(row["attempts"] > 1 for row in rows), "nothing was preempted"
    run_on(cluster, options_for(chats, tmp_path / "calm", sampling=sampling, limit=3), Listener())
    assert answers(tmp_path / "out") == answers(tmp_path / "calm")


def test_corrupt_files_are_misses(
    undisturbed: tuple[Path, dict[str, Any]],
    on_ssd: tuple[Path, dict[str, Any]],
    small_model: Path,
    chats: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(on_ssd[0] / "ssd", tmp_path / "ssd")
    for file in (tmp_path / "ssd").rglob("*.arrow"):
        data = bytearray(file.read_bytes())
        data[-len(data) // 3] ^= 0x40
        file.write_bytes(data)
    config = with_little_dram(small_model, tmp_path / "ssd", keep_finished=True)
    report = run_batch(config, options_for(chats, tmp_path / "out"), Listener())
    assert report["failed_turns"] == 0
    assert report["unaccounted_tokens"] == 0
    assert answers(tmp_path / "out") == answers(undisturbed[0])
    assert report["recomputed_tokens"]["corrupt"] > 0


def test_a_prompt_beyond_the_window_ends_its_conversation_only(cluster: bringup.Running, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    long_one = {
        "id": "long",
        "messages": [{"role": "user", "content": "word " * 6000}, {"role": "user", "content": "?"}],
    }
    short_one = {"id": "short", "messages": [{"role": "user", "content": "Hello"}]}
    file.write_text(json.dumps(long_one) + "\n" + json.dumps(short_one) + "\nnot json\n")
    problems: list[str] = []
    listener = Listener(problem=lambda problem: problems.append(f"{problem.where}: {problem.what}"))
    report = run_on(cluster, options_for(file, tmp_path / "out"), listener)
    assert (report["turns"], report["failed_turns"], report["skipped_conversations"]) == (3, 2, 2)
    assert any(line.startswith(f"{file}:3: ") for line in problems)
    assert any(f"{file}:1: turn 0: the prompt has" in line for line in problems)


def test_strict_stops_at_the_first_problem(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": []}\n')
    with pytest.raises(InputError, match=r"chats\.jsonl:1"):
        run_batch(config_for(small_model), options_for(file, tmp_path / "out", strict=True), Listener())


def test_arrivals_and_think_times_take_their_time(cluster: bringup.Running, chats: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    options = options_for(chats, tmp_path / "out", limit=2, think_time_s=0.3, arrival_rate=5.0, seed=3)
    report = run_on(cluster, options, Listener())
    assert report["turns"] == 2 * NUM_TURNS
    assert time.monotonic() - began > 0.5
