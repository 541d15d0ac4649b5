"""The workload with a small model: both passes give the same answers, reuse happens, every target has a value."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from cluster.bench import workload
from cluster.bench.comparison import saving
from cluster.bench.options import BenchOptions
from cluster.bench.plots import draw
from cluster.bench.sharegpt import TRACE, TurnShape, conversations, num_dropped


def test_the_workload_with_reuse_and_without(small_model: Path, local_ray: None, tmp_path: Path) -> None:
    options = BenchOptions(
        model=str(small_model), quick=True, num_threads=1, scratch=str(tmp_path / "scratch"), data=str(tmp_path)
    )
    result = workload.run(options)
    made = json.loads(json.dumps(result.as_json()))
    figures = made["figures"]
    assert "generated" in made["setup"]["source"]
    assert figures["num_differing_answers"] == 0
    assert figures["hit_rate"] > 0
    assert figures["hit_rate"] <= figures["ideal_hit_rate"]
    assert sum(figures["hit_rate_by_tier"].values()) + sum(figures["recomputed_by_cause"].values()) == pytest.approx(1)
    assert figures["off"]["prefill_tokens"] > figures["on"]["prefill_tokens"]
    assert all(target["value"] is not None for target in made["targets"])
    assert len(made["targets"]) == 4
    assert made["limits"]
    pytest.importorskip("matplotlib")
    assert draw(made, tmp_path) == tmp_path / "workload.png"


def test_generated_conversations_have_the_papers_shape(tmp_path: Path) -> None:
    made = conversations(tmp_path, 4000)
    assert made.num_turns / 4000 == pytest.approx(5.75, rel=0.05)
    turns = [turn for shape in made.shapes for turn in shape]
    assert mean(turn.new_tokens for turn in turns) == pytest.approx(81, rel=0.1)
    assert mean(turn.output_tokens for turn in turns) == pytest.approx(292, rel=0.1)
    assert made == conversations(None, 4000)


def test_scaling_shrinks_the_window_too(tmp_path: Path) -> None:
    whole = conversations(tmp_path, 50)
    quarter = whole.scaled(0.25, window_limit=8192)
    assert quarter.window == 1024
    assert quarter.num_turns == whole.num_turns
    small = whole.scaled(0.25, window_limit=512)
    assert small.window == 512
    assert all(turn.new_tokens + turn.output_tokens <= 512 for shape in small.shapes for turn in shape)


def test_a_trace_is_read_as_what_is_new_in_each_turn(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {
        "session_id": [7, 8, 7, 7],  # the third turn of session 7 is cut: its input is shorter than the history
        "input_tokens": [10, 5, 40, 30],
        "output_tokens": [20, 5, 20, 8],
    }
    parquet.write_table(arrow.table(rows), tmp_path / TRACE)
    made = conversations(tmp_path, 1)
    assert made.shapes == ((TurnShape(10, 20), TurnShape(10, 20), TurnShape(47, 8)),)
    assert TRACE in made.source


def test_half_a_window_of_prompt_stays() -> None:
    assert num_dropped(80, TurnShape(10, 10), window=100) == 0
    assert num_dropped(81, TurnShape(10, 10), window=100) == 41
    assert num_dropped(20, TurnShape(50, 50), window=100) == 20  # never a part of the message itself


def test_saving_reproduces_the_papers_shares() -> None:
    assert saving(4.0, 128, 10_000, num_gpus=2) == pytest.approx(0.70, abs=0.01)
    assert saving(3.3, 128, 10_000, num_gpus=4) == pytest.approx(0.66, abs=0.01)
