"""How much of loading a turn sees: layer by layer where loading is the faster, from the tail where it is the slower.

The tier is memory behind a throttle, so that its speed is known and costs no cycles. `exposed`: TTFT with the load
less TTFT with the history in HBM, as a share of the load's time. `ideal`: T_c T_io / (T_c + T_io) (Cake, ICML 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from actors.engine.loading import LoadedModel
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target
from cluster.bench.timing import side_by_side
from cluster.bench.turns import Throttle, Timed, TurnBench

HISTORY, NEW, FEW = 2048, 512, 16
LOAD_SHARES = (0.25, 0.5, 0.9)
"""Load time as a share of the new tokens' compute time: below 1 it can be hidden."""
LOAD_TIMES = (0.5, 1.0, 2.0)
"""Load time as a multiple of the time to recompute the history."""
MAX_EXPOSED, MAX_TO_IDEAL = 0.05, 1.15


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A load that could be hidden."""

    share: float
    load_s: float
    lone: float
    """Exposed, with nothing else to do."""
    behind: float
    """Exposed, behind another turn's prefill."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """A load that could not."""

    load_s: float
    compute_s: float
    took_s: float
    to_ideal: float
    num_computed: int


def run(options: BenchOptions) -> Result:
    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device=options.computed_device)
    history, new, few = (256, 64, 8) if options.quick else (HISTORY, NEW, FEW)
    bench = TurnBench(loaded, history, num_threads=options.threads, quick=options.quick)
    try:
        hidden = _measure_hidden(options, bench, new)
        met = _measure_met(options, bench, few)
    finally:
        bench.close()
    return _result(options, bench, new, few, hidden, met)


def _measure_hidden(options: BenchOptions, bench: TurnBench, new: int) -> list[Hidden]:
    alone, both = _in_hbm(bench, new, behind=False), _in_hbm(bench, new, behind=True)
    compute_s = median(side_by_side({"hbm": alone}, options.repeats)["hbm"])
    measured = []
    for share in LOAD_SHARES:
        options.progress(f"layer by layer, load {share:.0%} of compute")
        throttle = Throttle(bench.history_bytes / (share * compute_s), f"throttled-{share}")
        load_s = bench.history_bytes / throttle.bytes_per_s
        samples = side_by_side(
            {
                "hbm": alone,
                "loaded": _loaded(bench, new, throttle, behind=False),
                "hbm_behind": both,
                "loaded_behind": _loaded(bench, new, throttle, behind=True),
            },
            options.repeats,
            warm_ups=2,
        )
        measured.append(
            Hidden(
                share=share,
                load_s=load_s,
                lone=_exposed(samples["loaded"], samples["hbm"], load_s),
                behind=_exposed(samples["loaded_behind"], samples["hbm_behind"], load_s),
            )
        )
    return measured


def _measure_met(options: BenchOptions, bench: TurnBench, few: int) -> list[Met]:
    hbm = _in_hbm(bench, few, behind=False)

    def recompute() -> float:
        return bench.run((*bench.history, *bench.tokens(few)), reuse=False).ttft_s

    base = side_by_side({"hbm": hbm, "recompute": recompute}, options.repeats)
    compute_s = median(base["recompute"]) - median(base["hbm"])
    measured = []
    for times in LOAD_TIMES:
        options.progress(f"from the tail, load {times:g}x recompute")
        throttle = Throttle(bench.history_bytes / (times * compute_s), f"slow-{times}")
        turns: list[Timed] = []
        samples = side_by_side(
            {"hbm": hbm, "recompute": recompute, "met": _loaded(bench, few, throttle, behind=False, turns=turns)},
            options.repeats,
        )
        load_s = bench.history_bytes / throttle.bytes_per_s
        rounds = list(zip(samples["hbm"], samples["recompute"], samples["met"], strict=True))
        to_ideal = [
            (met - base_s) * (load_s + full - base_s) / (load_s * (full - base_s)) for base_s, full, met in rounds
        ]
        num_computed = [len(bench.history) - turn.started.num_loaded for turn in turns]
        measured.append(
            Met(
                load_s=load_s,
                compute_s=median(full - base_s for base_s, full, _ in rounds),
                took_s=median(met - base_s for base_s, _, met in rounds),
                to_ideal=median(to_ideal),
                num_computed=int(median(num_computed)),
            )
        )
    return measured


