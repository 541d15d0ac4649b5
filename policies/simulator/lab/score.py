"""The default policy set over every trace of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from policies.simulator.lab.errors import LabError
from policies.simulator.lab.source import Source
from policies.simulator.lab.untimed import levels_of
from policies.simulator.replay import Level
from policies.simulator.trace import TraceError

NOT_DATA = (".md", ".txt")


@dataclass(kw_only=True)
class Found:
    """The traces of a folder with the levels to judge them at, and why others are left out."""

    traces: list[tuple[Source, list[Level]]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def look_into(folder: str, *, level: str = "auto", limit: int | None = None) -> Found:
    """Reads every file of a folder once. Texts (.md, .txt) and hidden files are passed over; LabError if no folder."""
    if not Path(folder).is_dir():
        raise LabError(f"{folder} is not a folder: name one that holds traces")
    found = Found()
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in NOT_DATA:
            continue
        source = Source(text=str(path), limit=limit)
        try:
            trace = source.load()
        except (TraceError, LabError) as error:
            found.skipped[str(path)] = str(error)
            continue
        found.traces.append((source, levels_of(trace) if level == "auto" else [Level(level)]))
    return found


def cut(source: Source, num_turns: int) -> Source:
    """Its first so many turns, for timed runs."""
    return replace(source, max_turns=num_turns)


def mean_regrets(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By level and policy, over the rows where the oracle gains something."""
    regrets: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, figures in row["policies"].items():
            if figures["regret"] is not None:
                regrets.setdefault(row["level"], {}).setdefault(name, []).append(figures["regret"])
    return {level: {name: mean(values) for name, values in of.items()} for level, of in regrets.items()}


def problems_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What went wrong in single rows, each problem once."""
    said = [error for row in rows for error in (*row.get("errors", ()), *([row["error"]] if row.get("error") else []))]
    return list(dict.fromkeys(said))


def faults_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What policies did wrong, with file and line, each once; the runs went on."""
    texts = [text for row in rows for text in (row.get("policy_fault_texts") or row.get("policy_faults") or ())]
    return list(dict.fromkeys(f"policy fault: {text}" for text in texts))
