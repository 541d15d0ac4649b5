"""The way of a turn: submitted, dispatched, started, finished; cancelled, tried again, and lost with its replica."""

from __future__ import annotations

from typing import Any

import pytest

from policies import messages as m
from policies.messages import Cause, SchedulerConfig, Tier
from tests.policies.driver import Driver, dispatched, only, the
from tests.policies.texts import text, turn_of

A, B, D = text(1, 10), text(2, 10), text(3, 10)


@pytest.fixture
def one() -> Driver:
    """One node, one replica with two slots and room for 40 tokens. A turn of 10 tokens with 4 new ones takes 14."""
    driver = Driver()
    driver.join()
    driver.replica(slots=2, tokens=40)
    return driver


def test_a_turn_is_dispatched_started_finished(one: Driver) -> None:
    commands = one.submit("a/1", A)
    assert commands == [
        m.Dispatch(
            turn_id="a/1",
            replica_id="r1",
            plan=m.RestorePlan(steps=(), recomputed=((Cause.NEVER_STORED, 10),)),
            attempt=1,
        )
    ]
    assert one.start("a/1") == []
    assert one.figures["turns_running"] == 1
    assert one.finish("a/1") == []
    assert one.figures["turns_running"] == 0
    assert one.stale() == 0


def test_turns_wait_for_a_replica() -> None:
    driver = Driver()
    assert driver.submit("a/1", A) == []
    assert driver.join() == []
    assert dispatched(driver.replica()) == ["a/1"]


def test_a_replica_without_a_store_takes_turns() -> None:
    driver = Driver()
    driver.replica()
    assert dispatched(driver.submit("a/1", A)) == ["a/1"]


def test_slots(one: Driver) -> None:
    assert dispatched(one.submit("a/1", A)) == ["a/1"]
    assert dispatched(one.submit("b/1", B)) == ["b/1"]
    assert one.submit("d/1", D, max_new_tokens=1) == []
    assert one.start("a/1") == []
    assert dispatched(one.finish("a/1")) == ["d/1"]


def test_token_room_counts_the_answer(one: Driver) -> None:
    one.submit("a/1", A, max_new_tokens=20)  # 30 of 40
    assert one.submit("b/1", B, max_new_tokens=1) == []
    assert dispatched(one.finish("a/1")) == ["b/1"]


def test_answer_reserve() -> None:
    driver = Driver(SchedulerConfig(answer_reserve=0.0))
    driver.replica(tokens=20)
    driver.submit("a/1", A, max_new_tokens=20)
    assert dispatched(driver.submit("b/1", B, max_new_tokens=20)) == ["b/1"]


def test_a_turn_bigger_than_every_replica_runs_alone() -> None:
    one = Driver(SchedulerConfig(serving_order="policies.serving_order:Fcfs"))
    one.replica(tokens=40, slots=2)
    one.submit("a/1", A)
    assert one.submit("big/1", text(9, 60)) == []
    assert one.submit("b/1", B) == [], "those behind the big one wait, so that it gets its room"
    assert dispatched(one.finish("a/1")) == ["big/1"]
    assert dispatched(one.finish("big/1")) == ["b/1"]


def test_a_big_turn_goes_to_the_replica_that_can_hold_it() -> None:
    driver = Driver()
    driver.replica("r1", tokens=20)
    driver.replica("r2", tokens=100)
    assert the(driver.submit("big/1", text(9, 60)), m.Dispatch).replica_id == "r2"


def test_priority_then_arrival() -> None:
    driver = Driver()
    for turn_id, priority in (("late", 5), ("first", 1), ("second", 1), ("urgent", 0)):
        driver.submit(turn_id, A, priority=priority)
    order = dispatched(driver.replica(slots=1))
    for _ in range(3):
        order += dispatched(driver.finish(order[-1]))
    assert order == ["urgent", "first", "second", "late"]


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancel_while_waiting() -> None:
    driver = Driver()
    driver.submit("a/1", A)
    assert driver.feed(m.TurnCancelled("a/1")) == []
    assert driver.replica() == []
    assert driver.figures["turns_waiting"] == 0


