"""Plans: which chunks come from where, and why every other token is computed."""

from __future__ import annotations

import pytest

from policies import messages as m
from policies.messages import Cause, SchedulerConfig, Tier
from tests.policies.driver import Driver, only, the
from tests.policies.texts import C, Tokens, chunk_of, chunks_of, key_of, text

A = text(1, 10)


@pytest.fixture
def one() -> Driver:
    driver = Driver(SchedulerConfig(write_through=False))
    driver.join(ssd=1000)
    driver.replica()
    return driver


def plan_for(driver: Driver, tokens: Tokens, turn_id: str = "a/1", **rest: object) -> m.RestorePlan:
    plan = the(driver.submit(turn_id, tokens, **rest), m.Dispatch).plan
    assert plan.num_reused + sum(count for _, count in plan.recomputed) == len(tokens)
    return plan


def steps(plan: m.RestorePlan) -> list[tuple[int, int, Tier]]:
    return [(step.start, step.num_tokens, step.tier) for step in plan.steps]


def drop_from(driver: Driver, key: str, cause: Cause, tier: Tier = Tier.DRAM) -> None:
    driver.obey(driver.feed(m.ChunkLost(node_id="n1", chunk=key, tier=tier, cause=cause)))


# --- what is reused ---------------------------------------------------------------------------------------------------


def test_the_next_turn_reuses_everything_before_it(one: Driver) -> None:
    one.store(A)
    plan = plan_for(one, text(2, 15, after=A), cuts=[10])
    assert steps(plan) == [(0, 4, Tier.DRAM), (4, 4, Tier.DRAM), (8, 2, Tier.DRAM)]
    assert plan.recomputed == ((Cause.NEVER_STORED, 5),)
    assert [step.chunk for step in plan.steps] == [info.key for info in chunks_of(A)]
    assert [step.num_bytes for step in plan.steps] == [40, 40, 20]
    assert {step.node_id for step in plan.steps} == {"n1"}


def test_the_last_token_is_always_computed(one: Driver) -> None:
    one.store(A)
    plan = plan_for(one, A)
    assert steps(plan) == [(0, 4, Tier.DRAM), (4, 4, Tier.DRAM), (8, 1, Tier.DRAM)]
    assert plan.recomputed == ((Cause.LAST_TOKEN, 1),)


def test_the_last_token_may_cost_a_whole_step(one: Driver) -> None:
    tokens = text(1, 9)
    one.store(tokens)
    plan = plan_for(one, tokens)
    assert steps(plan) == [(0, 4, Tier.DRAM), (4, 4, Tier.DRAM)]
    assert plan.recomputed == ((Cause.LAST_TOKEN, 1),)


def test_a_prompt_of_one_token(one: Driver) -> None:
    one.store(text(1, 1))
    assert plan_for(one, text(1, 1)).recomputed == ((Cause.LAST_TOKEN, 1),)


def test_a_prompt_uses_the_first_part_of_a_longer_chunk(one: Driver) -> None:
    one.obey(one.offer(chunks_of(A, cuts=[6])))
    branch = text(2, 12, after=A[:6])
    plan = plan_for(one, branch, cuts=[6])
    assert steps(plan) == [(0, 4, Tier.DRAM), (4, 2, Tier.DRAM)]
    assert plan.steps[1].chunk == key_of(A[:8])
    assert plan.recomputed == ((Cause.NEVER_STORED, 6),)


def test_a_mark_that_no_chunk_knows_is_not_found(one: Driver) -> None:
    one.store(A)
    plan = plan_for(one, text(2, 12, after=A[:6]), cuts=[6])
    assert steps(plan) == [(0, 4, Tier.DRAM)]


def test_a_repeated_offer_teaches_marks(one: Driver) -> None:
    """Another conversation that was cut inside a stored chunk offers it with its cut: declined, and remembered."""
    one.store(A)
    (decline,) = one.offer(chunks_of(A, cuts=[6]))
    assert isinstance(decline, m.Decline)
    plan = plan_for(one, text(2, 12, after=A[:6]), cuts=[6])
    assert steps(plan) == [(0, 4, Tier.DRAM), (4, 2, Tier.DRAM)]


def test_shared_prefixes_are_stored_once(one: Driver) -> None:
    one.store(A)
    commands = one.offer(chunks_of(text(2, 12, after=A[:8])), session="t")
    assert [info.start for info in the(commands, m.Save).chunks] == [8]
    assert the(commands, m.Decline).chunks == (key_of(A[:4]), key_of(A[:8]))


def test_the_fastest_copy_is_read(one: Driver) -> None:
    one.join(ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(A)])
    assert [tier for _, _, tier in steps(plan_for(one, A, "a/1"))] == [Tier.SSD] * 3, "directly, without waiting"
    one.join(
        ssd=1000,
        inventory=[(info, tier) for info in chunks_of(A) for tier in (Tier.SSD, Tier.DRAM)],
    )
    assert [tier for _, _, tier in steps(plan_for(one, A, "a/2"))] == [Tier.DRAM] * 3


