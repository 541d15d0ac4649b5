"""Rows of the laboratory for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from policies.simulator.lab.naming import short_name

Row = Mapping[str, Any]
NONE = "–"


def hit_rates(rows: Sequence[Row]) -> Table:
    """One line per trace, level and capacity."""
    names = list(dict.fromkeys(name for row in rows for name in row["policies"]))
    table = _table("token hit rate, % (untimed); regret: 0 is LRU, 1 the oracle", ("trace", "level"))
    for column in ("capacity", "LRU", *(c for name in names for c in (short_name(name), "regret")), "oracle"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [_trace(row), row["level"], f"{row['capacity_percent']:g} %", _percent(row.get("lru"))]
        for name in names:
            figures = row["policies"].get(name, {})
            cells += [_percent(figures.get("hit_rate")), _number(figures.get("regret"))]
        table.add_row(*map(Text, [*cells, _percent(row.get("oracle"))]))
    return table


SCORE_COLUMNS = ("hit %", "regret", "DRAM %", "TTFT p50", "p95", "wait", "wait p95", "queue", "max", "moved", "faults")


def scores(rows: Sequence[Row]) -> Table:
    """One line per simulated run."""
    shown = [row for row in rows if not row.get("error")]
    with_load = len({row.get("load") for row in rows}) > 1
    with_capacity = len({row.get("capacity_percent") for row in rows}) > 1
    with_trace = len({row["trace"] for row in rows}) > 1
    first = (["trace"] if with_trace else []) + ["eviction"]
    setups = ", ".join(dict.fromkeys(row["setup"] for row in shown)) if len(shown) and not with_load else ""
    table = _table(f"simulated runs{setups and f' on {setups}'} (seconds; hit and DRAM in % of tokens)", first)
    for column in (*(["load"] if with_load else []), *(["DRAM size"] if with_capacity else []), *SCORE_COLUMNS):
        table.add_column(column, justify="right")
    for row in shown:
        cells = ([_trace(row)] if with_trace else []) + [short_name(row["policy"] or row["policies"]["eviction"])]
        cells += [_number(row["load"])] if with_load else []
        cells += [f"{row['capacity_percent']:g} %"] if with_capacity else []
        table.add_row(*map(Text, cells + _score(row)))
    return table


def _score(row: Row) -> list[str]:
    times = [_seconds(row[name]) for name in ("ttft_p50_s", "ttft_p95_s", "wait_mean_s", "wait_p95_s")]
    queue = [f"{row['queue_mean']:.1f}", f"{row['queue_max']:,}"]
    faults = sum(row["policy_faults"].values())
    start = [_percent(row["hit_rate"]), _number(row.get("regret")), _percent(row["dram_share"])]
    return [*start, *times, *queue, _bytes(row["bytes_moved"]), str(faults) if faults else NONE]


def single(row: Row) -> Table:
    """One simulated run, figure by figure."""
    table = _table(f"{row['trace']} on {row['setup']}", ("", " "))
    table.show_header = False
    for kind, path in row["policies"].items():
        table.add_row(kind, Text(path))
    for name, value in zip(SCORE_COLUMNS, _score(row)):
        if name != "regret":
            table.add_row(name, value)
    for what, counts in (("reused from", row["reused"]), ("recomputed:", row["recomputed"])):
        for name, tokens in sorted(counts.items(), key=lambda item: -item[1]):
            share = tokens / max(1, row["input_tokens"])
            table.add_row(f"{what} {name.replace('_', ' ')}", f"{tokens:,} tokens, {share:.1%}")
    return table


def tallies(found: Row) -> Table:
    """Recorded decisions beside another scheduler's."""
    table = _table("OPEN LOOP: what would have been commanded on the recorded events, not what would have come of it")
    for column in ("", "recorded", "decided anew"):
        table.add_column(column, justify="left" if not column else "right")
    words = {"commands": "", "reused_tokens": "planned tokens from ", "recomputed_tokens": "planned recomputed: "}
    for part, prefix in words.items():
        one, other = found["recorded"][part], found["decided"][part]
        for name in sorted({*one, *other}):
            table.add_row(f"{prefix}{name}", f"{one.get(name, 0):,}", f"{other.get(name, 0):,}")
    return table


def _table(title: str, columns: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _trace(row: Row) -> str:
    return str(row["trace"]).rpartition("/")[2]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _number(value: float | str | None) -> str:
    return NONE if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