@pytest.mark.parametrize("has_started", [False, True])
def test_cancel_on_a_replica_keeps_the_slot_until_it_is_free(one: Driver, has_started: bool) -> None:
    one.store(A)
    one.submit("a/1", A)
    one.submit("b/1", B)
    one.submit("d/1", D)
    if has_started:
        one.start("a/1")
    assert one.feed(m.TurnCancelled("a/1")) == [m.Cancel(turn_id="a/1", replica_id="r1", attempt=1)]
    assert one.figures["leases"] == 0
    assert dispatched(one.finish("a/1")) == ["d/1"]


def test_cancel_while_chunks_are_fetched() -> None:
    driver = Driver()
    driver.join("n1")
    driver.join("n2")
    driver.replica("r2", "n2")
    driver.store(A, node_id="n2", replica_id="r2")
    driver.feed(m.ReplicaLost("r2"))
    driver.replica("r1", "n1")
    fetches = only(driver.submit("a/1", A), m.Fetch)
    assert len(fetches) == 3
    assert driver.feed(m.TurnCancelled("a/1")) == []
    assert driver.obey(fetches) == fetches, "nobody waits for them any more"
    assert driver.wait(60.0) == [], "its deadline means nothing any more"


def test_a_cancel_that_is_not_answered_frees_the_slot_in_time(one: Driver) -> None:
    one.submit("a/1", A)
    one.submit("b/1", B)
    one.submit("d/1", D)
    one.feed(m.TurnCancelled("a/1"))
    assert one.wait(29.0) == []
    assert dispatched(one.wait(1.0)) == ["d/1"]
    assert one.figures["counters"]["overdue.cancel"] == 1


def test_cancelling_the_unknown_is_harmless(one: Driver) -> None:
    assert one.feed(m.TurnCancelled("nobody")) == []
    assert one.stale() == 1


# --- the same turn again ----------------------------------------------------------------------------------------------


def test_again_while_waiting_goes_to_the_end() -> None:
    driver = Driver()
    driver.submit("a/1", A)
    driver.submit("b/1", B)
    driver.submit("a/1", A)
    assert dispatched(driver.replica()) == ["b/1", "a/1"]


def test_again_after_it_was_preempted(one: Driver) -> None:
    one.submit("a/1", A)
    one.start("a/1")
    one.finish("a/1")
    assert dispatched(one.submit("a/1", (*A, 7, 8))) == ["a/1"]


def test_again_while_it_runs_waits_for_its_own_end(one: Driver) -> None:
    one.submit("a/1", A)
    assert one.submit("a/1", A) == [m.Cancel(turn_id="a/1", replica_id="r1", attempt=1)]
    assert dispatched(one.finish("a/1")) == ["a/1"]


def test_those_behind_do_not_wait_for_the_end_of_its_earlier_attempt(one: Driver) -> None:
    one.submit("a/1", A)
    one.submit("a/1", A)
    assert dispatched(one.submit("b/1", B)) == ["b/1"]
    assert one.submit("d/1", D) == []
    assert dispatched(one.finish("a/1")) == ["a/1"], "which kept its place"


def test_again_while_it_runs_goes_elsewhere_at_once(one: Driver) -> None:
    one.submit("a/1", A)
    one.replica("r2")
    commands = one.submit("a/1", A)
    assert commands[0] == m.Cancel(turn_id="a/1", replica_id="r1", attempt=1)
    assert the(commands, m.Dispatch).replica_id == "r2"
    one.finish("a/1", "r1")
    assert one.figures["turns_running"] == 1, "the end of the first attempt is not the end of the second"


