"""Pictures of rows. Needs matplotlib, the `lab` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.simulator.lab.naming import short_name

Row = Mapping[str, Any]
DPI = 120
COLORS = ("#2f6db3", "#2e8b57", "#c0504d", "#8064a2", "#d08c2e", "#3aa6a6")
NEUTRAL = "#8a8f98"


class PlotsMissing(RuntimeError):  # noqa: N818 - named like what it says
    """matplotlib is not installed."""


def draw_hit_rates(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Hit rate by capacity, the oracle as ceiling: one picture per trace and level."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["trace"], row["level"]), []).append(row)
    paths = []
    for (trace, level), group in groups.items():
        figure, (axes,) = _figure(f"{trace}: token hit rate, {level} level", 1)
        percents = [row["capacity_percent"] for row in group]
        ceiling = _percents([row.get("oracle") for row in group])
        axes.plot(percents, ceiling, "k--", label="oracle")
        axes.fill_between(percents, ceiling, 100, color="#eeeeee")
        axes.plot(percents, _percents([row.get("lru") for row in group]), "o-", color=NEUTRAL, label="Lru")
        for color, name in zip(_colors(), group[0]["policies"]):
            rates = [row["policies"][name]["hit_rate"] for row in group]
            axes.plot(percents, _percents(rates), "o-", color=color, label=short_name(name))
        axes.set_ylim(0, 100)
        _finish(axes, "capacity, % of the footprint", "hit rate, % of prompt tokens")
        paths.append(_save(figure, folder / f"hit_rate_{_file_name(trace)}_{level}.png"))
    return paths


def draw_loads(rows: Sequence[Row], folder: Path) -> list[Path]:
    """TTFT and queue by load, a line per policy (and size of DRAM)."""
    lines: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        if not row.get("error"):
            lines.setdefault((row["policy"], row["capacity_percent"]), []).append(row)
    if not lines:
        return []
    figure, (left, right) = _figure(f"{rows[0]['trace']}: by offered load", 2)
    for color, ((policy, percent), line) in zip(_colors(), lines.items()):
        label = short_name(policy) + (f", {percent:g} %" if percent is not None else "")
        loads = [row["load"] for row in line]
        left.plot(loads, [row["ttft_p50_s"] for row in line], "o-", color=color, label=f"{label}, p50")
        left.plot(loads, [row["ttft_p95_s"] for row in line], "o:", color=color, alpha=0.6, label=f"{label}, p95")
        right.plot(loads, [row["queue_mean"] for row in line], "o-", color=color, label=label)
    _finish(left, "offered load", "TTFT, s")
    _finish(right, "offered load", "mean number of waiting turns")
    return [_save(figure, folder / "load.png")]


def draw_causes(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Where each recomputed token was lost: a bar per run, in shares of the prompt tokens."""
    runs = [row for row in rows if row.get("recomputed") is not None]
    if not runs:
        return []
    figure, (axes,) = _figure(f"{runs[0]['trace']}: where recomputed tokens were lost", 1)
    causes = sorted({cause for row in runs for cause in row["recomputed"]})
    left = [0.0] * len(runs)
    for color, cause in zip(_colors(), causes):
        shares = [100 * row["recomputed"].get(cause, 0) / max(1, row["input_tokens"]) for row in runs]
        axes.barh(range(len(runs)), shares, left=left, color=color, label=cause.replace("_", " "))
        left = [a + b for a, b in zip(left, shares)]
    axes.set_yticks(range(len(runs)), [_run_name(row) for row in runs], fontsize=8)
    axes.invert_yaxis()
    _finish(axes, "% of prompt tokens", "")
    return [_save(figure, folder / "recomputed.png")]


def _run_name(row: Row) -> str:
    name = short_name(row["policy"] or row["policies"]["eviction"])
    load, percent = row.get("load"), row.get("capacity_percent")
    return name + (f", load {load}" if load is not None else "") + (f", {percent:g} %" if percent is not None else "")


def _figure(title: str, num_columns: int) -> tuple[Any, Sequence[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing('matplotlib is not installed: pip install "reprise[lab]"') from None
    figure = Figure(figsize=(4 + 4 * num_columns, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    for number in range(num_columns):
        figure.add_subplot(1, num_columns, number + 1).spines[["top", "right"]].set_visible(False)
    return figure, figure.axes


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _percents(shares: Sequence[float | None]) -> list[float]:
    return [float("nan") if share is None else 100 * share for share in shares]


def _colors() -> list[str]:
    return list(COLORS) * 10


def _file_name(trace: str) -> str:
    name = trace.rstrip("/").rpartition("/")[2].split(".")[0]
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]
