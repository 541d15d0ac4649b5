"""`reprise bench`: options in; tables for people, or one JSON object per line for programs, out.

Exit codes: 0 done, 1 a benchmark could not run (the others still do) or, with --check, a target does not hold, 2 wrong
usage, 130 interrupted. Torch and Ray are imported only when benchmarks run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.bench.options import DEFAULT_MODEL, DEFAULT_SCRATCH, DEVICES, DTYPES, BenchOptions, default_model
from cluster.bench.runner import BENCHMARKS, Outcome, expand, run_all
from cluster.config import ConfigError

WHAT = {
    "ttft": "time to first token of a returning turn, by where its KV lies",
    "overlap": "how much of loading is hidden, and load against compute",
    "save": "what saving costs a step, and how much memory it holds",
    "tiers": "GB/s of each tier against memcpy and raw files, requests to S3",
    "engine": "prefill and decode speed against transformers",
    "overhead": "throughput with the store for traffic that never hits",
    "scheduler": "what an event and a session cost the scheduler, with up to 1M sessions and 1,000 nodes",
    "serving": "what HTTP and Ray Serve add to a returning turn, and to many streams",
    "workload": "a trace of conversations with reuse on and off",
}

EXAMPLES = (
    "benchmarks:\n"
    + "".join(f"  {name:10}{words}\n" for name, words in WHAT.items())
    + f"  {'all':10}all of them, in this order\n"
    + """
examples:
  reprise bench tiers
  reprise bench ttft overlap --model ./models/demo --threads 2
  reprise bench all --json > bench.jsonl
  reprise bench all --out ./runs/bench --check
  reprise bench save --quick
"""
)


def add_to(commands: Any) -> None:
    """`bench` as one of the commands of an argument parser."""
    text = "Measure what reuse is worth on this hardware, in ratios within one run."
    parser = commands.add_parser(
        "bench",
        help=text,
        description=text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=(*BENCHMARKS, "all"), metavar="NAME", help="see below")
    parser.add_argument("--model", help=f"model folder or hub id (a random 125M Llama, made once in {DEFAULT_MODEL})")
    parser.add_argument(
        "--dtype", default="auto", help=f"{', '.join(DTYPES)} (auto: as stored where the hardware computes it natively)"
    )
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (auto)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 takes all cores (0)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each measure (5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; figures mean nothing")
    parser.add_argument(
        "--scratch", default=str(DEFAULT_SCRATCH), help=f"folder on the disk to measure ({DEFAULT_SCRATCH})"
    )
    parser.add_argument("--data", help="folder with conversation traces, for workload")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and benchmark, nothing else")
    parser.add_argument("--out", help="folder for NAME.json and a plot of each benchmark")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target does not hold")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The exit code. ConfigError, ModelError for what can be told before anything runs."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout has results only
        try:
            return _run(arguments, stdout)
        except KeyboardInterrupt:
            print("reprise: interrupted; results printed so far are whole", file=sys.stderr)
            return 130


def _run(arguments: argparse.Namespace, stdout: TextIO) -> int:
    out = _folder(arguments.out)
    options = _options(arguments)
    code = 0
    with _watching(expand(arguments.names)) as watch:
        for outcome in run_all(arguments.names, options, watch.tell):
            watch.done(outcome)
            _show(outcome, arguments.json, stdout)
            if out is not None:
                _write(outcome, out)
            if outcome.error or (arguments.check and not outcome.holds):
                code = 1
    return code


def _options(arguments: argparse.Namespace) -> BenchOptions:
    from actors.engine.loading import load_tokenizer

    needs_model = expand(arguments.names) != ["scheduler"]
    given = BenchOptions(
        model=arguments.model or str(DEFAULT_MODEL),
        dtype=arguments.dtype,
        device=arguments.device,
        num_threads=arguments.threads,
        repeats=arguments.repeats,
        quick=arguments.quick,
        scratch=arguments.scratch,
        data=arguments.data,
    )
    if not needs_model:
        return given
    if not arguments.model:
        default_model()
    load_tokenizer(given.model)  # a model that is not there is told before anything runs
    _ = given.computed_device
    return given


def _folder(out: str | None) -> Path | None:
    if out is None:
        return None
    if "://" in out:
        raise ConfigError(f"--out must be a folder of this machine, not {out!r}")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}; see --out") from None
    return Path(out)


def _show(outcome: Outcome, as_json: bool, stdout: TextIO) -> None:
    from cluster.bench.render import render

    if as_json:
        print(json.dumps(outcome.as_json()), file=stdout, flush=True)
    elif outcome.result is not None:
        Console(file=stdout).print(render(outcome.result))


def _write(outcome: Outcome, out: Path) -> None:
    from cluster.bench.plots import PlotsMissing, draw

    made = outcome.as_json()
    (out / f"{outcome.name}.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    try:
        draw(made, out)
    except PlotsMissing as error:
        print(f"reprise: no plots: {error}", file=sys.stderr)


class _Watch:
    """Where the benchmarks are: a bar on a terminal, lines in a log."""

    def __init__(self, progress: Progress, console: Console, num_benchmarks: int) -> None:
        self._progress, self._console = progress, console
        self._task = progress.add_task("", total=num_benchmarks)
        self._began = time.monotonic()

    def tell(self, name: str, what: str) -> None:
        self._progress.update(self._task, description=f"{name}: {what}")
        if not self._console.is_terminal:
            print(f"{time.monotonic() - self._began:6.0f} s  {name}: {what}", file=sys.stderr, flush=True)

    def done(self, outcome: Outcome) -> None:
        self._progress.advance(self._task)
        if outcome.error:
            self._console.print(f"reprise: {outcome.name}: {outcome.error}", markup=False, highlight=False)


@contextmanager
def _watching(names: list[str]) -> Iterator[_Watch]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        disable=not console.is_terminal,
    ) as progress:
        yield _Watch(progress, console, len(names))
