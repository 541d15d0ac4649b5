import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from cluster.report import PassResult, build_report, differing, quantile, render
from cluster.results import Row

STORE = {
    "used_bytes": {"dram": 10, "ssd": 30},
    "budget_bytes": {"dram": 100, "ssd": 1000},
    "peak_bytes": {"dram": 90, "ssd": 30},
    "saved_bytes": 40,
    "fetched_bytes": {"ssd": 5},
    "demoted_bytes": {"ssd": 30},
    "failed_commands": 0,
    "ray_spilled_bytes": 0,
    "ray_fallback_bytes": 0,
}


def row(turn: int, ttft_s: float, queue_wait_s: float = 0.0) -> Row:
    return Row(
        conversation_id="c",
        turn=turn,
        where="a:1",
        prompt_tokens=10,
        answer="x",
        answer_token_ids=[turn, 2],
        finish_reason="length",
        reused_tokens={"dram": 6} if turn else {},
        recomputed_tokens={"never_stored": 4 if turn else 10},
        ttft_s=ttft_s,
        queue_wait_s=queue_wait_s,
        itl_mean_s=0.01,
        end_to_end_s=1.0,
    )


FAILED = replace(row(2, 0.0), error="gone", ttft_s=None, prompt_tokens=0, answer_token_ids=[], recomputed_tokens={})
WITH = PassResult(reuse=True, rows=[row(0, 1.0), row(1, 0.3, 0.2), FAILED], wall_s=2.0)
WITHOUT = PassResult(reuse=False, rows=[row(0, 1.0), row(1, 1.2, 0.2)], wall_s=4.0)


def test_every_prompt_token_of_an_answered_turn_is_accounted_for() -> None:
    report = build_report(WITH, None, [STORE], skipped=3)
    assert report["prompt_tokens"] == 20
    assert report["reused_tokens"] == {"dram": 6}
    assert report["recomputed_tokens"] == {"never_stored": 14}
    assert report["unaccounted_tokens"] == 0
    assert (report["turns"], report["failed_turns"], report["skipped_conversations"]) == (3, 1, 3)
    assert report["answers_differing"] is None


def test_ttft_with_and_without_queueing_and_reuse() -> None:
    report = build_report(WITH, WITHOUT, [STORE], skipped=0)
    returning = report["returning_ttft_s"]["p50"]
    assert round(returning["with_reuse"], 6) == 0.1
    assert round(returning["without_reuse"], 6) == 1.0
    assert report["ttft_s"]["p95"] == {"with_reuse": 1.0, "without_reuse": 1.2}


def test_a_turn_that_only_one_pass_answered_differs() -> None:
    assert differing(WITH.rows, WITHOUT.rows) == [("c", 2)]
    other = [row(0, 1.0), replace(row(1, 1.0), answer_token_ids=[9]), FAILED]
    assert differing(WITH.rows, other) == [("c", 1)]


def test_stores_of_several_nodes_are_summed() -> None:
    report = build_report(WITH, None, [STORE, STORE], skipped=0)
    assert report["stored_bytes"] == {"dram": 20, "ssd": 60}
    assert report["moved_bytes"] == {"saved": 80, "fetched": {"ssd": 10}, "demoted": {"ssd": 60}}


def test_the_report_is_json_and_a_table() -> None:
    report = build_report(WITH, WITHOUT, [STORE], skipped=0)
    assert json.loads(json.dumps(report)) == report | {"attempts": {"1": 3}}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert "10.0×" in text
    assert "reused from dram" in text
    assert "recomputed: never stored" in text


def test_what_the_scheduler_reports_is_shown_if_there_is_anything() -> None:
    report = build_report(WITH, None, [STORE], skipped=0)
    assert (report["policy_faults"], report["policy_fault_texts"], report["recording"]) == ({}, [], None)
    assert "policy faults" not in shown(report)
    assert "event log" not in shown(report)
    scheduler = {
        "policy_faults": {"Mine.victims": 1200, "Mine.add": 34},
        "policy_fault_texts": ["Mine.victims (mine.py:7) raised OSError [1200 times]", "another"],
        "recording": {"path": "/logs/a", "host": "h1", "num_events": 5678, "num_bytes": 9, "problem": ""},
        "chunks": 3,
    }
    report = build_report(WITH, None, [STORE], skipped=0, scheduler=scheduler)
    assert "chunks" not in report
    assert "1,234: Mine.victims (mine.py:7) raised OSError [1200 times], and 1 other kinds" in shown(report)
    assert "5,678 events in /logs/a on h1 " in shown(report)
    recording = {**scheduler["recording"], "problem": "full disk"}  # type: ignore[dict-item]
    report = build_report(WITH, None, [STORE], skipped=0, scheduler={**scheduler, "recording": recording})
    assert "5,678 events in /logs/a on h1, then no more: full disk" in shown(report)


def shown(report: dict[str, Any]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(range(100), 0.95) == 95
