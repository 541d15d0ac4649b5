"""What the next step does: pure planning over numbers, no tensors, no clock, no state.

Decodes come first (one token each, oldest turn first), then prefill chunks in the order of arrival while the step's
budget lasts, then, if no other turn wants to compute, the front of turns that load. A turn is admitted when there is
room for all its known tokens, so only decoding ever asks for more blocks. When there are none, the latest arrival gives
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """How far a turn is, for planning."""

    QUEUED = "queued"
    """Wants blocks for all its tokens."""
    LOADING = "loading"
    """Holds blocks that a loader writes to. The front of what it loads may be computed meanwhile."""
    COMPUTING = "computing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One turn as the planner sees it."""

    turn_id: str
    arrival: int
    phase: Phase
    num_tokens: int
    num_computed: int
    num_blocks: int
    """Blocks it holds, or (queued) would share with turns that hold them."""
    stop: int | None = None
    """A step computes at most up to this token: from there on KV is in place, or being loaded."""

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is not there yet; with 1 left, the turn decodes."""
        return self.num_tokens - self.num_computed

    @property
    def num_wanted(self) -> int:
        """Tokens that one step may compute."""
        return (self.num_tokens if self.stop is None else self.stop) - self.num_computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a step may use. `num_pending_blocks` are held by loaders and savers only and come back by themselves."""

    num_free_blocks: int
    num_pending_blocks: int
    block_tokens: int
    max_step_tokens: int
    max_running_turns: int

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `num_tokens` tokens of a turn from `start` on; it needs `num_new_blocks` more blocks for them."""

    turn_id: str
    start: int
    num_tokens: int
    num_new_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Blocks for `work` are free now. `preempt` has at most one turn and none that is in `work`."""

    work: tuple[Work, ...] = ()
    admit: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.work)


def plan_step(demands: Sequence[Demand], room: Room) -> StepPlan:
    """The next step for all turns of the engine. Changes nothing; an empty plan means: wait for a loader or saver."""
    by_arrival = sorted(demands, key=lambda demand: demand.arrival)
    holding = [demand for demand in by_arrival if demand.phase is not Phase.QUEUED]
    computing = [demand for demand in holding if demand.phase is Phase.COMPUTING]
    decodes, starved = _plan_decodes(computing, room)
    victim = _victim(holding, room) if starved else None
    work = [w for w in decodes if w.turn_id != victim]
    prefill, budget = _plan_prefill(computing, victim, room.max_step_tokens - len(work))
    work += prefill
    if not prefill:
        work += _plan_prefill([d for d in holding if d.phase is Phase.LOADING], victim, budget)[0]
    if starved:  # nobody joins while somebody who runs has no room
        return StepPlan(work=tuple(work), preempt=(victim,) if victim is not None else ())
    num_free = room.num_free_blocks - sum(w.num_new_blocks for w in work)
    return StepPlan(work=tuple(work), admit=_plan_admission(by_arrival, len(holding), num_free, room))


def _plan_decodes(computing: Sequence[Demand], room: Room) -> tuple[list[Work], bool]:
    """One token for each turn that decodes, and whether one of them has no block for it and sits this step out."""
    work: list[Work] = []
    num_free, starved = room.num_free_blocks, False
    for demand in computing:
        if demand.num_remaining != 1:
            continue
        missing = max(0, room.blocks_for(demand.num_tokens) - demand.num_blocks)
        if missing > num_free:
            starved = True
            continue
        num_free -= missing
        work.append(Work(demand.turn_id, demand.num_computed, 1, missing))
    return work, starved


def _victim(holding: Sequence[Demand], room: Room) -> str | None:
    """The latest arrival. None while blocks come back by themselves."""
    return None if room.num_pending_blocks > 0 else holding[-1].turn_id


def _plan_prefill(demands: Sequence[Demand], victim: str | None, budget: int) -> tuple[list[Work], int]:
    """Prefill chunks in the order of arrival, and what they leave of the budget."""
    work: list[Work] = []
    for demand in demands:
        if demand.num_remaining == 1 or demand.turn_id == victim:
            continue
        num_tokens = min(demand.num_wanted, budget)
        if num_tokens > 0:
            budget -= num_tokens
            work.append(Work(demand.turn_id, demand.num_computed, num_tokens))
    return work, budget


def _plan_admission(by_arrival: Sequence[Demand], num_holding: int, num_free: int, room: Room) -> tuple[str, ...]:
    """In order of arrival, nobody overtakes; every turn that holds blocks keeps one free block to grow into."""
    admit: list[str] = []
    for demand in by_arrival:
        if demand.phase is not Phase.QUEUED:
            continue
        needed = room.blocks_for(demand.num_tokens) - demand.num_blocks
        if num_holding >= room.max_running_turns or needed + num_holding > num_free:
            break
        num_free -= needed
        num_holding += 1
        admit.append(demand.turn_id)
    return tuple(admit)
