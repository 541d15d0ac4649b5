"""The parts underneath: sorted keys, timers, byte accounts, the waiting queue, legal moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.catalog import COPY_MOVES, CopyState
from policies.messages import Tier, TierSpec
from policies.multimap import Multimap
from policies.ordered import RUN_LENGTH, SortedKeys
from policies.places import SHARED, Account, Place, place_of
from policies.queue import FIRST, WaitingQueue
from policies.timers import Timers
from policies.turns import TURN_MOVES, TurnState
from tests.policies.texts import key_of, text, turn_of

keys = st.tuples(st.integers(0, 3), st.integers(0, 30))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), keys), max_size=120))
def test_sorted_keys_behave_like_a_sorted_set(moves: list[tuple[bool, tuple[int, int]]]) -> None:
    ours: SortedKeys[tuple[int, int]] = SortedKeys()
    theirs: set[tuple[int, int]] = set()
    for is_new, key in moves:
        if is_new:
            assert ours.add(key) == (key not in theirs)
            theirs.add(key)
        else:
            assert ours.discard(key) == (key in theirs)
            theirs.discard(key)
        assert list(ours) == sorted(theirs)
        assert len(ours) == len(theirs)
        assert (key in ours) == (key in theirs)
        assert ours.position(key) == sum(other < key for other in theirs)
        assert ours.lowest() == min(theirs, default=None)
    for position, key in enumerate(sorted(theirs)):
        assert ours.nth(position) == key
    assert ours.nth(len(theirs)) is None
    assert ours.first(3) == sorted(theirs)[:3]


def test_sorted_keys_over_many_runs() -> None:
    numbers = [(number * 7919 % 5000,) for number in range(5000)]
    ours = SortedKeys(numbers)
    assert list(ours) == [(number,) for number in range(5000)]
    assert ours.nth(3 * RUN_LENGTH) == (3 * RUN_LENGTH,)
    assert ours.position((4321,)) == 4321
    for number in range(0, 5000, 2):
        assert ours.discard((number,))
    assert ours.first(2) == [(1,), (3,)]
    assert ours.position((4321,)) == 2160


def test_timers_run_in_order_and_once() -> None:
    timers, rung = Timers(), list[str]()
    timers.at(2.0, rung.append, "b")
    timers.at(1.0, rung.append, "a")
    timers.at(2.0, rung.append, "c")
    timers.at(9.0, rung.append, "z")
    timers.run_due(0.5)
    assert rung == []
    timers.run_due(2.0)
    timers.run_due(2.0)
    assert rung == ["a", "b", "c"]
    assert len(timers) == 1


def test_what_a_timer_sets_for_now_runs_next_time() -> None:
    timers, rung = Timers(), list[str]()
    timers.at(1.0, lambda: timers.at(1.0, rung.append, "again"))
    timers.run_due(1.0)
    assert rung == []
    timers.run_due(1.0)
    assert rung == ["again"]


def test_an_account_never_goes_over_its_budget() -> None:
    account = Account(budget_bytes=100, bytes_per_s=1.0)
    assert account.reserve(60)
    assert not account.reserve(41)
    assert account.reserve(40)
    account.settle(60, 60)
    account.cancel(40)
    assert (account.used_bytes, account.reserved_bytes) == (60, 0)
    account.free(60)
    assert account.filled_bytes == 0


def test_an_account_found_overfull_comes_down() -> None:
    account = Account(budget_bytes=100, bytes_per_s=1.0)
    account.inherit(150)
    assert account.ceiling_bytes == 150
    assert not account.reserve(1)
    account.free(40)
    assert account.ceiling_bytes == 110
    account.free(40)
    assert account.ceiling_bytes == 100
    account.revise(TierSpec(tier=Tier.SSD, budget_bytes=50))
    assert account.ceiling_bytes == 70


def test_the_bucket_is_one_place() -> None:
    assert place_of("n1", Tier.OBJECT) == place_of("n2", Tier.OBJECT) == Place(SHARED, Tier.OBJECT)
    assert place_of("n1", Tier.SSD) != place_of("n2", Tier.SSD)


def test_the_queue_knows_who_needs_what_first() -> None:
    queue, shared = WaitingQueue(), text(1, 4)
    late, soon = turn_of("late", text(2, 8, after=shared), priority=1), turn_of("soon", shared)
    orders = [queue.new_order((turn.priority, 0.0)) for turn in (late, soon)]
    assert queue.add(late, orders[0]) == [mark.key for mark in late.prompt]
    assert queue.add(soon, orders[1]) == [key_of(shared)], "its next use changed"
    assert queue.next_use(key_of(shared)) == orders[1]
    assert queue.first(2) == ["soon", "late"]
    assert queue.mean_prompt_tokens == 6.0
    assert queue.remove("soon") == [key_of(shared)]
    assert queue.next_use(key_of(shared)) == orders[0]
    assert queue.remove("late") == [mark.key for mark in late.prompt]
    assert queue.next_use(key_of(shared)) is None
    assert len(queue) == 0
    with pytest.raises(KeyError):
        queue.remove("late")


def test_first_is_before_every_priority() -> None:
    assert WaitingQueue().new_order((-(10**12), 0.0)) > FIRST


def test_a_copy_is_read_only_when_it_is_committed() -> None:
    """Every copy becomes RESIDENT by one move and leaves through DROPPING only: nothing is read before or after."""
    assert COPY_MOVES[CopyState.RESIDENT] == {CopyState.DROPPING}
    assert COPY_MOVES[CopyState.DROPPING] == {None}
    assert COPY_MOVES.keys() == {None, *CopyState}


def test_a_running_turn_only_ends() -> None:
    assert TURN_MOVES[TurnState.RUNNING] == frozenset()
    assert TURN_MOVES.keys() == set(TurnState)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_a_multimap_is_a_dict_of_lists(steps: list[tuple[bool, int, int]]) -> None:
    multimap, model = Multimap(), dict[str, list[str]]()
    for is_added, number, other in steps:
        key, value = f"k{number}", f"v{other}"
        values = model.setdefault(key, [])
        if is_added:
            multimap.add(key, value)
            values += [value] if value not in values else []
        else:
            multimap.discard(key, value)
            values[:] = [known for known in values if known != value]
        model = {key: values for key, values in model.items() if values}
        assert {key: list(found) for key, found in multimap.items()} == model
        assert len(multimap) == len(model)
        assert (key in multimap) is (key in model)
        assert list(multimap.get(key, 1)) == model.get(key, [])[:1]