def test_a_late_word_on_an_earlier_attempt_changes_nothing(one: Driver) -> None:
    one.store(A)
    one.submit("a/1", A)
    one.feed(m.TurnCancelled("a/1"))
    one.feed(m.TurnFinished(turn_id="a/1", replica_id="r1", attempt=1))  # it ended by itself
    one.submit("a/1", A)
    assert one.figures["leases"] == 1
    one.feed(m.TurnStarted(turn_id="a/1", replica_id="r1", attempt=1))
    one.feed(m.TurnFinished(turn_id="a/1", replica_id="r1", attempt=1))  # the answer to the Cancel
    assert one.figures["turns_running"] == 1
    assert one.figures["leases"] == 1
    one.feed(m.TurnStarted(turn_id="a/1", replica_id="r1", attempt=2))
    one.feed(m.TurnFinished(turn_id="a/1", replica_id="r1", attempt=2))
    assert one.figures["turns_running"] == 0


def test_the_deadline_of_an_earlier_cancel_does_not_free_a_later_ones_slot() -> None:
    driver = Driver()
    driver.replica(slots=1)
    driver.submit("a/1", A)
    driver.feed(m.TurnCancelled("a/1"))
    driver.finish("a/1")
    driver.wait(20.0)
    driver.submit("a/1", A)
    driver.feed(m.TurnCancelled("a/1"))
    driver.submit("b/1", B)
    assert driver.wait(15.0) == [], "35 s after the first cancel, 15 s after the second"
    assert dispatched(driver.wait(15.0)) == ["b/1"]


# --- dispatches that fail ---------------------------------------------------------------------------------------------


def test_a_failed_dispatch_waits_where_it_stood(one: Driver) -> None:
    dispatch = the(one.submit("a/1", A), m.Dispatch)
    one.submit("b/1", B)
    one.submit("d/1", D)
    assert one.feed(m.CommandFailed(command=dispatch, reason="busy")) == []
    assert one.figures["turns_waiting"] == 2
    assert dispatched(one.wait(4.9)) == [], "the replica is left alone for a moment"
    assert dispatched(one.wait(0.2)) == ["a/1"], "before d/1, which came later"


def test_a_failed_dispatch_goes_to_another_replica(one: Driver) -> None:
    dispatch = the(one.submit("a/1", A), m.Dispatch)
    one.replica("r2")
    again = the(one.feed(m.CommandFailed(command=dispatch, reason="dead")), m.Dispatch)
    assert (again.turn_id, again.replica_id) == ("a/1", "r2")


def test_a_failed_dispatch_of_an_earlier_attempt_is_stale(one: Driver) -> None:
    dispatch = the(one.submit("a/1", A), m.Dispatch)
    one.submit("a/1", A)
    one.finish("a/1")
    assert one.feed(m.CommandFailed(command=dispatch, reason="late")) == []
    assert one.figures["turns_running"] == 1


# --- replicas come and go ---------------------------------------------------------------------------------------------


def test_replica_lost_takes_its_turns_along(one: Driver) -> None:
    one.store(A)
    one.submit("a/1", A)
    one.submit("b/1", B)
    one.start("b/1")
    assert one.feed(m.ReplicaLost("r1")) == []
    assert one.figures["turns_running"] == one.figures["turns_waiting"] == one.figures["leases"] == 0
    assert one.submit("a/1", A) == []
    assert dispatched(one.replica()) == ["a/1"]


def test_replica_ready_again_means_that_it_restarted(one: Driver) -> None:
    one.submit("a/1", A)
    one.submit("b/1", B)
    one.submit("d/1", D)
    assert dispatched(one.replica(slots=2)) == ["d/1"]
    assert one.feed(m.TurnFinished(turn_id="a/1", replica_id="r1")) == []
    assert one.figures["turns_running"] == 1


def test_a_restarted_replica_may_be_smaller(one: Driver) -> None:
    one.submit("a/1", A)
    one.replica(slots=1)
    assert dispatched(one.submit("b/1", B)) == ["b/1"]
    assert one.submit("d/1", D) == []


