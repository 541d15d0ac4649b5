"""The account of a turn: for each prompt token, the tier it was reused from or the cause of its recomputation.

Pure: the plan says what should have been restored, the engine says what was.
"""

from __future__ import annotations

from collections import Counter

from actors.engine.turns import StartInfo
from actors.wire import TurnAccount
from policies.messages import Cause, ChunkKey, RestorePlan, RestoreStep, Tier

_CAUSES = {"corrupt": Cause.CORRUPT, "lost": Cause.LOST}


def settle(plan: RestorePlan, started: StartInfo) -> TurnAccount:
    """What the engine restored counts as reused, in the plan's order; the plan's rest is charged to what failed."""
    reused: Counter[Tier] = Counter()
    left = started.num_reused
    for step in plan.steps:
        taken = min(left, step.num_tokens)
        if taken:
            reused[step.tier] += taken
        left -= taken
    recomputed = Counter(dict(plan.recomputed))
    shortfall = plan.num_reused - started.num_reused
    if shortfall:
        recomputed[_cause(started)] += shortfall
    return TurnAccount(reused=dict(reused), recomputed=dict(recomputed), restore_s=started.restore_s)


def failed_steps(plan: RestorePlan, started: StartInfo) -> list[tuple[RestoreStep, Cause]]:
    """The copies the scheduler should forget."""
    steps: dict[ChunkKey, RestoreStep] = {step.chunk: step for step in plan.steps}
    return [(steps[failed.key], _CAUSES[failed.reason]) for failed in started.failed if failed.key in steps]


def _cause(started: StartInfo) -> Cause:
    return _CAUSES[started.failed[0].reason] if started.failed else Cause.LATE