def test_chunks_saved_but_not_confirmed_are_not_read(one: Driver) -> None:
    save = the(one.offer(chunks_of(A)), m.Save)
    assert one.submit("a/1", A) == [], "it waits for them"
    plan = the(one.obey([save]), m.Dispatch).plan
    assert plan.num_reused == 9


# --- why the rest is computed -----------------------------------------------------------------------------------------


def test_never_stored(one: Driver) -> None:
    assert plan_for(one, A).recomputed == ((Cause.NEVER_STORED, 10),)


@pytest.mark.parametrize("cause", [Cause.CORRUPT, Cause.LOST])
def test_a_broken_copy_names_its_cause(one: Driver, cause: Cause) -> None:
    one.store(A)
    drop_from(one, key_of(A), cause)
    assert plan_for(one, A).recomputed == ((cause, 2),)


def test_what_lies_behind_a_gap_takes_its_cause(one: Driver) -> None:
    one.store(A)
    drop_from(one, key_of(A[:8]), Cause.CORRUPT)
    plan = plan_for(one, text(2, 13, after=A), cuts=[10])
    assert steps(plan) == [(0, 4, Tier.DRAM)]
    assert plan.recomputed == ((Cause.CORRUPT, 6), (Cause.NEVER_STORED, 3))


def test_a_drop_that_is_not_confirmed_yet_names_its_cause(one: Driver) -> None:
    one.store(A)
    one.feed(m.ChunkLost(node_id="n1", chunk=key_of(A), tier=Tier.DRAM, cause=Cause.CORRUPT))
    assert plan_for(one, A).recomputed == ((Cause.CORRUPT, 2),)


def test_evicted() -> None:
    driver = Driver()
    driver.join(dram=100)
    driver.replica()
    driver.store(A)
    driver.store(text(2, 8))
    plan = the(driver.submit("a/1", A), m.Dispatch).plan
    assert dict(plan.recomputed)[Cause.EVICTED] > 0
    assert set(dict(plan.recomputed)) == {Cause.EVICTED}


def test_declined_by_admission() -> None:
    class Never:
        def admit(self, offer: object, outlook: object) -> bool:
            return False

    driver = Driver(admission=Never())
    driver.join()
    driver.replica()
    assert the(driver.offer(chunks_of(A)), m.Decline).chunks == tuple(info.key for info in chunks_of(A))
    assert plan_for(driver, A).recomputed == ((Cause.DECLINED, 10),)


def test_lost_with_its_node() -> None:
    driver = Driver()
    driver.join("n1")
    driver.replica("r1", "n1")
    driver.store(A)
    driver.feed(m.NodeLost("n1"))
    assert plan_for(driver, A).recomputed == ((Cause.LOST, 10),)


def test_a_failed_save_is_lost(one: Driver) -> None:
    save = the(one.offer(chunks_of(A)), m.Save)
    one.feed(m.CommandFailed(command=save, reason="its replica died"))
    assert plan_for(one, A).recomputed == ((Cause.LOST, 10),)


def test_late() -> None:
    driver = Driver()
    driver.join("n1")
    driver.join("n2")
    driver.replica("r2", "n2")
    driver.store(A, node_id="n2", replica_id="r2")
    driver.feed(m.ReplicaLost("r2"))
    driver.replica("r1", "n1")
    assert only(driver.submit("a/1", A), m.Dispatch) == []
    assert driver.wait(9.9) == []
    plan = the(driver.wait(0.2), m.Dispatch).plan
    assert plan.recomputed == ((Cause.LATE, 10),)


def test_drift_beyond_what_was_stored(one: Driver) -> None:
    one.store(A, session="a")
    drifted = text(2, 14, after=A[:5])
    plan = plan_for(one, drifted, drift_at=5)
    assert plan.num_reused == 4
    assert plan.recomputed == ((Cause.DRIFT, 5), (Cause.NEVER_STORED, 5)), "10 tokens of the session were known"


def test_reuse_off(one: Driver) -> None:
    one.store(A)
    assert plan_for(one, A, reuse=False).recomputed == ((Cause.REUSE_OFF, 10),)


def test_tokens_are_counted_by_tier_and_cause(one: Driver) -> None:
    one.store(A)
    plan_for(one, text(2, 15, after=A), cuts=[10])
    plan_for(one, A, "a/2", reuse=False)
    counters = {name: count for name, count in one.figures["counters"].items() if name.startswith("re")}
    assert counters == {"reused.dram": 10, "recomputed.never_stored": 5, "recomputed.reuse_off": 10}


def test_forgotten_ghosts_are_never_stored() -> None:
    driver = Driver(SchedulerConfig(ghosts=1))
    driver.join()
    driver.replica()
    driver.store(A)
    driver.feed(m.NodeLost("n1"))
    causes = dict(plan_for(driver, A).recomputed)
    assert set(causes) <= {Cause.LOST, Cause.NEVER_STORED}
    assert driver.figures["ghosts"] == 1


def test_a_chunk_needs_its_parent(one: Driver) -> None:
    """A chunk whose parent nobody has could not be reached."""
    commands = one.offer([chunk_of(A, C)])
    assert the(commands, m.Decline).chunks == (key_of(A[:8]),)
