"""Targets, ratios, and what becomes of a result: JSON, a table, a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from cluster.bench.plots import draw
from cluster.bench.render import render
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.timing import side_by_side


def target(comparison: str, bound: float, value: float | None, note: str = "") -> Target:
    return Target(measure="speed", comparison=comparison, bound=bound, value=value, note=note)


RESULT = Result(
    name="sample",
    setup={"model": "models/x", "threads": 2, "versions": {"torch": "2.13"}},
    tables=[Table(title="A table", columns=["what", "ms"], rows=[["one", 1.5], ["two", None]])],
    figures={"seconds": [0.1, 0.2]},
    targets=[target(">=", 0.8, 0.9), target("<=", 1.0, 2.0), target("<=", 1.0, None, "no server")],
    limits=["Memory bandwidth."],
)


@pytest.mark.parametrize(
    ("comparison", "bound", "value", "holds"),
    [
        (">=", 10, 10.0, True),
        (">=", 10, 9.99, False),
        ("<=", 1.02, 1.02, True),
        ("<=", 1.02, 1.03, False),
        (">=", 10, math.nan, False),
        (">=", 10, None, None),
    ],
)
def test_a_target_holds_or_not(comparison: str, bound: float, value: float | None, holds: bool | None) -> None:
    assert target(comparison, bound, value).holds is holds


def test_targets_in_json_are_what_the_issue_asks_for() -> None:
    entries = json.loads(json.dumps(RESULT.as_json()))["targets"]
    assert entries[0] == {"measure": "speed", "target": ">= 0.8", "value": 0.9, "holds": True}
    assert entries[2]["holds"] is None
    assert entries[2]["note"] == "no server"


def test_ratios_are_of_neighbours() -> None:
    assert median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_cases_alternate_and_warm_ups_do_not_count() -> None:
    order: list[str] = []

    def one() -> float:
        order.append("one")
        return len(order)

    samples = side_by_side({"one": one, "two": lambda: order.append("two")}, repeats=2, warm_ups=1)
    assert order == ["one", "two", "two", "one", "one", "two"]
    assert samples["one"] == [4, 5]
    assert all(0 <= seconds < 1 for seconds in samples["two"])


def test_people_see_ticks_crosses_and_limits() -> None:
    console = Console(width=120, record=True, file=None)
    with console.capture() as capture:
        console.print(render(RESULT))
    text = capture.get()
    for words in ("sample", "A table", "✓", "✗", "not measured", "no server", "Memory bandwidth.", "torch 2.13"):
        assert words in text


def test_a_benchmark_without_a_drawing_gets_its_targets(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = draw(RESULT.as_json(), tmp_path)
    assert path == tmp_path / "sample.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_figures_of_another_shape_are_drawn_as_targets(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw({**RESULT.as_json(), "benchmark": "tiers"}, tmp_path) is not None


def test_an_error_has_no_picture(tmp_path: Path) -> None:
    assert draw({"benchmark": "save", "error": "no"}, tmp_path) is None
    assert not list(tmp_path.iterdir())
