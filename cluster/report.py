"""The closing report of a batch: pure arithmetic over rows and counters, and its two forms, a table and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from cluster.results import Row

SCHEDULER_FIGURES: dict[str, Any] = {"policy_faults": {}, "policy_fault_texts": [], "recording": None}


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """One run over the input, with reuse or without."""

    reuse: bool
    rows: list[Row]
    wall_s: float


def quantile(values: Iterable[float], q: float) -> float | None:
    """The nearest-rank quantile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def differing(one: Sequence[Row], other: Sequence[Row]) -> list[tuple[str, int]]:
    """Turns whose answers are not the same tokens, or that only one of the two has."""
    ours = {(row.conversation_id, row.turn): row.answer_token_ids for row in one}
    theirs = {(row.conversation_id, row.turn): row.answer_token_ids for row in other}
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def build_report(
    main: PassResult,
    other: PassResult | None,
    stores: Sequence[dict[str, Any]],
    skipped: int,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything as plain values; the names are documented in docs/batch.md. `scheduler`: its snapshot."""
    rows = main.rows
    good = [row for row in rows if not row.failed]
    reused = _sum(row.reused_tokens for row in good)
    recomputed = _sum(row.recomputed_tokens for row in good)
    prompt_tokens = sum(row.prompt_tokens for row in good)
    return {
        "turns": len(rows),
        "failed_turns": len(rows) - len(good),
        "conversations": len({row.conversation_id for row in rows}),
        "skipped_conversations": skipped,
        "answers_differing": len(differing(rows, other.rows)) if other else None,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": sum(row.answer_tokens for row in good),
        "reused_tokens": reused,
        "recomputed_tokens": recomputed,
        "unaccounted_tokens": prompt_tokens - sum(reused.values()) - sum(recomputed.values()),
        "hit_rate": _share(sum(reused.values()), prompt_tokens),
        "hit_rate_by_tier": {tier: _share(count, prompt_tokens) for tier, count in reused.items()},
        "ttft_s": _both(main, other, _ttft),
        "ttft_without_queue_s": _both(main, other, _ttft_without_queue),
        "returning_ttft_s": _both(main, other, _returning_ttft),
        "itl_s": _both(main, other, lambda row: row.itl_mean_s),
        "wall_s": {"with_reuse": main.wall_s, "without_reuse": other.wall_s if other else None},
        "tokens_per_s": {"with_reuse": _rate(main), "without_reuse": _rate(other) if other else None},
        "attempts": Counter(row.attempts for row in rows),
        "retried_tokens": sum(row.retried_tokens for row in rows),
        **_store_totals(stores),
        **{name: (scheduler or {}).get(name) or empty for name, empty in SCHEDULER_FIGURES.items()},
    }


def render(report: dict[str, Any]) -> Group:
    """The report as tables for a terminal."""
    return Group(_summary_table(report), _speed_table(report), _token_table(report), _store_table(report))


def _ttft(row: Row) -> float | None:
    return row.ttft_s


def _ttft_without_queue(row: Row) -> float | None:
    return None if row.ttft_s is None else row.ttft_s - row.queue_wait_s


def _returning_ttft(row: Row) -> float | None:
    return _ttft_without_queue(row) if row.turn > 0 else None


def _both(main: PassResult, other: PassResult | None, measure: Any) -> dict[str, dict[str, float | None]]:
    def at(run: PassResult | None, q: float) -> float | None:
        values = [measure(row) for row in run.rows if not row.failed] if run else []
        return quantile([value for value in values if value is not None], q)

    return {
        name: {"with_reuse": at(main, q), "without_reuse": at(other, q)} for name, q in (("p50", 0.5), ("p95", 0.95))
    }


def _rate(run: PassResult) -> float:
    return sum(row.prompt_tokens + row.answer_tokens for row in run.rows) / max(run.wall_s, 1e-9)


def _sum(maps: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in maps:
        total.update(one)
    return {name: count for name, count in total.items() if count}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _store_totals(stores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "stored_bytes": _sum(store["used_bytes"] for store in stores),
        "peak_bytes": _sum(store["peak_bytes"] for store in stores),
        "budget_bytes": _sum(store["budget_bytes"] for store in stores),
        "moved_bytes": {
            "saved": sum(store["saved_bytes"] for store in stores),
            "fetched": _sum(store["fetched_bytes"] for store in stores),
            "demoted": _sum(store["demoted_bytes"] for store in stores),
        },
        "failed_store_commands": sum(store["failed_commands"] for store in stores),
        "ray_spilled_bytes": sum(store["ray_spilled_bytes"] for store in stores),
        "ray_fallback_bytes": sum(store["ray_fallback_bytes"] for store in stores),
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def _summary_table(report: dict[str, Any]) -> Table:
    table = _two_columns("Batch")
    table.add_row("turns", f"{report['turns']:,} in {report['conversations']:,} conversations")
    table.add_row("failed turns", f"{report['failed_turns']:,}")
    table.add_row("skipped conversations", f"{report['skipped_conversations']:,}")
    if report["answers_differing"] is not None:
        table.add_row("answers that differ without reuse", f"{report['answers_differing']:,}")
    table.add_row("prompt tokens", f"{report['prompt_tokens']:,}, {report['hit_rate']:.1%} reused")
    if report["policy_faults"]:
        first, *others = report["policy_fault_texts"]
        more = f", and {len(others)} other kinds" if others else ""
        table.add_row("policy faults", f"{sum(report['policy_faults'].values()):,}: {first}{more}")
    if report["recording"]:
        table.add_row("event log", _describe_recording(report["recording"]))
    return table


def _describe_recording(recording: Mapping[str, Any]) -> str:
    what = f"{recording['num_events']:,} events in {recording['path']} on {recording['host']}"
    return f"{what}, then no more: {recording['problem']}" if recording["problem"] else what


def _speed_table(report: dict[str, Any]) -> Table:
    compared = report["wall_s"]["without_reuse"] is not None
    table = Table(title="Speed", title_justify="left")
    table.add_column("measure")
    table.add_column("with reuse", justify="right")
    if compared:
        table.add_column("reuse off", justify="right")
        table.add_column("ratio", justify="right")
    names = {
        "returning_ttft_s": "TTFT of returning turns, without queueing",
        "ttft_without_queue_s": "TTFT, without queueing",
        "ttft_s": "TTFT, with queueing",
        "itl_s": "ITL",
    }
    for key, label in names.items():
        for q in ("p50", "p95"):
            pair = report[key][q]
            _speed_row(table, f"{label} {q}", pair, compared, lambda s: f"{s * 1e3:,.0f} ms", lower_is_better=True)
    _speed_row(table, "tokens/s", report["tokens_per_s"], compared, lambda r: f"{r:,.0f}", lower_is_better=False)
    _speed_row(table, "wall time", report["wall_s"], compared, lambda s: f"{s:,.1f} s", lower_is_better=True)
    return table


def _speed_row(
    table: Table, label: str, pair: dict[str, float | None], compared: bool, show: Any, *, lower_is_better: bool
) -> None:
    ours, theirs = pair["with_reuse"], pair["without_reuse"]
    cells = [label, show(ours) if ours is not None else "–"]
    if compared:
        cells.append(show(theirs) if theirs is not None else "–")
        ratio = (theirs / ours if lower_is_better else ours / theirs) if ours and theirs else None
        cells.append(f"{ratio:.1f}×" if ratio else "–")
    table.add_row(*cells)


def _token_table(report: dict[str, Any]) -> Table:
    table = _two_columns("Prompt tokens")
    for tier, count in report["reused_tokens"].items():
        table.add_row(f"reused from {tier}", f"{count:,} ({report['hit_rate_by_tier'][tier]:.1%})")
    for cause, count in sorted(report["recomputed_tokens"].items(), key=lambda item: -item[1]):
        table.add_row(f"recomputed: {cause.replace('_', ' ')}", f"{count:,}")
    return table


def _store_table(report: dict[str, Any]) -> Table:
    table = _two_columns("Store")
    for tier, budget in report["budget_bytes"].items():
        peak, stored = report["peak_bytes"].get(tier, 0), report["stored_bytes"].get(tier, 0)
        table.add_row(tier, f"{_mib(stored)} stored, {_mib(peak)} at most, budget {_mib(budget)}")
    moved = report["moved_bytes"]
    table.add_row("saved from replicas", _mib(moved["saved"]))
    for verb in ("fetched", "demoted"):
        for tier, count in moved[verb].items():
            table.add_row(f"{verb} {'from' if verb == 'fetched' else 'to'} {tier}", _mib(count))
    table.add_row(
        "spilled by Ray / fallback", f"{report['ray_spilled_bytes']:,} / {report['ray_fallback_bytes']:,} bytes"
    )
    return table


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:,.1f} MiB"
