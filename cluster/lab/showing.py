"""How results and progress are shown: tables or JSON on stdout, a bar or lines on stderr, files in --out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from policies.simulator.lab.errors import LabError
from policies.simulator.lab.jobs import Told

LOG_LINE_S = 10.0
WIDE = 150  # columns of a table that goes to a file or pipe

Draw = Callable[[Sequence[Mapping[str, Any]], Path], list[Path]]


def show(found: Mapping[str, Any], tables: Sequence[RenderableType], as_json: bool, stdout: TextIO) -> None:
    if as_json:
        print(json.dumps(found), file=stdout, flush=True)
        return
    console = Console(file=stdout)
    if not console.is_terminal:
        console.width = WIDE
    for table in tables:
        console.print(table)


def folder_of(out: str | None) -> Path | None:
    """Made before anything runs."""
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"cannot write to {out}: {error.strerror}; see --out") from None
    return Path(out)


def write(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path | None, *draws: Draw) -> None:
    """result.json and the pictures."""
    from policies.simulator.lab.plots import PlotsMissing

    if out is None:
        return
    (out / "result.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    try:
        for draw in draws:
            draw(rows, out)
    except PlotsMissing as error:
        print(f"reprise: no plots: {error}", file=sys.stderr)


def say(words: str) -> None:
    print(f"reprise: {words}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Told]:
    """A bar on a terminal; in a log a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    last_line = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def told(words: str, done: int, of: int, share: float) -> None:
            nonlocal last_line
            bar.update(task, description=words[-60:], total=of, completed=done + share)
            if not console.is_terminal and time.monotonic() >= last_line + LOG_LINE_S:
                last_line = time.monotonic()
                print(f"{done}/{of} runs, then {share:.0%} of {words}", file=sys.stderr, flush=True)

        yield told
