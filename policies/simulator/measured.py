"""Speeds as `reprise bench engine tiers --out FOLDER` measured them, for the simulator. Reads dictionaries, no files.

What a bench does not measure (the network, a real bucket) is taken from a `LinkSpeeds` given beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from policies.simulator.hardware import EngineSpeed, LinkSpeeds, SetupError

ONE, MANY, NUM_MANY = "batch 1", "batch 8", 8


def engine_from_bench(result: Mapping[str, Any], kv_tokens: int) -> EngineSpeed:
    """The engine of `reprise bench engine` (engine.json). `kv_tokens`: capacity of the pool you would give it.

    Prefill is one prompt of 2,048 tokens, attention included, so that no growth with the context is seen. Decode
    steps of 1 and of 8 turns give what a step costs and what a turn adds. SetupError if the figures are not there.
    """
    rates = _figure(result, "engine", "tokens_per_s")
    prefill, decode_one = _median(rates, ONE, "prefill"), _median(rates, ONE, "decode")
    step_one, step_many = 1 / decode_one, NUM_MANY / _median(rates, MANY, "decode")
    per_turn = max(0.0, (step_many - step_one) / (NUM_MANY - 1))
    return EngineSpeed(
        prefill_s_per_token=1 / prefill,
        step_s=max(0.0, step_one - per_turn),
        step_s_per_turn=per_turn,
        max_step_tokens=int(result.get("setup", {}).get("step_tokens", 512)),
        kv_tokens=kv_tokens,
    )


def links_from_bench(result: Mapping[str, Any], others: LinkSpeeds) -> LinkSpeeds:
    """The links of `reprise bench tiers` (tiers.json); network and bucket are those of `others`.

    SSD reads are those not in the page cache. SetupError if the figures are not there.
    """
    speeds = _figure(result, "tiers", "gigabytes_per_s")
    try:
        return replace(
            others,
            dram_load=1e9 * speeds["load"],
            dram_save=1e9 * speeds["save"],
            ssd_read=1e9 * speeds["ssd_read_cold"],
            ssd_write=1e9 * speeds["ssd_write"],
        )
    except (KeyError, TypeError) as error:
        raise SetupError(f"no speed {error} in this result: run `reprise bench tiers --out FOLDER` again") from None


def _figure(result: Mapping[str, Any], name: str, figure: str) -> Mapping[str, Any]:
    if result.get("benchmark") != name or figure not in result.get("figures", {}):
        what = result.get("error") or f"it is of benchmark {result.get('benchmark')!r}"
        raise SetupError(f"not a result of `reprise bench {name}` ({what}): run it with --out FOLDER, take {name}.json")
    found: Mapping[str, Any] = result["figures"][figure]
    return found


def _median(rates: Mapping[str, Any], workload: str, phase: str) -> float:
    try:
        rate = float(median(rates[workload]["engine"][phase]))
    except (KeyError, TypeError, ValueError):
        raise SetupError(
            f"no {phase} rate of {workload} in this result: run `reprise bench engine --out FOLDER` again"
        ) from None
    if not rate > 0:
        raise SetupError(f"the {phase} rate of {workload} is {rate}: run `reprise bench engine` again")
    return rate