def test_lost_twice(one: Driver) -> None:
    one.feed(m.ReplicaLost("r1"))
    assert one.feed(m.ReplicaLost("r1")) == []
    assert one.stale() == 1


@pytest.mark.parametrize(
    "event",
    [
        m.TurnStarted(turn_id="x", replica_id="r1"),
        m.TurnFinished(turn_id="x", replica_id="r1"),
        m.TurnFinished(turn_id="a/1", replica_id="r9"),
        m.TurnStarted(turn_id="a/1", replica_id="r9"),
        m.NodeLost("n9"),
        m.ChunkFetched(node_id="n9", chunk="k"),
        m.ChunkDropped(node_id="n1", chunk="k", tier=Tier.SSD),
        m.ChunkLost(node_id="n1", chunk="k", tier=Tier.DRAM, cause=Cause.LOST),
        m.CommandFailed(command=m.Cancel(turn_id="x", replica_id="r1"), reason=""),
        m.CommandFailed(command=m.Decline(replica_id="r1", chunks=("k",)), reason=""),
        m.CommandFailed(command=m.Fetch(node_id="n1", chunk="k", source=Tier.SSD, source_node="n1"), reason=""),
        m.CommandFailed(command=m.Demote(node_id="n1", chunk="k", tier=Tier.SSD), reason=""),
        m.CommandFailed(command=m.Drop(node_id="n1", chunk="k", tier=Tier.SSD), reason=""),
        m.CommandFailed(command=m.Dispatch(turn_id="x", replica_id="r1", plan=m.RestorePlan()), reason=""),
    ],
    ids=lambda event: type(event).__name__ + (f"({type(event.command).__name__})" if hasattr(event, "command") else ""),
)
def test_events_out_of_the_blue_change_nothing(one: Driver, event: m.Event) -> None:
    one.submit("a/1", A)
    before = {name: value for name, value in one.figures.items() if name != "counters"}
    assert one.feed(event) == []
    assert {name: value for name, value in one.figures.items() if name != "counters"} == before


def test_a_turn_without_reuse_is_neither_looked_up_nor_prefetched(one: Driver) -> None:
    one.store(A)
    plan = the(one.submit("a/1", A, reuse=False), m.Dispatch).plan
    assert plan == m.RestorePlan(steps=(), recomputed=((Cause.REUSE_OFF, 10),))


def test_time_never_runs_backwards(one: Driver) -> None:
    one.now = 100.0
    one.feed(m.Tick())
    one.now = 50.0
    one.feed(m.TurnSubmitted(turn_of("a/1", A)))
    assert one.scheduler.board.now == 100.0


# --- locality ---------------------------------------------------------------------------------------------------------


def two_nodes(**config: Any) -> Driver:
    """A's chunks lie on n1, B's on n2; one slot each, both taken."""
    driver = Driver(SchedulerConfig(serving_order="policies.serving_order:Fcfs", **config))
    for number in (1, 2):
        driver.join(f"n{number}")
        driver.replica(f"r{number}", f"n{number}", slots=1)
    for number, tokens in ((1, A), (2, B)):
        driver.store(tokens, node_id=f"n{number}", replica_id=f"r{number}")
    assert dispatched(driver.submit("x/1", text(8, 4)) + driver.submit("y/1", text(9, 4))) == ["x/1", "y/1"]
    return driver


def finish_on(driver: Driver, replica_id: str) -> list[m.Command]:
    [turn_id] = driver.scheduler.board.fleet.replicas[replica_id].running
    return driver.finish(turn_id, replica_id)


def is_brought_to_n2(heard: list[m.Command]) -> bool:
    """Whether a's chunks go where the slot is: it was the first to be thought of."""
    return {(fetch.node_id, fetch.source_node) for fetch in only(heard, m.Fetch)} == {("n2", "n1")}


