"""The engine's benchmark with a small model: it runs, every target has a value, and the figures fit together."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from cluster.bench import engine
from cluster.bench.engine import Timeline
from cluster.bench.options import BenchOptions

MEASURES = {
    f"{phase} tokens/s, batch {batch}: engine / {rival}"
    for phase in ("prefill", "decode")
    for batch in (1, 8)
    for rival in ("generate", "continuous batching")
}


@pytest.fixture
def options(small_model: Path) -> BenchOptions:
    return BenchOptions(model=str(small_model), quick=True, repeats=2, num_threads=1)


def test_every_target_has_a_value_that_its_samples_give(options: BenchOptions) -> None:
    result = engine.run(options)
    assert {target.measure for target in result.targets} == MEASURES
    rates = json.loads(json.dumps(result.as_json()))["figures"]["tokens_per_s"]
    for target in result.targets:
        assert target.value is not None, target.note
        what, rival = target.measure.split(": engine / ")
        phase, workload = what.split(" tokens/s, ")
        ours, theirs = (rates[workload][name][phase] for name in ("engine", rival))
        assert len(ours) == len(theirs) == 2
        assert min(*ours, *theirs) > 0
        assert target.value == pytest.approx(median(a / b for a, b in zip(ours, theirs)))
    assert result.setup["rounds"] == 2
    assert len(result.tables[0].rows) == 4
    assert result.limits


def test_a_rival_that_fails_leaves_a_note(options: BenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Timeline:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(engine, "run_continuous", broken)
    result = engine.run(options)
    for target in result.targets:
        assert (target.value is None) == target.measure.endswith("continuous batching")
        assert target.note == ("RuntimeError: not on this machine" if target.value is None else "")


def test_rates_of_a_timeline() -> None:
    """Two prompts; the second is computed at 3 s, the first answer ends at 5 s."""
    timeline = Timeline(1.0, [[2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0]])
    assert timeline.prefill_rate(100) == pytest.approx(50)
    assert timeline.decode_rate() == pytest.approx(2.0)
