"""Runs benchmarks by name, one after the other; what one of them cannot do does not keep the others from running."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.bench.options import BenchOptions
from cluster.bench.result import Result

BENCHMARKS = {
    "ttft": "cluster.bench.ttft:run",
    "overlap": "cluster.bench.overlap:run",
    "save": "cluster.bench.save:run",
    "tiers": "cluster.bench.tiers:run",
    "engine": "cluster.bench.engine:run",
    "overhead": "cluster.bench.overhead:run",
    "scheduler": "cluster.bench.scheduler:run",
    "serving": "cluster.bench.serving:run",
    "workload": "cluster.bench.workload:run",
}
"""Each is `run(options) -> Result`, imported at its first use."""

log = logging.getLogger(__name__)

Watch = Callable[[str, str], None]
"""Told the name of a benchmark and what it is at."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one benchmark: a result, or one line that says why there is none."""

    name: str
    seconds: float
    result: Result | None = None
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether it ran and no target was missed; targets without a value do not count."""
        return self.result is not None and all(target.holds is not False for target in self.result.targets)

    def as_json(self) -> dict[str, Any]:
        if self.result is None:
            return {"benchmark": self.name, "error": self.error}
        return {**self.result.as_json(), "seconds": round(self.seconds, 1)}


def expand(names: Sequence[str]) -> list[str]:
    """`all` becomes every name; each comes once. ValueError for unknown ones."""
    unknown = [name for name in names if name != "all" and name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}, all")
    return list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))


def run_all(names: Sequence[str], options: BenchOptions, watch: Watch) -> Iterator[Outcome]:
    """One outcome for each name, as soon as it is there."""
    for name in expand(names):
        watch(name, "starting")
        yield run_one(name, replace(options, progress=partial(watch, name)))


def run_one(name: str, options: BenchOptions) -> Outcome:
    began = time.monotonic()
    try:
        result = _prepared(name, options)(options)
    except Exception as error:  # whatever it is, it is this benchmark's, and the others run
        log.warning("benchmark %s failed", name, exc_info=True)
        return Outcome(name=name, seconds=time.monotonic() - began, error=_one_line(error))
    return Outcome(name=name, seconds=time.monotonic() - began, result=result)


def _prepared(name: str, options: BenchOptions) -> Callable[[BenchOptions], Result]:
    """The benchmark, imported; torch's threads as asked for, whatever ran before."""
    module, _, attribute = BENCHMARKS[name].partition(":")
    run: Callable[[BenchOptions], Result] = getattr(importlib.import_module(module), attribute)
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()  # ours is there
    return run


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"
