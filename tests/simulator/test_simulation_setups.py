"""The named set-ups can be run, and are what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.messages import Tier
from policies.simulator.hardware import SetupError
from policies.simulator.setups import normal_load, overload, paper_13b
from policies.simulator.simulation import simulate
from tests.simulator.small import random_trace


def test_the_papers_machine() -> None:
    setup = paper_13b("2TB")
    assert (setup.num_gpus, setup.num_replicas, setup.max_running_turns) == (4, 2, 24)
    assert setup.tier_bytes == {Tier.DRAM: 128 * 10**9, Tier.SSD: 2 * 10**12}
    assert setup.model.kv_bytes_per_token / 1024**2 == pytest.approx(0.78, rel=0.01)
    with pytest.raises(SetupError, match="choose from 2TB, 10TB"):
        paper_13b("5TB")


def test_at_most_so_many_turns_are_served_there() -> None:
    """80 new tokens after a history of 1,400, and an answer of 290 in a full batch: about the trace's means."""
    speed = paper_13b().speed
    turn_s = speed.prefill_s(1400, 1480) + 290 * speed.decode_step_s(24, 24 * 1625) / 24
    assert 2 / turn_s == pytest.approx(3.7, rel=0.1)


def test_the_other_two() -> None:
    trace = random_trace(0)
    assert normal_load(0.8).offered_load == 0.8
    assert normal_load().links.ssd_read == 5e9
    tight = overload(trace)
    assert tight.offered_load == 1.6
    assert tight.tier_bytes == {Tier.DRAM: int(0.05 * trace.footprint_tokens * tight.model.kv_bytes_per_token)}


@pytest.mark.parametrize("name", ["paper_13b", "normal_load", "overload"])
def test_they_run(name: str) -> None:
    trace = random_trace(0, num_sessions=20)
    setups = {"paper_13b": paper_13b(), "normal_load": normal_load(), "overload": overload(trace, share=0.5)}
    setup = replace(setups[name], chunk_tokens=32)
    result = simulate(trace, setup)
    assert 0.3 < result.hit_rate < 1.0
    assert result.setup == setup.name
