"""The `reprise` command: arguments in, calls of the library, words for people or JSON for programs.

Exit codes: 0 done, 1 the job could not be done, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from cluster import openmp

os.environ.update(openmp.WAITING | os.environ)  # before torch is imported

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.bench import command as bench
from cluster.lab import command as lab
from cluster.serving import command as serve
from cluster.serving import keys_command as keys

LOG_LINE_S = 10.0

BATCH_EXAMPLES = """examples:
  reprise batch chats.jsonl --model ./models/demo --out ./runs/first
  reprise batch sharegpt.json.gz --model ./models/demo --out ./runs/sg --limit 100 --history recorded --concurrency 16
  reprise batch chats.jsonl --model ./models/demo --out ./runs/cmp --compare --json
  reprise batch chats.jsonl --model ./models/demo --out ./runs/first --resume
  reprise batch s3://bucket/chats.jsonl.zst --model ./models/demo --out ./runs/s3 \\
      --set store.dram_bytes=2GiB --set store.ssd_url=/mnt/nvme/reprise --set store.ssd_bytes=200GiB
"""

MODEL_EXAMPLES = """examples:
  reprise model tiny --out ./models/demo --size 50m
  reprise model tiny --out ./models/qwen --architecture qwen3 --size test
  reprise model check ./models/demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns every expected error into one line and an exit code."""
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:  # policies of one's own are found from where one stands
        sys.path.append(os.getcwd())
    logging.basicConfig(level=logging.WARNING if options.verbose else logging.ERROR, format="%(name)s: %(message)s")
    from actors.engine.tokenizer import ModelError
    from cluster.bringup import BringUpError
    from cluster.config import ConfigError
    from cluster.conversations import InputError
    from cluster.results import OutputError

    try:
        return options.run(options) or 0
    except (InputError, OutputError, ConfigError, ModelError) as error:
        return _fail(str(error), 2)
    except BringUpError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; finished turns are kept, go on with --resume", 130)


def _fail(message: str, code: int) -> int:
    print(f"reprise: {message}", file=sys.stderr)
    return code


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reprise", description="Multi-turn LLM inference that never computes the same attention twice."
    )
    parser.add_argument("--verbose", action="store_true", help="show warnings of the parts")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_batch(commands)
    _add_model(commands)
    _add_config(commands)
    serve.add_to(commands)
    keys.add_to(commands)
    bench.add_to(commands)
    lab.add_to(commands)
    return parser


def _command(commands: Any, name: str, help_text: str, examples: str = "") -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def _add_batch(commands: Any) -> None:
    batch = _command(commands, "batch", "Run a file of conversations, one row a turn.", BATCH_EXAMPLES)
    batch.add_argument(
        "input", help="ShareGPT JSON/JSONL or OpenAI-messages JSONL, also .gz and .zst; a path or fsspec URL"
    )
    batch.add_argument("--model", help="model folder or hub id (or model.path in --config)")
    batch.add_argument("--out", required=True, help="folder for turns.jsonl, parquet/ and report.json")
    _add_config_arguments(batch)
    work = batch.add_argument_group("work")
    work.add_argument(
        "--history", default="own", choices=("own", "recorded"), help="whose answers become history (own)"
    )
    work.add_argument("--limit", type=int, help="only the first N conversations")
    work.add_argument("--concurrency", type=int, default=8, help="conversations under way at a time (8)")
    work.add_argument("--arrival-rate", type=float, help="conversations a second, Poisson (as fast as there is room)")
    work.add_argument(
        "--think-time", type=float, default=0.0, help="mean seconds before a further turn, exponential (0)"
    )
    work.add_argument("--seed", type=int, default=0, help="for arrivals, think times and sampling (0)")
    work.add_argument("--replicas", type=int, help="copies of the model (cluster.num_replicas)")
    work.add_argument("--dtype", help="auto, float32, bfloat16, float16 (model.dtype)")
    sampling = batch.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=128)
    sampling.add_argument("--min-new-tokens", type=int, default=0)
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0)
    sampling.add_argument("--min-p", type=float, default=0.0)
    sampling.add_argument("--repetition-penalty", type=float, default=1.0)
    sampling.add_argument("--stop", action="append", default=[], help="stop string; may be given again")
    sampling.add_argument("--ignore-eos", action="store_true")
    run = batch.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="go on with what --out already has")
    run.add_argument("--compare", action="store_true", help="run again with reuse off and compare answers and speed")
    run.add_argument("--strict", action="store_true", help="stop at the first bad conversation")
    run.add_argument("--record", metavar="FILE", help="add the scheduler's event log to this file (cluster.record)")
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    batch.set_defaults(run=_run_batch)


def _add_model(commands: Any) -> None:
    model = _command(commands, "model", "Make small models, check models.", MODEL_EXAMPLES)
    verbs = model.add_subparsers(required=True, metavar="VERB")
    tiny = _command(verbs, "tiny", "Write a small random model with a trained tokenizer; no hub needed.")
    tiny.add_argument("--out", required=True)
    tiny.add_argument("--architecture", default="llama")
    tiny.add_argument("--size", default="test", help="test, 50m or 125m")
    tiny.add_argument("--dtype", default="float32", help="how the weights are stored")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_run_model_tiny)
    check = _command(verbs, "check", "Load a model, probe it and compare it with the stock implementation.")
    check.add_argument("path")
    check.add_argument("--dtype", default="auto")
    check.add_argument("--json", action="store_true")
    check.set_defaults(run=_run_model_check)


def _add_config(commands: Any) -> None:
    config = _command(commands, "config", "Show the configuration with all its fields.")
    verbs = config.add_subparsers(required=True, metavar="VERB")
    show = _command(verbs, "show", "Print the configuration as YAML: a start for your own file.")
    _add_config_arguments(show)
    show.set_defaults(run=_run_config_show)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file (see `reprise config show`)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one field; may be given again",
    )


# --- commands ---------------------------------------------------------------------------------------------------------


def _run_batch(options: argparse.Namespace) -> None:
    from cluster.batch import run_batch
    from cluster.config import load_config
    from cluster.report import render

    given = {
        "model.path": options.model,
        "model.dtype": options.dtype,
        "cluster.num_replicas": options.replicas,
        "cluster.record": options.record,
    }
    config = load_config(options.config, options.set, given)
    console = Console(stderr=True)
    with _progress(console) as progress:
        report = run_batch(config, _batch_options(options), _ProgressListener(progress, console).listener())
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(render(report))
        print(f"results: {options.out}")


def _batch_options(options: argparse.Namespace) -> Any:
    from actors.engine.params import SamplingParams
    from cluster.batch import BatchOptions
    from cluster.conversations import InputError

    try:
        sampling = SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop=tuple(options.stop),
            ignore_eos=options.ignore_eos,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return BatchOptions(
        input=options.input,
        out=options.out,
        history=options.history,
        limit=options.limit,
        concurrency=options.concurrency,
        arrival_rate=options.arrival_rate,
        think_time_s=options.think_time,
        sampling=sampling,
        seed=options.seed,
        resume=options.resume,
        compare=options.compare,
        strict=options.strict,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("turns"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class _ProgressListener:
    """Shows a job's progress: a bar on a terminal, a line now and then in a log."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._label, self._num_turns, self._num_done, self._next_line = "", 0, 0, 0.0
        self._task = progress.add_task("starting", total=None)

    def listener(self) -> Any:
        from cluster.batch import Listener

        return Listener(begin=self._begin, turn_done=self._turn_done, problem=self._problem)

    def _begin(self, label: str, num_turns: int) -> None:
        self._label, self._num_turns, self._num_done = label, num_turns, 0
        self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(label, total=num_turns)

    def _turn_done(self, _: Any) -> None:
        self._progress.advance(self._task)
        self._num_done += 1
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_LINE_S
            print(f"{self._label}: {self._num_done}/{self._num_turns} turns", file=sys.stderr, flush=True)

    def _problem(self, problem: Any) -> None:
        self._console.print(f"{problem.where}: {problem.what}; {problem.advice}", markup=False, highlight=False)


