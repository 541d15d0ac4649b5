"""Replicas follow the load: up soon, down slowly, never beyond the bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.scaling import DOWN_AFTER_S, UP_AFTER_S, Load, Scaler


def load(replicas: int, turns: int, kv: float = 0.0, slots: int = 10) -> Load:
    running = min(turns, replicas * slots)
    return Load(
        num_replicas=replicas, num_running=running, num_waiting=turns - running, slots_per_replica=slots, kv_share=kv
    )


def test_more_are_wanted_for_turns_and_for_kv():
    assert load(1, 8).wanted == 1
    assert load(1, 9).wanted == 2
    assert load(1, 33).wanted == 5
    assert load(4, 8, kv=0.9).wanted == 4
    assert load(4, 8, kv=0.95).wanted == 5


def test_up_after_seconds_without_a_break():
    scaler = Scaler(1, 8)
    assert scaler.target(load(1, 40), 0.0) == 1
    assert scaler.target(load(1, 40), UP_AFTER_S - 0.1) == 1
    assert scaler.target(load(1, 1), UP_AFTER_S) == 1  # the burst is over
    assert scaler.target(load(1, 40), UP_AFTER_S + 1) == 1
    assert scaler.target(load(1, 40), 2 * UP_AFTER_S + 1) == 5


def test_down_one_at_a_time():
    scaler = Scaler(1, 8)
    now, replicas, steps = 0.0, 4, []
    while replicas > 1:
        target = scaler.target(load(replicas, 0), now)
        if target < replicas:
            steps.append(now)
            replicas = target
        now += 1.0
    assert steps == [DOWN_AFTER_S, 2 * DOWN_AFTER_S, 3 * DOWN_AFTER_S]


def test_without_a_wish_for_more_it_never_changes():
    scaler = Scaler(2, 0)
    assert [scaler.target(load(2, 1000), float(now)) for now in range(100)] == [2] * 100


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 1)), max_size=60), st.integers(1, 4), st.integers(0, 9))
def test_never_beyond_the_bounds(loads, low, high):
    scaler, replicas = Scaler(low, high), low
    for now, (turns, kv) in enumerate(loads):
        replicas = scaler.target(load(replicas, turns, kv), 7.0 * now)
        assert low <= replicas <= max(low, high)
