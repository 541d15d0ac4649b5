"""The account of a turn: for each prompt token, the tier it was reused from or the cause of its recomputation.

Pure: the plan says what should have been restored, the engine says what was.
"""

from __future__ import annotations

from collections import Counter

from actors.engine.turns import StartInfo
from actors.wire import TurnAccount
from policies.messages import Cause, ChunkKey, RestorePlan, RestoreStep, Tier

_CAUSES = {"corrupt": Cause.CORRUPT, "lost": Cause.LOST, "late": Cause.LATE}


def settle(plan: RestorePlan, started: StartInfo) -> TurnAccount:
    """Tokens found in HBM, then what was loaded of each step; of the plan's rest, what failed, and what the engine had
    computed before its load came. HBM may hold more than was planned: that much less was recomputed."""
    reused: Counter[Tier] = Counter()
    if started.num_in_hbm:
        reused[Tier.HBM] = started.num_in_hbm
    for step in plan.steps:
        num_loaded = sum(_overlap(step.start, step.start + step.num_tokens, *span) for span in started.loaded)
        if num_loaded:
            reused[step.tier] += num_loaded
    recomputed = Counter(dict(plan.recomputed))
    for failed in started.failed:
        recomputed[_CAUSES[failed.reason]] += failed.num_tokens
    missing = plan.num_reused - started.num_reused - sum(failed.num_tokens for failed in started.failed)
    if missing > 0:
        recomputed[Cause.COMPUTED_SOONER] += missing
    elif missing < 0:
        recomputed = _without(recomputed, -missing)
    return TurnAccount(reused=dict(reused), recomputed=dict(recomputed), restore_s=started.restore_s)


def failed_steps(plan: RestorePlan, started: StartInfo) -> list[tuple[RestoreStep, Cause]]:
    """The copies the scheduler should forget: not those that were only late."""
    steps: dict[ChunkKey, RestoreStep] = {step.chunk: step for step in plan.steps}
    return [
        (steps[failed.key], _CAUSES[failed.reason])
        for failed in started.failed
        if failed.key in steps and failed.reason != "late"
    ]


def _overlap(start: int, end: int, other_start: int, other_end: int) -> int:
    return max(0, min(end, other_end) - max(start, other_start))


def _without(recomputed: Counter[Cause], num_tokens: int) -> Counter[Cause]:
    """Causes come in the order of the prompt: the first tokens need no cause after all."""
    left: Counter[Cause] = Counter()
    for cause, count in recomputed.items():
        taken = min(count, num_tokens)
        num_tokens -= taken
        if count > taken:
            left[cause] = count - taken
    return left
