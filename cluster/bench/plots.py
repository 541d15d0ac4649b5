"""One picture per benchmark, drawn from its JSON alone. Needs matplotlib, the `lab` extra.

A benchmark without a drawing of its own, or without the figures that it needs, gets its targets drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

GOOD, BAD, NEUTRAL, ACCENT = "#2e8b57", "#c0504d", "#8a8f98", "#2f6db3"
WIDTH, DPI = 8.0, 120
MAX_LABEL = 44
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # words stay readable over the line of a target


class PlotsMissing(RuntimeError):  # noqa: N818 - named like what it says
    """matplotlib is not installed."""


def draw(made: Mapping[str, Any], folder: Path) -> Path | None:
    """Draws what `Result.as_json()` made into `folder`/NAME.png. None if there is nothing to draw. PlotsMissing."""
    figure_of = DRAWINGS.get(made["benchmark"], targets)
    try:
        figure = figure_of(made)
    except (KeyError, TypeError, ValueError, IndexError):  # figures of another shape than this drawing knows
        figure = targets(made) if made.get("targets") else None
    if figure is None:
        return None
    path = folder / f"{made['benchmark']}.png"
    figure.savefig(path, dpi=DPI)
    return path


# --- drawings ---------------------------------------------------------------------------------------------------------


def targets(made: Mapping[str, Any]) -> Any:
    """How far each measure is from its target: to the right of the line is better."""
    known = [target for target in made.get("targets", ()) if target["value"] is not None]
    if not known:
        return None
    figure, axes = _figure(made, "measured against the target", rows=len(known))
    shares = [_share(target) for target in known]
    colors = [GOOD if target["holds"] else BAD for target in known]
    labels = [f"{target['value']:.3g}  (target {target['target']})" for target in known]
    _bars(axes, [target["measure"] for target in known], shares, labels, colors)
    _line(axes, 1.0, "")
    axes.set_xlabel("1 = the target is just met, more is better")
    return figure


def tiers(made: Mapping[str, Any]) -> Any:
    figures = made["figures"]
    names = {case: words for case, words in TIER_WORDS.items() if case in figures["share_of_baseline"]}
    shares = [figures["share_of_baseline"][case] for case in names]
    speeds, baseline = figures["gigabytes_per_s"], figures["baseline"]
    labels = [f"{speeds[case]:.2f} of {speeds[baseline[case]]:.2f} GB/s" for case in names]
    figure, axes = _figure(made, "speed ÷ memcpy (DRAM) or raw file (SSD)", rows=len(names))
    colors = [NEUTRAL if case in TIER_PARTS else GOOD if share >= 0.8 else BAD for case, share in zip(names, shares)]
    _bars(axes, list(names.values()), shares, labels, colors)
    _line(axes, 0.8, "target 0.8")
    axes.set_xlabel("share of the hardware's speed (grey: parts of a save)")
    return figure


def save(made: Mapping[str, Any]) -> Any:
    steps, cpu = made["figures"]["steps_s"], made["figures"]["cpu_s"]
    pairs = {}
    for name, words in SAVE_WORDS.items():
        pairs[f"{words}\nstep time"] = _pairs(steps[name]["on"], steps[name]["off"])
        pairs[f"{words}\nCPU time"] = _pairs(cpu[name]["on"], cpu[name]["off"])
    return _strips(made, "with saving ÷ without", pairs, 1.02, "target ≤ 1.02")


def overhead(made: Mapping[str, Any]) -> Any:
    pairs = {}
    for store, words in STORE_WORDS.items():
        rates, cpu = made["figures"][store]["tokens_per_s"], made["figures"][store]["cpu_s"]
        pairs[f"{words}\nthroughput, on ÷ off"] = _pairs(rates["on"], rates["off"])
        pairs[f"{words}\nCPU time, off ÷ on"] = _pairs(cpu["off"], cpu["on"])
    return _strips(made, "traffic that never hits, with a store against without", pairs, 0.98, "target ≥ 0.98")


def ttft(made: Mapping[str, Any]) -> Any:
    """Bars of milliseconds by where the history came from."""
    samples, ratios = made["figures"]["ttft_s"], made["figures"]["ratio"]
    names = [name for name in TTFT_WORDS if name in samples]
    times = [1e3 * median(samples[name]) for name in names]
    labels = [
        f"{ms:,.0f} ms" + ("" if name == "recompute" else f"   speed-up {ratios[name]:.1f}")
        for name, ms in zip(names, times)
    ]
    figure, axes = _figure(made, "time to first token of a returning turn", rows=len(names))
    bars = axes.barh([TTFT_WORDS[name] for name in names], times, color=[NEUTRAL] + [ACCENT] * (len(names) - 1))
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.3)
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    setup = made["setup"]
    axes.set_xlabel(f"ms: {setup['history_tokens']:,} tokens of history, {setup['new_tokens']} new")
    return figure


def overlap(made: Mapping[str, Any]) -> Any:
    """Left: the share of a load that a turn sees. Right: load and compute together against the ideal."""
    hidden, met = made["figures"]["hidden"], made["figures"]["met"]
    figure, left = _figure(made, "what a turn sees of loading its history", rows=7, columns=2)
    right = figure.axes[1]
    shares = [entry["load_to_compute"] for entry in hidden]
    for key, words, color in (
        ("exposed_idle", "idle engine", ACCENT),
        ("exposed_behind", "behind another turn", GOOD),
    ):
        left.plot(shares, [100 * entry[key] for entry in hidden], "o-", color=color, label=words)
    left.axhline(5, color=BAD, linestyle="--", linewidth=1.2, label="target ≤ 5 %")
    left.axhline(0, color=NEUTRAL, linewidth=0.8)
    left.set_xlabel("load time ÷ compute time of the new tokens")
    left.set_ylabel("exposed share of the load, %")
    left.legend(fontsize=8, frameon=False)
    ratios = [entry["load_s"] / entry["compute_s"] for entry in met]
    for key, words, color in (("load_s", "load alone", "#b8bcc4"), ("compute_s", "recompute alone", NEUTRAL)):
        right.plot(ratios, [entry[key] for entry in met], "o-", color=color, label=words)
    right.plot(ratios, [entry["together_s"] for entry in met], "o-", color=ACCENT, linewidth=2, label="together")
    ideal = [entry["load_s"] * entry["compute_s"] / (entry["load_s"] + entry["compute_s"]) for entry in met]
    right.plot(ratios, ideal, "k--", linewidth=1, label="ideal")
    right.set_ylim(bottom=0)
    right.set_xlabel("load time ÷ recompute time of the history")
    right.set_ylabel("seconds until the history is there")
    right.legend(fontsize=8, frameon=False)
    return figure


def engine(made: Mapping[str, Any]) -> Any:
    """The targets are ratios to transformers: bars with the line at 1."""
    return targets(made)


def workload(made: Mapping[str, Any]) -> Any:
    """Mean TTFT by turn number; dots are as large as there are turns."""
    by_turn = made["figures"]["ttft_by_turn"]
    figure, axes = _figure(made, "time to first token by turn, without queueing", rows=8)
    turns, sizes = [each["turn"] for each in by_turn], [6 + 3 * each["count"] for each in by_turn]
    for key, words, color in (("off_s", "reuse off", NEUTRAL), ("on_s", "reuse on", ACCENT)):
        times = [1e3 * each[key] for each in by_turn]
        axes.plot(turns, times, color=color, linewidth=1.5, label=words)
        axes.scatter(turns, times, s=sizes, color=color, alpha=0.6)
    reduction = made["figures"]["ttft_reduction"]["mean"]
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"turn of its conversation; mean of all turns: {100 * reduction:.0f} % less with reuse")
    axes.set_ylabel("mean TTFT, ms")
    axes.legend(fontsize=9, frameon=False)
    return figure


DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ttft": ttft,
    "overlap": overlap,
    "save": save,
    "tiers": tiers,
    "engine": engine,
    "overhead": overhead,
    "workload": workload,
}
TTFT_WORDS = {
    "recompute": "recomputed",
    "hbm": "in HBM",
    "dram": "in DRAM",
    "ssd": "on SSD, cached",
    "ssd_cold": "on SSD, not cached",
}
STORE_WORDS = {"dram": "DRAM", "ssd": "DRAM and SSD"}
TIER_WORDS = {
    "encode": "encode",
    "checksum": "checksum alone",
    "put": "ray.put",
    "export": "export by an actor",
    "save": "DRAM: save",
    "load": "DRAM: load",
    "load_2": "DRAM: load, 2 threads",
    "ssd_write": "SSD: write, fsync",
    "ssd_write_4": "SSD: write, fsync, 4 threads",
    "ssd_read": "SSD: read, cached",
    "ssd_read_cold": "SSD: read, not cached",
}
TIER_PARTS = ("encode", "checksum", "put", "export")
SAVE_WORDS = {"prefill": "prefill", "decode_1": "decode, batch 1", "decode_8": "decode, batch 8"}


# --- parts ------------------------------------------------------------------------------------------------------------


def _figure(made: Mapping[str, Any], title: str, rows: int = 6, columns: int = 1) -> tuple[Any, Any]:
    """A figure with room for `rows` bars and its first axes; what was measured on top, where in small print."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing('matplotlib is not installed: pip install "reprise[lab]"') from None
    figure = Figure(figsize=(WIDTH, 1.7 + 0.36 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{made['benchmark']}: {title}", fontsize=12, fontweight="bold")
    setup = made.get("setup", {})
    where = [str(setup[name]) for name in ("machine", "dtype") if name in setup]
    where += [f"{setup[name]} {name}" for name in ("threads", "repeats") if name in setup]
    where += ["QUICK: the figures mean nothing"] if setup.get("quick") else []
    words = f"{Path(str(setup.get('model', ''))).name} · " + ", ".join(where)
    figure.supxlabel(words, fontsize=8, color="#555555")
    for axes in (figure.add_subplot(1, columns, i + 1) for i in range(columns)):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, figure.axes[0]


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str], colors: Sequence[str]
) -> None:
    """Horizontal bars, the first on top, each with its label behind it; long ones are cut, and say by how much."""
    limit = max(1.3, min(max(values), 4.0))
    shown = [min(value, limit) for value in values]
    bars = axes.barh(range(len(names)), shown, color=colors, height=0.62)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, MAX_LABEL) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, limit * 1.42)
    marked = [f"{label} →" if value > limit else label for label, value in zip(labels, values)]
    for text in axes.bar_label(bars, marked, padding=4, fontsize=8):
        text.set_bbox(_WHITE)
        text.set_zorder(4)


