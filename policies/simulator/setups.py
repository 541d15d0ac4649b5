"""Set-ups with names, so that people mean the same experiment: what each is for, and the trace it was made for.

paper_13b("2TB"), paper_13b("10TB")   CachedAttention's main experiment      sharegpt_like_generated
normal_load()                         load 1, DRAM far smaller than SSD      mooncake_conversation_first_half
overload(trace)                       load 1.6, 5 % of the footprint         any
"""

from __future__ import annotations

from dataclasses import replace

from policies.simulator.hardware import EngineSpeed, SetupError, machine_named, model_named
from policies.simulator.setup import Setup, TierBudgets
from policies.simulator.trace import Trace

PAPER_SSD_BYTES = {"2TB": 2e12, "10TB": 10e12}
PAPER_SLOWDOWN = 1.735
"""The paper's engine against a good one on its machine, so that at most 3.7 turns/s are served (see `paper_13b`)."""


def paper_13b(ssd: str = "10TB") -> Setup:
    """One machine of four A100-80G, LLaMA-2-13B on two of them each, batch 24, 128 GB of DRAM.

    The trace offers 5.7 turns/s. With every history reused 3.7 are served, so the queue grows to thousands of sessions
    and a look-ahead policy knows nearly everything. KV of truncated contexts is reused, and a fifth of the turns is
    warm-up, as there. The paper does not say how fast its SSDs are; 10 TB are several, so 10 GB/s are read. (At 5 GB/s
    they are the bottleneck: 3.7 turns/s of 1.2 GB.)
    """
    if ssd not in PAPER_SSD_BYTES:
        raise SetupError(f"no SSD of {ssd!r} in the paper: choose from {', '.join(PAPER_SSD_BYTES)}")
    machine, model = machine_named("a100"), model_named("llama-2-13b")
    return Setup(
        name=f"paper_13b, {ssd}",
        machine=replace(machine, links=replace(machine.links, ssd_read=10e9, ssd_write=6e9)),
        model=model,
        budgets=TierBudgets(dram=128e9, ssd=PAPER_SSD_BYTES[ssd]),
        gpus_per_replica=2,
        replicas_per_node=2,
        max_running_turns=24,
        engine=_slower(machine.engine(model, 2), PAPER_SLOWDOWN),
        chunk_tokens=256,
        reuse_after_truncation=True,
        warm_up=0.2,
    )


def normal_load(offered_load: float = 1.0) -> Setup:
    """One replica of LLaMA-2-70B on four A100 with room for 1M tokens in DRAM and 16M on an SSD of 5 GB/s.

    What is reused fits the SSD and not DRAM: what prefetching is worth shows here. Few turns run at a time, so that
    turns wait where the scheduler sees them: one that waits for its prefill in the engine is not looked ahead to.
    """
    machine = machine_named("a100")
    links = replace(machine.links, ssd_read=5e9, ssd_write=5e9)
    return Setup(
        name=f"normal_load, {offered_load:g}",
        machine=replace(machine, links=links),
        model=model_named("llama-2-70b"),
        budgets=TierBudgets(dram=1e6, ssd=16e6, unit="tokens"),
        gpus_per_replica=4,
        max_running_turns=4,
        chunk_tokens=512,
        offered_load=offered_load,
    )


def overload(trace: Trace, offered_load: float = 1.6, share: float = 0.05) -> Setup:
    """The machine of `normal_load` with room for a twentieth of the trace's footprint, all of it in DRAM.

    More comes than can be served: the queue is long, and eviction that looks into it pays.
    """
    return replace(
        normal_load(offered_load),
        name=f"overload, {offered_load:g}, {share:.0%} of the footprint",
        budgets=TierBudgets(dram=max(1.0, share * trace.footprint_tokens), unit="tokens"),
    )


def _slower(speed: EngineSpeed, factor: float) -> EngineSpeed:
    times = ("prefill_s_per_token", "prefill_s_per_token_and_context")
    steps = ("step_s", "step_s_per_turn", "step_s_per_context_token")
    return replace(speed, **{name: factor * getattr(speed, name) for name in (*times, *steps)})