def test_a_turn_goes_first_where_its_chunks_are() -> None:
    driver = two_nodes()
    driver.submit("a/2", text(3, 4, after=A))
    driver.submit("b/2", text(4, 4, after=B))
    heard = finish_on(driver, "r2")
    assert not only(heard, m.Fetch)
    [dispatch] = only(heard, m.Dispatch)
    assert (dispatch.turn_id, dispatch.replica_id) == ("b/2", "r2")
    [dispatch] = only(finish_on(driver, "r1"), m.Dispatch)
    assert (dispatch.turn_id, dispatch.replica_id) == ("a/2", "r1")


def test_new_text_is_at_home_everywhere() -> None:
    driver = two_nodes()
    driver.submit("a/2", text(3, 4, after=A))
    driver.submit("new/1", text(5, 8))
    assert dispatched(finish_on(driver, "r2")) == ["new/1"]


def test_who_came_much_later_does_not_go_before() -> None:
    driver = two_nodes(locality_s=5.0)
    driver.submit("a/2", text(3, 4, after=A))
    driver.wait(6.0)
    driver.submit("b/2", text(4, 4, after=B))
    assert is_brought_to_n2(finish_on(driver, "r2"))


def test_a_more_urgent_turn_is_not_passed_over() -> None:
    driver = two_nodes()
    driver.submit("a/2", text(3, 4, after=A), priority=-1)
    driver.submit("b/2", text(4, 4, after=B))
    assert is_brought_to_n2(finish_on(driver, "r2"))


def test_no_slot_idles_for_the_sake_of_locality() -> None:
    driver = two_nodes()
    driver.submit("a/2", text(3, 4, after=A))
    assert is_brought_to_n2(finish_on(driver, "r2"))


def where(commands: list[m.Command]) -> list[str]:
    return [command.replica_id for command in commands if isinstance(command, m.Dispatch)]


@pytest.mark.parametrize("names", [{"session_id": "same"}, {"affinity": "same"}])
def test_turns_of_a_session_or_a_hint_stay_together_on_replicas_that_are_equal(names: dict[str, str]) -> None:
    driver = Driver()
    driver.join()
    for replica_id in ("r1", "r2", "r3"):
        driver.replica(replica_id, slots=8)
    assert where(driver.submit("other/1", text(9, 5))) == ["r1"]
    assert where(driver.submit("a/1", text(1, 4), **names)) == ["r2"]
    driver.start("other/1", "r1")
    driver.start("a/1", "r2")
    assert where(driver.submit("b/1", text(2, 4), **names)) == ["r2"], "r3 is idle, but the others went here"
    driver.start("b/1", "r2")
    assert where(driver.submit("c/1", text(3, 4), **names)) == ["r2"]
    driver.start("c/1", "r2")
    assert where(driver.submit("d/1", text(4, 4), **names)) == ["r3"], "too much for one"
    driver.feed(m.ReplicaLost("r3"))
    assert where(driver.submit("e/1", text(5, 4), **names)) == ["r1"], "what is gone attracts nobody"


def test_a_hint_reaches_a_replica_that_is_not_among_the_least_loaded() -> None:
    driver = Driver()
    for number in range(20):
        driver.replica(f"r{number:02}", f"n{number}", slots=8)
    assert where(driver.submit("a/1", text(1, 4), affinity="same")) == ["r00"]
    driver.start("a/1", "r00")
    assert where(driver.submit("b/1", text(2, 4), affinity="same")) == ["r00"]


def test_turns_at_home_on_a_lost_node_find_another() -> None:
    driver = two_nodes()
    driver.submit("a/2", text(3, 4, after=A))
    driver.submit("b/2", text(4, 4, after=B))
    driver.feed(m.NodeLost(node_id="n2"))
    assert dispatched(finish_on(driver, "r1")) == ["a/2"]
