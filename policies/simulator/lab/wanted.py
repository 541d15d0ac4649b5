"""A set-up by a few choices: a named one, and what is to be different about it. Made for a trace: some depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policies.messages import Tier
from policies.simulator.hardware import machine_named, model_named
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.naming import Size
from policies.simulator.replay import Level, footprint_tokens
from policies.simulator.setup import Setup, TierBudgets
from policies.simulator.setups import normal_load, overload, paper_13b
from policies.simulator.trace import Trace

TIERED_DRAM, TIERED_SSD = 0.05, 0.25


def tiered(trace: Trace) -> Setup:
    """The machine of `normal_load` at load 1, with tiers in proportion to the trace: the default of the laboratory."""
    tokens = footprint_of(trace)
    budgets = TierBudgets(dram=TIERED_DRAM * tokens, ssd=TIERED_SSD * tokens, unit="tokens")
    return replace(normal_load(1.0), name="tiered, 1", budgets=budgets)


SETUPS: dict[str, Callable[[Trace], Setup]] = {
    "tiered": tiered,
    "normal_load": lambda _: normal_load(),
    "overload": overload,
    "paper_13b": lambda _: paper_13b(),
    "paper_13b_2tb": lambda _: paper_13b("2TB"),
}
SETUP_WORDS = {
    "tiered": f"LLaMA-2-70B, load 1, DRAM {TIERED_DRAM:.0%} and SSD {TIERED_SSD:.0%} of the trace's footprint",
    "normal_load": "the same at load 1, DRAM 1M and SSD 16M tokens",
    "overload": "the same at load 1.6, DRAM 5% of the footprint",
    "paper_13b": "CachedAttention's: LLaMA-2-13B, 128 GB of DRAM, 10 TB of SSD, load as recorded",
    "paper_13b_2tb": "the same with 2 TB of SSD",
}
RECORDED = "recorded"


def footprint_of(trace: Trace) -> int:
    """Tokens that a store which never evicts would hold: distinct blocks, or sessions' longest turns without ids."""
    return footprint_tokens(trace, Level.BLOCK if trace.block_tokens else Level.SESSION)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """None: as the named set-up has it."""

    setup: str = "tiered"
    load: float | str | None = None
    """The offered load, or "recorded" for arrivals as they were."""
    nodes: int | None = None
    dram: Size | None = None
    """Of one node, like `ssd`."""
    ssd: Size | None = None
    bucket: Size | None = None
    """Object storage, of all nodes together."""
    hardware: str | None = None
    model: str | None = None
    gpus: int | None = None
    """Of one replica."""
    warm_up: float | None = None
    advice_s: float | None = None
    is_strict: bool = False
    """A policy that misbehaves ends the run; otherwise its faults are counted."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """Import paths by kind."""

    def build(self, trace: Trace) -> Setup:
        """SetupError or LabError with advice. Chunks are made to fit the trace's blocks."""
        make = SETUPS.get(self.setup)
        if make is None:
            raise LabError(f"no set-up {self.setup!r}: choose from {', '.join(SETUPS)}")
        base = make(trace)
        setup = replace(base, **self._changes(base, trace))
        return replace(setup, budgets=self._budgets(setup, trace))

    def _changes(self, base: Setup, trace: Trace) -> dict[str, Any]:
        paths: dict[str, Any] = dict(self.policies)
        scheduler = replace(base.scheduler, strict_policies=self.is_strict, **paths)
        changes: dict[str, Any] = {"scheduler": scheduler, "chunk_tokens": _fitting(base.chunk_tokens, trace)}
        if self.load is not None:
            changes["offered_load"] = None if self.load == RECORDED else float(self.load)
        counts = {
            "num_nodes": self.nodes,
            "warm_up": self.warm_up,
            "gpus_per_replica": self.gpus,
            "advice_s": self.advice_s,
        }
        changes |= {name: value for name, value in counts.items() if value is not None}
        if self.hardware is not None:
            changes["machine"] = machine_named(self.hardware)
        if self.model is not None:
            changes["model"] = model_named(self.model)
        if self.hardware or self.model or self.gpus:
            changes["engine"] = None  # what was measured or known is of another machine
        return changes | {"name": self._name(base)}

    def _name(self, base: Setup) -> str:
        """The choices in words; the set-up's own name if there are none."""
        load = f"load {self.load}" if isinstance(self.load, str) else f"load {self.load:g}" if self.load else ""
        words = [self.setup, load] if load else [base.name]
        words += [f"{self.nodes} nodes"] if self.nodes else []
        for name in ("dram", "ssd", "bucket"):
            size: Size | None = getattr(self, name)
            if size is not None:
                amount = f"{size.amount:.3g} of the footprint" if size.unit == "share" else f"{size.amount:.3g}"
                words.append(f"{name} {amount}" + ("" if size.unit == "share" else f" {size.unit}"))
        words += [name for name in (self.hardware, self.model) if name]
        return ", ".join(words)

    def _budgets(self, setup: Setup, trace: Trace) -> TierBudgets:
        """In bytes. What is not asked for is what the set-up has, for its model."""
        per_token, tokens = setup.model.kv_bytes_per_token, footprint_of(trace)
        had = setup.tier_bytes
        dram = had.get(Tier.DRAM, 0) if self.dram is None else self.dram.in_bytes(per_token, tokens)
        ssd = had.get(Tier.SSD, 0) if self.ssd is None else self.ssd.in_bytes(per_token, tokens)
        bucket = had.get(Tier.OBJECT, 0) if self.bucket is None else self.bucket.in_bytes(per_token, tokens)
        return TierBudgets(dram=dram, ssd=ssd, bucket=bucket)


def _fitting(chunk_tokens: int, trace: Trace) -> int:
    """The smallest multiple of the trace's blocks that is not below."""
    size = trace.block_tokens
    return chunk_tokens if not size else -(-chunk_tokens // size) * size
