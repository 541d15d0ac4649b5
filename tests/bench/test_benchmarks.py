"""Each benchmark runs for real, with small sizes: figures mean nothing here, their shape and their sums do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cluster.bench import overhead, save, scheduler, tiers
from cluster.bench.crowd import Crowd
from cluster.bench.kv import make_turn_kv
from cluster.bench.options import BenchOptions
from cluster.bench.plots import draw
from cluster.bench.result import Result
from cluster.bench.s3 import measure_s3
from storage.format import LayerShape, read_chunk

REPEATS = 2


@pytest.fixture
def options(small_model: Path, tmp_path: Path) -> Iterator[BenchOptions]:
    scratch = tmp_path / "scratch"
    yield BenchOptions(model=str(small_model), quick=True, repeats=REPEATS, num_threads=1, scratch=str(scratch))
    assert not scratch.exists() or not list(scratch.iterdir()), "files were left behind"


def check(result: Result, tmp_path: Path) -> None:
    """Whoever reads it finds JSON, all targets with a value, and a picture."""
    made = json.loads(json.dumps(result.as_json()))
    assert made["setup"]["quick"] is True
    assert made["limits"]
    assert all(target["value"] is not None or target["note"] for target in made["targets"])
    pytest.importorskip("matplotlib")
    assert draw(made, tmp_path) == tmp_path / f"{result.name}.png"


def test_tiers(options: BenchOptions, local_ray: None, tmp_path: Path) -> None:
    result = tiers.run(options)
    check(result, tmp_path)
    figures = result.figures
    assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in figures["seconds"].values())
    assert set(figures["baseline"].values()) <= figures["seconds"].keys()
    assert figures["s3"]["requests"] == {"GET": result.setup["num_chunks"]}  # one for a chunk, whatever its layers


def test_without_moto_s3_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moto.server", None)
    turn = make_turn_kv((LayerShape(num_kv_heads=1, k_dim=4, v_dim=4),), "float32", 4, 1)
    assert "reprise[dev]" in measure_s3(turn, 1)["note"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_brings_what_was_encoded(dtype: str) -> None:
    turn = make_turn_kv((LayerShape(num_kv_heads=2, k_dim=8, v_dim=8),) * 3, dtype, 16, 2)
    for i, chunk in enumerate(turn.chunks):
        turn.load(i, read_chunk(chunk))
        for kept, loaded in zip(turn.layers[i], turn.out[i], strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(kept, loaded, strict=True))


def test_save(options: BenchOptions, tmp_path: Path) -> None:
    result = save.run(options)
    check(result, tmp_path)
    steps = result.figures["steps_s"]
    assert all(len(seconds) == REPEATS for both in steps.values() for seconds in both.values())
    taken, untaken = result.figures["memory"]["taken"], result.figures["memory"]["untaken"]
    assert taken["peak_ready_bytes"] > 0
    assert taken["chunks_dropped"] == 0
    assert untaken["chunks_dropped"] > 0
    for memory in (taken, untaken):
        assert memory["peak_slots"] <= memory["slots"]
        assert memory["peak_bytes"] <= memory["configured_bytes"]


def test_overhead(options: BenchOptions, local_ray: None, tmp_path: Path) -> None:
    result = overhead.run(options)
    check(result, tmp_path)
    dram, ssd = result.figures["dram"], result.figures["ssd"]
    for figures in (dram, ssd):
        assert figures["reused_tokens"] == 0
        assert figures["saved_bytes"] > 0
        assert all(len(rates) == REPEATS for rates in figures["tokens_per_s"].values())
    assert dram["written_bytes"] == 0
    assert ssd["written_bytes"] > 0


def test_scheduler(options: BenchOptions, tmp_path: Path) -> None:
    result = scheduler.run(options)
    check(result, tmp_path)
    for size, num_nodes, _ in scheduler.QUICK_SIZES:
        figures = result.figures[str(size)]
        assert figures["nodes"] == num_nodes
        assert sum(kind["num"] for kind in figures["kinds"].values()) == scheduler.QUICK_NUM_EVENTS
        assert 0 < figures["quantiles_s"]["0.5"] <= figures["quantiles_s"]["1"]
    assert {"TurnSubmitted", "TurnFinished", "ChunksSaved", "ChunkDemoted"} <= figures["kinds"].keys()


def test_a_crowd_keeps_its_queue_and_contradicts_nothing() -> None:
    crowd = Crowd(300, 3, 60)
    for _ in crowd.fill():
        pass
    crowd.scheduler.check()
    for event in islice(crowd.events(), 1500):
        crowd.hear(event)
        crowd.scheduler.check()
    figures = crowd.scheduler.snapshot()
    assert crowd.scheduler.num_waiting == pytest.approx(60, abs=5)
    assert not figures["policy_faults"]
    assert not any(name.startswith(("stale.", "overdue.")) for name in figures["counters"])
