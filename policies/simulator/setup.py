"""What a simulation is asked for: machines, model, budgets, the scheduler's tuning, the load. Checked at the door."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from policies.messages import SchedulerConfig, Tier
from policies.simulator.hardware import (
    EngineSpeed,
    LinkSpeeds,
    Machine,
    Model,
    SetupError,
    require_not_negative,
    require_positive,
    require_whole,
)

UNITS = ("bytes", "tokens")
MIN_TICK_S = 1e-3


@dataclass(frozen=True, kw_only=True)
class TierBudgets:
    """How much KV each tier holds; 0: there is no such tier. DRAM and SSD of one node, the bucket of all together."""

    dram: float
    ssd: float = 0
    bucket: float = 0
    unit: str = "bytes"
    """"bytes", or "tokens" of the set-up's model."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise SetupError(f"TierBudgets.unit is {self.unit!r}: choose from {', '.join(UNITS)}")
        require_not_negative(self, ("dram", "ssd", "bucket"), f"give a number of {self.unit}, 0 for no such tier")

    def in_bytes(self, bytes_per_token: float) -> dict[Tier, int]:
        """The tiers there are."""
        factor = bytes_per_token if self.unit == "tokens" else 1.0
        budgets = {Tier.DRAM: self.dram, Tier.SSD: self.ssd, Tier.OBJECT: self.bucket}
        return {tier: int(budget * factor) for tier, budget in budgets.items() if budget}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One cluster under one load."""

    name: str
    machine: Machine
    model: Model
    budgets: TierBudgets
    gpus_per_replica: int = 1
    replicas_per_node: int = 1
    num_nodes: int = 1
    max_running_turns: int = 24
    """Of one replica."""
    engine: EngineSpeed | None = None
    """In place of what machine and model give: measured, or known from elsewhere."""
    chunk_tokens: int = 256
    """A multiple of the trace's block_tokens."""
    scheduler: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(strict_policies=True))
    """By default a policy that misbehaves ends the run."""
    offered_load: float | None = None
    """Arrival times are scaled so that the load is this; None leaves them as recorded. See load.py."""
    reuse: bool = True
    """False: every turn says that it may not reuse, and nothing is offered."""
    reuse_after_truncation: bool = False
    """See marks.py."""
    advice_s: float = 0.0
    """So long before a follow-up comes its client says that it will (advisory prefetch); 0: nobody does."""
    offer_early: bool = True
    """Full chunks of the prompt are offered with the first token, as by the live engine; else with the turn's end."""
    num_loaders: int = 2
    """Restores of one replica at a time; others wait for them (live: EngineConfig.num_loaders)."""
    load_deadline_s: float = 10.0
    """A restore that takes longer is given up; what it did not bring is computed (live: model.load_deadline_s)."""
    tick_s: float = 0.5
    """How often the scheduler hears that time has passed, while anything is under way. Live: 0.05."""
    drop_s: float = 0.001
    """Until a Drop has freed its bytes."""
    failure_share: float = 0.0
    """Share of Saves, Fetches and Demotes that fail when their bytes are there, by chance."""
    warm_up: float = 0.0
    """Share of the requests, from the first on, that figures do not count."""
    num_windows: int = 200
    """Of the time series."""

    def __post_init__(self) -> None:
        counts = (
            "gpus_per_replica",
            "replicas_per_node",
            "num_nodes",
            "max_running_turns",
            "chunk_tokens",
            "num_loaders",
        )
        require_whole(self, (*counts, "num_windows"), "give a whole number of 1 or more")
        require_positive(self, ("load_deadline_s",), "give seconds above 0")
        if not (isinstance(self.tick_s, int | float) and MIN_TICK_S <= self.tick_s < math.inf):
            raise SetupError(f"Setup.tick_s is {self.tick_s!r}: give {MIN_TICK_S} seconds or more")
        require_not_negative(self, ("drop_s", "advice_s"), "give seconds, 0 or more")
        for name in ("failure_share", "warm_up"):
            if not 0 <= getattr(self, name) < 1:
                raise SetupError(f"Setup.{name} is {getattr(self, name)}: give a share from 0 to below 1")
        if self.offered_load is not None and not (self.offered_load > 0 and math.isfinite(self.offered_load)):
            raise SetupError(f"Setup.offered_load is {self.offered_load}: give a load above 0, or None")
        self._check_scheduler()
        _ = self.speed  # a model that does not fit is told here

    def _check_scheduler(self) -> None:
        if self.scheduler.answer_reserve != 1.0:
            raise SetupError(
                f"scheduler.answer_reserve is {self.scheduler.answer_reserve}: set it to 1, the engine's model has no "
                "preemption for turns that outgrow their reserve"
            )
        if self.scheduler.lease_s < self.load_deadline_s:
            raise SetupError(
                f"scheduler.lease_s ({self.scheduler.lease_s}) is below load_deadline_s ({self.load_deadline_s}): "
                "chunks could go while they are read; raise the one or lower the other"
            )
        budgets = self.tier_bytes
        if budgets and Tier.DRAM not in budgets:
            raise SetupError("TierBudgets.dram is 0, but lower tiers are filled through DRAM: give it some")

    @property
    def speed(self) -> EngineSpeed:
        """Of one replica."""
        return self.engine or self.machine.engine(self.model, self.gpus_per_replica)

    @property
    def links(self) -> LinkSpeeds:
        return self.machine.links

    @property
    def num_replicas(self) -> int:
        return self.num_nodes * self.replicas_per_node

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.gpus_per_replica

    @property
    def tier_bytes(self) -> dict[Tier, int]:
        """Budgets of the tiers there are: of one node, the bucket's of all."""
        return self.budgets.in_bytes(self.model.kv_bytes_per_token)
