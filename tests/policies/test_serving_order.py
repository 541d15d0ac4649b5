"""In which order waiting turns run: what each policy promises, and that the scheduler keeps to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.messages import SchedulerConfig
from policies.queue import LAST_CLASS
from policies.serving_order import AgedPriority, Fcfs, LeastUncachedFirst, ServingOrderPolicy, Submission
from tests.policies.driver import Driver, dispatched
from tests.policies.texts import text, turn_of

POLICIES = (Fcfs(), LeastUncachedFirst(), AgedPriority())
HOME = "policies.serving_order:"


def submission(
    num_tokens: int = 100,
    num_cached: int = 0,
    *,
    now: float = 0.0,
    mean: float = 100.0,
    wait_s: float = 0.0,
    **turn: Any,
) -> Submission:
    return Submission(
        turn=turn_of("a/1", text(1, num_tokens), **turn),
        now=now,
        mean_prompt_tokens=mean,
        recent_wait_s=wait_s,
        num_cached_tokens=min(num_cached, num_tokens),
    )


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 300),
    num_cached=st.integers(0, 400),
    now=st.floats(0, 1e9),
    mean=st.floats(0, 1e6),
    wait_s=st.floats(0, 1e6),
    priority=st.integers(-1000, 1000),
)
def test_a_place_is_a_class_and_a_time_and_asking_changes_nothing(
    policy: ServingOrderPolicy, num_tokens: int, num_cached: int, priority: int, **rest: float
) -> None:
    one = submission(num_tokens, num_cached, priority=priority, **rest)
    kind, arrival = policy.place(one)
    assert abs(kind) < LAST_CLASS
    assert arrival == pytest.approx(arrival), "a number"
    assert policy.place(one) == (kind, arrival)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_of_two_like_turns_the_earlier_goes_first(policy: ServingOrderPolicy) -> None:
    assert policy.place(submission(now=1.0)) < policy.place(submission(now=1.5))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_of_two_that_come_together_the_more_urgent_goes_first(policy: ServingOrderPolicy) -> None:
    assert policy.place(submission(priority=-1)) < policy.place(submission(priority=0))


# --- what each promises -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    bound_s=st.floats(0, 1e4),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    cached=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    later_s=st.floats(0, 1e5),
)
def test_nobody_is_overtaken_by_who_comes_two_bounds_later(
    bound_s: float, sizes: tuple[int, int], cached: tuple[int, int], later_s: float
) -> None:
    policy = LeastUncachedFirst(bound_s=bound_s, patience=0.0)
    first = policy.place(submission(sizes[0], cached[0]))
    second = policy.place(submission(sizes[1], cached[1], now=2 * bound_s + later_s + 1e-6))
    assert first < second


def test_what_is_stored_goes_before_what_must_be_computed() -> None:
    policy = LeastUncachedFirst(bound_s=30.0)
    order = [(150, 149), (150, 75), (20, 0), (150, 0)]
    places = [policy.place(submission(*sizes)) for sizes in order]
    assert places == sorted(places)


def test_the_bound_grows_with_the_queue() -> None:
    policy = LeastUncachedFirst(bound_s=30.0, patience=1.0)
    for wait_s, overtakes in ((0.0, False), (1000.0, True)):
        new = policy.place(submission(100, 0, wait_s=wait_s))
        back = policy.place(submission(100, 99, now=500.0, wait_s=wait_s))
        assert (back < new) is overtakes


def test_without_bound_it_is_first_come_first_served() -> None:
    policy = LeastUncachedFirst(bound_s=0.0, patience=0.0)
    assert policy.place(submission(100, 0, now=3.0)) == Fcfs().place(submission(7, 5, now=3.0))


def test_a_class_that_has_waited_long_enough_goes_before_a_more_urgent_one() -> None:
    policy = AgedPriority(step_s=30.0)
    patient = policy.place(submission(priority=2))
    assert policy.place(submission(priority=0, now=59.0)) < patient < policy.place(submission(priority=0, now=61.0))


@pytest.mark.parametrize("wrong", [{"bound_s": -1.0}, {"patience": -1.0}, {"bound_s": float("nan")}], ids=str)
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="LeastUncachedFirst takes"):
        LeastUncachedFirst(**wrong)
    with pytest.raises(ValueError, match="AgedPriority takes"):
        AgedPriority(step_s=-1.0)


# --- in a scheduler ---------------------------------------------------------------------------------------------------


def busy(serving_order: str = "LeastUncachedFirst", **config: Any) -> Driver:
    """One slot, and it is taken."""
    driver = Driver(SchedulerConfig(serving_order=HOME + serving_order, **config))
    driver.join()
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    return driver


def served(driver: Driver, running: str = "x/1") -> list[str]:
    """Who runs after whom."""
    order = []
    while running:
        [*now] = dispatched(driver.finish(running))
        order += now
        running = now[0] if now else ""
    return order


def test_a_returning_conversation_overtakes_a_new_one() -> None:
    driver = busy()
    driver.store(text(1, 12))
    driver.submit("new/1", text(2, 16))
    driver.submit("back/2", text(3, 4, after=text(1, 12)))
    assert served(driver) == ["back/2", "new/1"]


def test_fcfs_serves_as_they_come() -> None:
    driver = busy("Fcfs")
    driver.store(text(1, 12))
    driver.submit("new/1", text(2, 16))
    driver.submit("back/2", text(3, 4, after=text(1, 12)))
    assert served(driver) == ["new/1", "back/2"]


def test_priorities_are_classes_unless_they_age() -> None:
    for order, expected in (("Fcfs", ["soon/1", "late/1"]), ("AgedPriority(step_s=1.0)", ["late/1", "soon/1"])):
        driver = busy(order)
        driver.submit("late/1", text(2, 4), priority=3)
        driver.wait(10.0)
        driver.submit("soon/1", text(3, 4), priority=0)
        assert served(driver) == expected


@pytest.mark.parametrize("answer", [None, 3, (0, float("nan")), (LAST_CLASS, 0.0), ("a", 0.0), (0, 0.0, 0)], ids=str)
def test_a_place_that_is_none_is_a_fault_and_the_turn_waits_as_it_came(answer: Any) -> None:
    class Odd:
        def place(self, submission: Submission) -> Any:
            return answer

    driver = Driver(serving_order=Odd())
    driver.join()
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4))
    driver.submit("a/1", text(1, 4))
    driver.submit("b/1", text(2, 4))
    assert served(driver) == ["a/1", "b/1"]
    assert sum(driver.figures["policy_faults"].values()) == 3