def _in_hbm(bench: TurnBench, new: int, *, behind: bool) -> Callable[[], float]:
    def once() -> float:
        bench.warm_hbm()
        other = bench.tokens(512) if behind else None
        return bench.run_behind(other, (*bench.history, *bench.tokens(new))).ttft_s

    return once


def _loaded(
    bench: TurnBench, new: int, throttle: Throttle, *, behind: bool, turns: list[Timed] | None = None
) -> Callable[[], float]:
    def once() -> float:
        bench.engine.forget_kept()
        other = bench.tokens(512) if behind else None
        turn = bench.run_behind(other, (*bench.history, *bench.tokens(new)), bench.sources(throttle))
        if turns is not None:
            turns.append(turn)
        return turn.ttft_s

    return once


def _exposed(loaded: list[float], hbm: list[float], load_s: float) -> float:
    return median((with_load - without) / load_s for with_load, without in zip(loaded, hbm, strict=True))


def _result(
    options: BenchOptions, bench: TurnBench, new: int, few: int, hidden: list[Hidden], met: list[Met]
) -> Result:
    num_layers = len(bench.engine.loaded.layers)
    targets = [
        Target(
            measure=f"exposed share of a load of {h.share:g} x compute, behind another turn",
            comparison="<=",
            bound=MAX_EXPOSED,
            value=h.behind,
        )
        for h in hidden
    ]
    targets += [
        Target(
            measure=f"exposed share of a load of {h.share:g} x compute, on an idle engine",
            comparison="<=",
            bound=MAX_EXPOSED,
            value=h.lone,
            note=f"of the first layer (1/{num_layers} = {1 / num_layers:.1%}) only its own projections hide some",
        )
        for h in hidden
    ]
    targets += [
        Target(
            measure=f"time / ideal where loading takes {m.load_s / m.compute_s:.1f} x recomputing",
            comparison="<=",
            bound=MAX_TO_IDEAL,
            value=m.to_ideal,
        )
        for m in met
    ]
    return Result(
        name="overlap",
        setup=options.setup(
            history_tokens=len(bench.history), new_tokens=new, few_tokens=few, chunk_tokens=bench.chunk_tokens
        ),
        tables=[
            Table(
                title=f"Layer by layer, {new} new tokens: what a turn sees of its load",
                columns=("load / compute", "load ms", "exposed, idle engine", "exposed, behind a turn"),
                rows=[[h.share, 1e3 * h.load_s, h.lone, h.behind] for h in hidden],
            ),
            Table(
                title="From the tail: load and compute meet",
                columns=("load ms", "recompute ms", "together ms", "/ ideal", "tokens computed"),
                rows=[
                    [
                        1e3 * m.load_s,
                        1e3 * m.compute_s,
                        1e3 * m.took_s,
                        m.to_ideal,
                        m.num_computed,
                    ]
                    for m in met
                ],
            ),
        ],
        figures={
            "hidden": [
                {"load_to_compute": h.share, "load_s": h.load_s, "exposed_idle": h.lone, "exposed_behind": h.behind}
                for h in hidden
            ],
            "met": [
                {
                    "load_s": m.load_s,
                    "compute_s": m.compute_s,
                    "together_s": m.took_s,
                    "to_ideal": m.to_ideal,
                    "tokens_computed": m.num_computed,
                }
                for m in met
            ],
        },
        targets=targets,
        limits=(
            f"Layer by layer a turn that comes to an idle engine sees the load of the first of {num_layers} layers, but"
            " for the embedding and the projections in front of the first attention.",
            "Everything else it sees is the loader's own work (verify, rotate, copy), which takes its cycles from the"
            " cores that compute. The throttled link stands still meanwhile, as a synchronous read does.",
            "From the tail the two meet at the beginning of a chunk: up to half a chunk of load or compute is lost.",
        ),
    )