def _strips(made: Mapping[str, Any], title: str, pairs: Mapping[str, Sequence[float]], bound: float, words: str) -> Any:
    """One column of dots per name, a dot for each pair, a bar at the median."""
    figure, axes = _figure(made, title, rows=8)
    for x, ratios in enumerate(pairs.values()):
        middle = median(ratios)
        axes.scatter([x] * len(ratios), ratios, color=ACCENT, alpha=0.45, s=26, zorder=2)
        axes.plot([x - 0.22, x + 0.22], [middle, middle], color=ACCENT, linewidth=3, zorder=3)
        axes.annotate(f"{middle:.3f}", (x + 0.25, middle), va="center", fontsize=9, color=ACCENT, bbox=_WHITE)
    axes.axhline(1.0, color=NEUTRAL, linewidth=0.8)
    axes.axhline(bound, color=BAD, linestyle="--", linewidth=1.2)
    axes.annotate(words, (-0.48, bound), va="bottom", ha="left", fontsize=8, color=BAD)
    axes.set_xticks(range(len(pairs)), list(pairs), fontsize=9)
    axes.set_xlim(-0.5, len(pairs) - 0.4)
    axes.set_ylabel("a dot is a pair of neighbours in time; bar: median", fontsize=8)
    return figure


def _line(axes: Any, at: float, words: str) -> None:
    axes.axvline(at, color="#333333", linestyle="--", linewidth=1)
    if words:
        axes.annotate(words, (at, -0.75), ha="center", fontsize=8, annotation_clip=False)


def _pairs(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _share(target: Mapping[str, Any]) -> float:
    """Value over bound, the other way round where less is better."""
    comparison, bound = str(target["target"]).split()
    value = float(target["value"])
    if comparison == ">=":
        return value / float(bound)
    return float(bound) / value if value > 0 else float("inf")
