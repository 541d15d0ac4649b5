"""The account of a turn: every prompt token has a tier or a cause."""

from actors.account import failed_steps, settle
from actors.engine.turns import FailedRestore, StartInfo
from policies.messages import Cause, RestorePlan, RestoreStep, Tier


def step(chunk: str, start: int, num_tokens: int, tier: Tier) -> RestoreStep:
    return RestoreStep(chunk=chunk, start=start, num_tokens=num_tokens, num_bytes=1, tier=tier, node_id="n")


PLAN = RestorePlan(
    steps=(step("a", 0, 16, Tier.DRAM), step("b", 16, 16, Tier.SSD), step("c", 32, 5, Tier.DRAM)),
    recomputed=((Cause.EVICTED, 4), (Cause.NEVER_STORED, 9)),
)


def test_a_plan_that_held() -> None:
    account = settle(PLAN, StartInfo(loaded=((0, 37),)))
    assert account.reused == {Tier.DRAM: 21, Tier.SSD: 16}
    assert account.recomputed == {Cause.EVICTED: 4, Cause.NEVER_STORED: 9}
    assert account.num_prompt_tokens == 50


def test_a_corrupt_chunk_costs_all_behind_it() -> None:
    started = StartInfo(loaded=((0, 16),), failed=(FailedRestore(key="b", reason="corrupt", num_tokens=21),))
    account = settle(PLAN, started)
    assert account.reused == {Tier.DRAM: 16}
    assert account.recomputed[Cause.CORRUPT] == 21
    assert account.num_prompt_tokens == 50
    assert failed_steps(PLAN, started) == [(PLAN.steps[1], Cause.CORRUPT)]


def test_a_lost_chunk_is_told_apart() -> None:
    started = StartInfo(failed=(FailedRestore(key="a", reason="lost", num_tokens=37),))
    assert settle(PLAN, started).recomputed[Cause.LOST] == 37


def test_a_late_chunk_is_not_a_lost_one() -> None:
    started = StartInfo(loaded=((32, 37),), failed=(FailedRestore(key="b", reason="late", num_tokens=32),))
    account = settle(PLAN, started)
    assert (account.reused, account.recomputed[Cause.LATE]) == ({Tier.DRAM: 5}, 32)
    assert failed_steps(PLAN, started) == []


def test_what_was_computed_before_its_load_came() -> None:
    account = settle(PLAN, StartInfo(loaded=((20, 37),)))
    assert account.reused == {Tier.SSD: 12, Tier.DRAM: 5}
    assert account.recomputed[Cause.COMPUTED_SOONER] == 20
    assert account.num_prompt_tokens == 50


def test_blocks_in_hbm_come_first_and_may_reach_beyond_the_plan() -> None:
    account = settle(PLAN, StartInfo(num_in_hbm=16, loaded=((16, 37),)))
    assert account.reused == {Tier.HBM: 16, Tier.SSD: 16, Tier.DRAM: 5}
    account = settle(PLAN, StartInfo(num_in_hbm=43))
    assert (account.reused, account.recomputed) == ({Tier.HBM: 43}, {Cause.NEVER_STORED: 7})
    assert account.num_prompt_tokens == 50


def test_nothing_planned() -> None:
    account = settle(RestorePlan(recomputed=((Cause.REUSE_OFF, 7),)), StartInfo())
    assert (account.reused, account.recomputed) == ({}, {Cause.REUSE_OFF: 7})
