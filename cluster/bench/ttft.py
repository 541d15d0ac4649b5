"""Time to first token of a returning turn: history recomputed, against history in HBM, DRAM (Ray's store) and on SSD.

One engine, one conversation of 2,048 tokens, 64 new tokens each time; the four ways take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from actors.engine.loading import LoadedModel
from actors.engine.turns import RestoreSource
from actors.sources import restore_sources
from cluster.bench.dram import local_ray
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.ssd import forget_pages
from cluster.bench.timing import side_by_side
from cluster.bench.turns import Timed, TurnBench
from policies import messages as m
from storage.filesystem import FileTier, open_reader
from storage.parts import in_parts

HISTORY, NEW = 2048, 64
TARGETS = {"hbm": 10.0, "dram": 9.0, "ssd": 6.0}
MAX_DRAM_TO_HBM = 1.10
WORDS = {
    "recompute": "recomputed",
    "hbm": "from HBM",
    "dram": "from DRAM",
    "ssd": "from SSD, warm",
    "ssd_cold": "from SSD, cold",
}


def run(options: BenchOptions) -> Result:
    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device=options.computed_device)
    history, new = (256, 16) if options.quick else (HISTORY, NEW)
    bench = TurnBench(loaded, history, num_threads=options.threads, quick=options.quick)
    try:
        with options.scratch_folder("ttft") as folder, local_ray(), _Places(bench, folder).ready() as places:
            return _measure(options, bench, places, new)
    finally:
        bench.close()


class _Places:
    """The history's chunks in Ray's object store and in a folder, and how a turn reads them there."""

    def __init__(self, bench: TurnBench, folder: Path) -> None:
        self._bench, self._folder = bench, folder
        self._refs: list[Any] = []

    @contextmanager
    def ready(self) -> Iterator[_Places]:
        import ray

        tier = FileTier(self._folder, 1 << 40)
        for chunk in self._bench.chunks:
            self._refs.append(ray.put(in_parts(chunk.data)))
            tier.put(chunk.header.key, chunk.data)
        yield self
        self._refs.clear()
        tier.close()

    def sources(self, tier: m.Tier) -> tuple[RestoreSource, ...]:
        steps = tuple(
            m.RestoreStep(
                chunk=chunk.header.key,
                start=chunk.header.start,
                num_tokens=chunk.header.num_tokens,
                num_bytes=len(chunk.data),
                tier=tier,
                node_id="bench",
            )
            for chunk in self._bench.chunks
        )
        return restore_sources(steps, lambda: self._refs, {m.Tier.SSD: open_reader(str(self._folder))}, 30.0)

    def forget_pages(self) -> None:
        """The files leave the page cache."""
        forget_pages(self._folder)


def _measure(options: BenchOptions, bench: TurnBench, places: _Places, new: int) -> Result:
    turns: dict[str, list[Timed]] = {name: [] for name in WORDS}
    cases = {name: _case(name, bench, places, new, turns[name]) for name in WORDS}
    options.progress(f"{len(cases)} ways, {options.repeats} rounds")
    samples = side_by_side(cases, options.repeats, warm_ups=2)
    answers = _answers_agree(bench, places, new)
    ratios = {name: median_ratio(samples["recompute"], samples[name]) for name in samples}
    dram_to_hbm = median_ratio(samples["dram"], samples["hbm"])
    rows: list[list[str | float | int | None]] = [
        [WORDS[name], 1e3 * median(seconds), ratios[name], _reused(turns[name][-1])]
        for name, seconds in samples.items()
    ]
    targets = [
        Target(measure=f"TTFT recompute / {WORDS[name]}", comparison=">=", bound=bound, value=ratios[name])
        for name, bound in TARGETS.items()
    ]
    targets.append(
        Target(measure="TTFT from DRAM / from HBM", comparison="<=", bound=MAX_DRAM_TO_HBM, value=dram_to_hbm)
    )
    return Result(
        name="ttft",
        setup=options.setup(
            history_tokens=len(bench.history),
            new_tokens=new,
            chunk_tokens=bench.chunk_tokens,
            history_bytes=bench.history_bytes,
        ),
        tables=[Table(title="Time to first token", columns=("history", "p50 ms", "times faster", "reused"), rows=rows)],
        figures={"ttft_s": samples, "ratio": ratios, "dram_to_hbm": dram_to_hbm, "answers_agree": answers},
        targets=targets,
        limits=_limits(bench, samples),
    )


def _case(name: str, bench: TurnBench, places: _Places, new: int, turns: list[Timed]) -> Callable[[], float]:
    def once() -> float:
        prompt = (*bench.history, *bench.tokens(new))
        turn = _run_from(name, bench, places, prompt)
        turns.append(turn)
        return turn.ttft_s

    return once


def _run_from(name: str, bench: TurnBench, places: _Places, prompt: tuple[int, ...]) -> Timed:
    if name == "recompute":
        return bench.run(prompt, reuse=False)
    if name == "hbm":
        bench.warm_hbm()
        return bench.run(prompt)
    bench.engine.forget_kept()
    if name == "ssd_cold":
        places.forget_pages()
    return bench.run(prompt, places.sources(m.Tier.DRAM if name == "dram" else m.Tier.SSD))


def _answers_agree(bench: TurnBench, places: _Places, new: int) -> bool:
    """The same prompt all ways: the first token is the same (in float32; rounding may differ in 16 bits)."""
    prompt = (*bench.history, *bench.tokens(new))
    return len({_run_from(name, bench, places, prompt).token_id for name in WORDS}) == 1


def _reused(turn: Timed) -> str:
    in_hbm, was_loaded = turn.started.num_in_hbm, turn.started.num_loaded
    return f"{in_hbm} in HBM, {was_loaded} loaded" if in_hbm or was_loaded else "nothing"


def _limits(bench: TurnBench, samples: Mapping[str, Sequence[float]]) -> list[str]:
    hbm, dram = median(samples["hbm"]), median(samples["dram"])
    return [
        f"From HBM nothing is loaded: {1e3 * hbm:.0f} ms are the new tokens' own compute, the bound of every way.",
        f"From DRAM {bench.history_bytes / 1e6:.0f} MB are verified, rotated and copied beside the new tokens' compute:"
        f" {1e3 * (dram - hbm):+.0f} ms. On a CPU the loader takes its cycles from the cores that compute.",
    ]