def _run_model_tiny(options: argparse.Namespace) -> None:
    from cluster.config import ConfigError
    from cluster.tiny_model import make_tiny_model

    try:
        make_tiny_model(
            options.out, architecture=options.architecture, size=options.size, dtype=options.dtype, seed=options.seed
        )
    except ValueError as error:
        raise ConfigError(f"model tiny: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot write a model to {options.out}: {error}") from None
    print(f"wrote {options.out}")


def _run_model_check(options: argparse.Namespace) -> None:
    from actors.engine.loading import LoadedModel

    facts = _facts(LoadedModel.load(options.path, dtype=options.dtype))
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:24} {value}")


def _facts(loaded: Any) -> dict[str, Any]:
    return {
        "architecture": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "layers": len(loaded.layers),
        "kv_heads": sorted({layer.num_kv_heads for layer in loaded.layers}),
        "layers_without_rotation": sum(rotation is None for rotation in loaded.rotations),
        "context_window": loaded.context_window,
        "vocab_size": loaded.vocab_size,
        "dtype": loaded.dtype,
        "device": str(loaded.device),
        "kv_bytes_per_token": loaded.kv_bytes_per_token,
        "fingerprint": loaded.fingerprint,
    }


def _run_config_show(options: argparse.Namespace) -> None:
    from cluster.config import config_to_yaml, load_config

    print(config_to_yaml(load_config(options.config, options.set)), end="")


if __name__ == "__main__":
    sys.exit(main())
