"""Machines, models, set-ups: named figures, measured ones, and nonsense refused with advice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from policies.messages import SchedulerConfig
from policies.simulator.hardware import MACHINES, MODELS, EngineSpeed, Model, SetupError, machine_named, model_named
from policies.simulator.measured import engine_from_bench, links_from_bench
from policies.simulator.setup import TierBudgets
from tests.simulator.small import ENGINE, LINKS, MACHINE, setup_of

MIB = 1024**2


@pytest.mark.parametrize(
    ("name", "mib_per_token"),
    [("llama-2-13b", 0.78), ("llama-1-65b", 2.5), ("llama-2-70b", 0.31), ("falcon-40b", 0.12), ("llama-3-8b", 0.125)],
)
def test_the_papers_kv_sizes(name: str, mib_per_token: float) -> None:
    assert model_named(name).kv_bytes_per_token / MIB == pytest.approx(mib_per_token, rel=0.03)


def test_the_papers_prefill_time() -> None:
    """LLaMA-65B on four A100: 2K tokens in 360 ms."""
    speed = machine_named("a100").engine(model_named("llama-1-65b"), num_gpus=4)
    assert speed.prefill_s(0, 2048) == pytest.approx(0.36, rel=0.15)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_machine_runs_a_small_model(machine: Any) -> None:
    speed = machine.engine(MODELS["llama-3-8b"], num_gpus=1)
    assert speed.kv_tokens > 10_000
    assert speed.prefill_s(0, 1000) < 1.0
    assert 0.001 < speed.decode_step_s(8, 8_000) < 0.2


def test_attention_grows_with_the_context() -> None:
    speed = replace(ENGINE, prefill_s_per_token_and_context=1e-5)
    assert speed.prefill_s(0, 100) + speed.prefill_s(100, 300) == pytest.approx(speed.prefill_s(0, 300))
    assert speed.prefill_s(1000, 1100) > speed.prefill_s(0, 100)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SetupError, match="take more GPUs"):
        machine_named("l4").engine(model_named("llama-2-13b"), num_gpus=1)
    with pytest.raises(SetupError, match="take more GPUs"):
        setup_of(machine=machine_named("l4"), model=model_named("llama-2-70b"), engine=None)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SetupError, match="choose from a100"):
        machine_named("a1000")
    with pytest.raises(SetupError, match="llama-2-13b"):
        model_named("gpt-9")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e30, "fast"])
@pytest.mark.parametrize("name", ["dram_load", "ssd_write", "network"])
def test_impossible_links_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SetupError, match=name):
        replace(LINKS, **{name: value})


def test_an_ssd_faster_than_dram_is_odd_but_allowed() -> None:
    assert replace(LINKS, ssd_read=10 * LINKS.dram_load).ssd_read > LINKS.dram_load


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prefill_s_per_token": 0.0}, "prefill_s_per_token"),
        ({"prefill_s_per_token": math.nan}, "prefill_s_per_token"),
        ({"step_s": -1.0}, "step_s"),
        ({"step_s": 0.0, "step_s_per_turn": 0.0}, "takes no time"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"kv_tokens": 0.5}, "kv_tokens"),
        ({"max_step_tokens": -5}, "max_step_tokens"),
    ],
)
def test_impossible_engines_are_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(SetupError, match=name):
        replace(ENGINE, **changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"flops": -1.0}, "flops"),
        ({"hbm_bytes_per_s": math.nan}, "hbm_bytes_per_s"),
        ({"flops_efficiency": 1.5}, "flops_efficiency"),
    ],
)
def test_impossible_machines_are_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(SetupError, match=name):
        replace(MACHINE, **changes)


def test_an_impossible_model_is_refused() -> None:
    with pytest.raises(SetupError, match="num_layers"):
        Model(name="x", num_parameters=1e9, num_layers=0, hidden_size=1, kv_size=1)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_nodes": 1.5}, "num_nodes"),
        ({"num_nodes": "3"}, "num_nodes"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"chunk_tokens": 0.5}, "chunk_tokens"),
        ({"tick_s": 1e-12}, "tick_s"),
        ({"offered_load": -0.5}, "offered_load"),
        ({"offered_load": math.nan}, "offered_load"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"failure_share": -0.1}, "failure_share"),
        ({"tick_s": 0.0}, "tick_s"),
        ({"load_deadline_s": math.inf}, "load_deadline_s"),
        ({"load_deadline_s": 100.0}, "lease_s"),
        ({"scheduler": {"answer_reserve": 0.5}}, "answer_reserve"),
        ({"budgets": TierBudgets(dram=0, ssd=100)}, "dram"),
    ],
)
def test_impossible_setups_are_refused(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(SetupError, match=advice):
        setup_of(**changes)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(SetupError, match="dram"):
        TierBudgets(dram=-1)
    with pytest.raises(SetupError, match="choose from bytes, tokens"):
        TierBudgets(dram=1, unit="GiB")


def test_budgets_in_tokens_are_the_models_bytes() -> None:
    setup = setup_of(budgets=TierBudgets(dram=10, bucket=20, unit="tokens"))
    assert {str(tier): budget for tier, budget in setup.tier_bytes.items()} == {"dram": 40, "object": 80}
    assert setup_of(scheduler={"lease_s": 20.0}).scheduler == SchedulerConfig(lease_s=20.0)


# --- reprise bench ----------------------------------------------------------------------------------------------------


def _engine_result() -> dict[str, Any]:
    rates = {
        "batch 1": {"engine": {"prefill": [900.0, 1000.0, 1100.0], "decode": [10.0, 10.0, 10.0]}},
        "batch 8": {"engine": {"prefill": [950.0], "decode": [8 / 0.17]}},
    }
    return {"benchmark": "engine", "setup": {"step_tokens": 512}, "figures": {"tokens_per_s": rates}}


def test_an_engine_as_measured() -> None:
    speed = engine_from_bench(_engine_result(), kv_tokens=5000)
    assert speed.prefill_s(0, 500) == pytest.approx(0.5)
    assert speed.decode_step_s(1, 0) == pytest.approx(0.1)
    assert speed.decode_step_s(8, 0) == pytest.approx(0.17)
    assert (speed.max_step_tokens, speed.kv_tokens) == (512, 5000)


def test_links_as_measured() -> None:
    speeds = {"load": 3.6, "save": 1.65, "ssd_read": 9.0, "ssd_read_cold": 1.1, "ssd_write": 0.5}
    links = links_from_bench({"benchmark": "tiers", "figures": {"gigabytes_per_s": speeds}}, LINKS)
    assert (links.dram_load, links.dram_save, links.ssd_read, links.ssd_write) == (3.6e9, 1.65e9, 1.1e9, 0.5e9)
    assert links.network == LINKS.network


def test_what_is_no_measurement_is_refused() -> None:
    with pytest.raises(SetupError, match="reprise bench engine"):
        engine_from_bench({"benchmark": "tiers", "figures": {}}, kv_tokens=1)
    with pytest.raises(SetupError, match="no model"):
        engine_from_bench({"benchmark": "engine", "error": "no model"}, kv_tokens=1)
    broken = _engine_result()
    del broken["figures"]["tokens_per_s"]["batch 8"]
    with pytest.raises(SetupError, match="batch 8"):
        engine_from_bench(broken, kv_tokens=1)
    with pytest.raises(SetupError, match="load"):
        links_from_bench({"benchmark": "tiers", "figures": {"gigabytes_per_s": {}}}, LINKS)


def test_an_engine_speed_of_its_own_is_taken() -> None:
    mine = EngineSpeed(prefill_s_per_token=1.0, step_s=1.0)
    assert setup_of(engine=mine).speed is mine
