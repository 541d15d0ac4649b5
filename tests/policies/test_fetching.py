"""The way up: fetching for a turn at the head of the queue, and ahead of need."""

from __future__ import annotations

import pytest

from policies import messages as m
from policies.dispatching import MAX_ASIDE
from policies.messages import SchedulerConfig, Tier
from policies.places import SHARED
from tests.policies.driver import Driver, answer, only, the
from tests.policies.texts import Tokens, chunks_of, key_of, text

A, B, D = text(1, 8), text(2, 8), text(3, 8)


def on(tier: Tier, *texts: Tokens) -> list[tuple[m.ChunkInfo, Tier]]:
    return [(info, tier) for tokens in texts for info in chunks_of(tokens)]


def fetched(commands: list[m.Command]) -> list[str]:
    return [command.chunk for command in only(commands, m.Fetch)]


def keys(tokens: Tokens) -> list[str]:
    return [info.key for info in chunks_of(tokens)]


# --- on demand --------------------------------------------------------------------------------------------------------


def two_nodes(**config: object) -> Driver:
    """A's chunks lie in DRAM of n2; the only replica is on n1."""
    driver = Driver(SchedulerConfig(**config))  # type: ignore[arg-type]
    driver.join("n1", dram=200)
    driver.join("n2", inventory=on(Tier.DRAM, A))
    driver.replica()
    return driver


def test_chunks_of_another_node_are_fetched_before_the_turn_runs() -> None:
    driver = two_nodes()
    commands = driver.submit("a/1", A)
    assert commands == [m.Fetch(node_id="n1", chunk=key, source=Tier.DRAM, source_node="n2") for key in keys(A)]
    assert driver.feed(answer(commands[0])) == []
    plan = the(driver.feed(answer(commands[1])), m.Dispatch).plan
    assert [(step.node_id, step.tier) for step in plan.steps] == [("n1", Tier.DRAM)] * 2


def test_ssd_of_the_own_node_is_read_directly() -> None:
    driver = Driver(SchedulerConfig(prefetch="policies.prefetch:Off"))
    driver.join("n1", ssd=1000, inventory=on(Tier.SSD, A))
    driver.replica()
    plan = the(driver.submit("a/1", A), m.Dispatch).plan
    assert [(step.node_id, step.tier) for step in plan.steps] == [("n1", Tier.SSD)] * 2


def test_the_bucket_is_read_directly_by_every_node_that_has_it() -> None:
    driver = Driver(SchedulerConfig(prefetch="policies.prefetch:Off"))
    driver.join("n1", bucket=1000, inventory=on(Tier.OBJECT, A))
    driver.join("n2", bucket=1000)
    driver.replica("r2", "n2")
    plan = the(driver.submit("a/1", A), m.Dispatch).plan
    assert [(step.node_id, step.tier) for step in plan.steps] == [(SHARED, Tier.OBJECT)] * 2


def test_the_bucket_is_out_of_reach_for_a_node_without_it() -> None:
    driver = Driver()
    driver.join("n1", bucket=1000, inventory=on(Tier.OBJECT, A))
    driver.join("n2")
    driver.replica("r2", "n2")
    plan = the(driver.submit("a/1", A), m.Dispatch).plan
    assert plan.recomputed == ((m.Cause.LATE, 8),)


def test_a_fetch_that_fails_is_not_waited_for() -> None:
    driver = two_nodes()
    first, second = driver.submit("a/1", A)
    dispatch = the(driver.feed(m.CommandFailed(command=first, reason="timeout")), m.Dispatch)
    assert dispatch.plan.recomputed == ((m.Cause.LATE, 8),)
    assert driver.feed(answer(second)) == []


def test_a_failed_fetch_is_tried_again_after_a_while() -> None:
    driver = two_nodes()
    first, second = driver.submit("a/1", A)
    driver.feed(m.CommandFailed(command=first, reason="timeout"), answer(second))
    driver.finish("a/1")
    assert fetched(driver.submit("a/2", A)) == []
    driver.finish("a/2")
    driver.wait(5.0)
    assert fetched(driver.submit("a/3", A)) == [keys(A)[0]]


def test_a_fetch_without_an_answer_fails_in_time() -> None:
    driver = two_nodes(restore_deadline_s=100.0)
    driver.submit("a/1", A)
    assert driver.wait(29.0) == []
    assert the(driver.wait(1.0), m.Dispatch).plan.num_reused == 0
    assert driver.figures["tiers"]["n1/dram"]["reserved_bytes"] == 0


def test_a_late_turn_uses_what_has_come() -> None:
    driver = two_nodes()
    first, second = driver.submit("a/1", A)
    driver.feed(answer(first))
    plan = the(driver.wait(10.0), m.Dispatch).plan
    assert (plan.num_reused, plan.recomputed) == (4, ((m.Cause.LATE, 4),))
    assert driver.feed(answer(second)) == []
    assert driver.stored() == set(keys(A)), "it is there for the next turn"


def test_a_source_that_is_lost_is_told() -> None:
    driver = two_nodes()
    first, second = driver.submit("a/1", A)
    driver.feed(answer(second))
    commands = driver.feed(
        m.ChunkLost(node_id="n2", chunk=keys(A)[0], tier=Tier.DRAM, cause=m.Cause.CORRUPT),
        m.CommandFailed(command=first, reason="corrupt"),
    )
    assert the(commands, m.Drop).chunk == keys(A)[0]
    assert the(commands, m.Dispatch).plan.recomputed == ((m.Cause.CORRUPT, 8),)


def test_the_node_of_the_source_is_lost() -> None:
    driver = two_nodes()
    first, second = driver.submit("a/1", A)
    assert driver.feed(m.NodeLost("n2")) == []
    commands = driver.feed(*(m.CommandFailed(command=fetch, reason="dead") for fetch in (second, first)))
    assert the(commands, m.Dispatch).plan.recomputed == ((m.Cause.LOST, 8),)


def test_the_node_that_fetches_is_lost() -> None:
    driver = two_nodes()
    fetches = driver.submit("a/1", A)
    commands = driver.feed(m.NodeLost("n1"))
    assert the(commands, m.Dispatch).plan.num_reused == 0, "its replica may still run it"
    assert driver.feed(*(answer(fetch) for fetch in fetches)) == []


def test_a_fetch_makes_room_for_itself() -> None:
    driver = Driver(SchedulerConfig(high_watermark=1.0))
    driver.join("n1", dram=80, inventory=on(Tier.DRAM, B))
    driver.join("n2", inventory=on(Tier.DRAM, A))
    driver.replica()
    drops = only(driver.submit("a/1", A), m.Drop)
    heard = driver.obey(drops)
    assert sorted(fetched(heard)) == sorted(keys(A))
    assert the(heard, m.Dispatch).plan.num_reused == 7


def test_a_fetch_does_not_push_out_what_is_needed_sooner() -> None:
    driver = Driver(SchedulerConfig(high_watermark=1.0))
    driver.join("n1", dram=80, inventory=on(Tier.DRAM, B))
    driver.join("n2", inventory=on(Tier.DRAM, A))
    driver.replica(slots=1)
    driver.submit("x/1", D, reuse=False)
    driver.submit("b/1", B)
    assert driver.submit("a/1", A) == []
    assert the(driver.finish("x/1"), m.Dispatch).turn_id == "b/1"


def test_more_than_dram_can_ever_hold_is_not_waited_for() -> None:
    driver = Driver()
    driver.join("n1", dram=30)
    driver.join("n2", inventory=on(Tier.DRAM, A))
    driver.replica()
    assert the(driver.submit("a/1", A), m.Dispatch).plan.recomputed == ((m.Cause.LATE, 8),)


def test_no_more_fetches_at_a_time_than_allowed() -> None:
    driver = two_nodes(max_fetches_in_flight=1)
    (first,) = driver.submit("a/1", A)
    (second,) = driver.feed(answer(first))
    assert fetched([first, second]) == keys(A)
    assert isinstance(the(driver.feed(answer(second)), m.Dispatch), m.Dispatch)


def test_fetched_twice_and_out_of_the_blue() -> None:
    driver = two_nodes()
    fetches = driver.submit("a/1", A)
    driver.obey(fetches)
    assert driver.feed(answer(fetches[0])) == []
    used = driver.figures["tiers"]["n1/dram"]["used_bytes"]
    assert used == 80


# --- ahead of need ----------------------------------------------------------------------------------------------------


def busy(*, dram: int = 1000, **config: object) -> Driver:
    """A, B and D lie on the SSD; the only slot is taken."""
    driver = Driver(SchedulerConfig(**config))  # type: ignore[arg-type]
    driver.join("n1", dram=dram, ssd=1000, inventory=on(Tier.SSD, A, B, D))
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    return driver


def test_chunks_of_waiting_turns_are_raised() -> None:
    driver = busy()
    commands = driver.submit("a/1", A)
    assert commands == [m.Fetch(node_id="n1", chunk=key, source=Tier.SSD, source_node="n1") for key in keys(A)]
    driver.obey(commands)
    plan = the(driver.finish("x/1"), m.Dispatch).plan
    assert [step.tier for step in plan.steps] == [Tier.DRAM] * 2


def test_nearest_need_first() -> None:
    driver = busy(max_fetches_in_flight=1)
    heard = driver.submit("b/1", B)
    assert driver.submit("a/1", A, priority=-1) == []
    assert driver.submit("d/1", D, priority=5) == []
    heard = driver.obey(heard)
    assert fetched(heard) == [keys(B)[0], *keys(A), keys(B)[1], *keys(D)]


def test_only_inside_the_window() -> None:
    """DRAM of 110 bytes holds one session of 80."""
    driver = busy(dram=110)
    assert fetched(driver.submit("a/1", A)) == keys(A)
    assert driver.submit("b/1", B) == []
    heard = driver.obey(driver.finish("x/1"))
    assert only(heard, m.Dispatch)[0].turn_id == "a/1"


def test_fetches_in_flight_are_limited() -> None:
    driver = busy(max_fetches_in_flight=3)
    in_flight = [*driver.submit("a/1", A), *driver.submit("b/1", B), *driver.submit("d/1", D)]
    assert len(in_flight) == 3
    assert len(driver.feed(answer(in_flight[0]))) == 1


def test_nothing_is_pushed_out_that_is_needed_sooner() -> None:
    driver = busy(dram=110)
    driver.obey(driver.submit("a/1", A))
    assert driver.stored() == set(keys(A))
    assert driver.submit("b/1", B) == []
    driver.obey(driver.submit("d/1", D, priority=-1))
    assert driver.stored() & set(keys(D)), "it goes before a/1, whose chunks make room"


def test_prefetching_leaves_room_for_new_chunks() -> None:
    """It fills to the low watermark; new chunks fill the rest, and most of what goes when it is full are they."""
    driver = Driver(SchedulerConfig(low_watermark=0.6, high_watermark=0.9))
    texts = [text(name, 8) for name in range(10, 15)]
    driver.join("n1", dram=400, ssd=10_000, inventory=on(Tier.SSD, *texts))
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    for number, tokens in enumerate(texts):
        driver.obey(driver.submit(f"t{number}/1", tokens))
    assert driver.stored() == {key for tokens in texts[:3] for key in keys(tokens)}, "240 of 400 bytes"
    heard = [driver.obey(driver.offer(chunks_of(text(name, 4)))) for name in range(20, 40)]
    assert sum(len(fetched(commands)) for commands in heard) <= 6, "at most one for each eviction"


# --- who gets bytes that become free ----------------------------------------------------------------------------------

BIG, SMALL = text(1, 4), text(2, 1)


def crowded() -> tuple[Driver, list[m.Drop]]:
    """DRAM of n1 is full: 60 bytes are leased, two chunks of 20 are being dropped for BIG.

    SMALL would fit as soon as one of them is gone. Both lie on n2.
    """
    driver = Driver(SchedulerConfig(high_watermark=1.0, low_watermark=1.0, prefetch="policies.prefetch:Off"))
    leased, idle = text(5, 6), [text(6, 2), text(7, 2)]
    driver.join("n1", dram=100, inventory=on(Tier.DRAM, leased, *idle))
    driver.join("n2", inventory=on(Tier.DRAM, BIG, SMALL))
    driver.replica(slots=4)
    driver.submit("l/1", leased)
    drops = only(driver.submit("big/1", BIG), m.Drop)
    assert len(drops) == 2
    return driver, drops


def test_bytes_freed_for_a_big_chunk_are_not_taken_by_a_small_one() -> None:
    """Or room would have to be made for the big one again, and the small one fetched again, and so on."""
    driver, drops = crowded()
    assert driver.submit("small/1", (*SMALL, 1), cuts=[1]) == []
    assert driver.feed(answer(drops[0])) == []
    assert fetched(driver.feed(answer(drops[1]))) == keys(BIG)


def test_bytes_that_are_not_claimed_any_more_are_for_the_next() -> None:
    driver, drops = crowded()
    driver.submit("small/1", (*SMALL, 1), cuts=[1])
    driver.feed(answer(drops[0]))
    assert fetched(driver.feed(m.TurnCancelled("big/1"))) == keys(SMALL)


def test_bytes_that_an_offer_gave_up_are_for_the_next() -> None:
    driver, drops = crowded()
    driver.feed(m.TurnCancelled("big/1"))
    driver.offer(chunks_of(text(8, 4)))
    driver.submit("small/1", (*SMALL, 1), cuts=[1])
    driver.feed(answer(drops[0]))
    commands = driver.wait(5.0)
    assert len(only(commands, m.Decline)) == 1
    assert fetched(commands) == keys(SMALL)


def test_bytes_freed_for_an_offer_are_not_taken_by_a_fetch() -> None:
    driver, drops = crowded()
    driver.feed(m.TurnCancelled("big/1"))
    assert driver.offer(chunks_of(text(8, 4))) == []
    assert driver.submit("small/1", (*SMALL, 1), cuts=[1]) == []
    assert driver.feed(answer(drops[0])) == []
    assert the(driver.feed(answer(drops[1])), m.Save).chunks == chunks_of(text(8, 4))


def test_a_replaced_tail_is_not_raised_again() -> None:
    """Its copy in the bucket is still leased; the longer one serves all who need it, and what is raised is dropped."""
    driver = Driver(SchedulerConfig(write_through=False))
    short, long = text(1, 6), text(1, 8)
    driver.join(bucket=1000, inventory=on(Tier.OBJECT, short))
    driver.replica(slots=1)
    driver.submit("a/1", text(1, 7), cuts=[6])
    driver.obey(driver.offer(chunks_of(long, 4, cuts=[6])))
    assert fetched(driver.submit("b/1", text(2, 7, after=short), cuts=[6])) == keys(short)[:1]


def test_many_turns_that_wait_for_chunks_keep_the_rest_waiting() -> None:
    """However many wait: no event looks at all of them."""
    driver = Driver()
    driver.join("n1", dram=100_000)
    texts = [text(100 + number, 4) for number in range(100)]
    driver.join("n2", dram=100_000, inventory=on(Tier.DRAM, *texts))
    for number, tokens in enumerate(texts):
        driver.submit(f"t{number}/1", tokens)
    fetches = only(driver.replica(slots=200), m.Fetch)
    assert len(fetches) == 8
    assert len(driver.scheduler.board.awaiting) == MAX_ASIDE
    heard = driver.obey(fetches)
    assert [dispatch.plan.num_reused for dispatch in only(heard, m.Dispatch)] == [3] * 100


def test_prefetching_can_be_turned_off() -> None:
    driver = busy(prefetch="policies.prefetch:Off")
    assert driver.submit("a/1", A) == []


def test_prefetching_goes_to_where_the_turn_will_probably_run() -> None:
    driver = Driver()
    driver.join("n1")
    driver.join("n2", ssd=1000, inventory=on(Tier.SSD, A))
    driver.replica("r1", "n1", slots=1)
    driver.replica("r2", "n2", slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    driver.submit("x/2", text(9, 4), reuse=False)
    assert {fetch.node_id for fetch in only(driver.submit("a/1", A), m.Fetch)} == {"n2"}


def test_a_prefetch_that_failed_is_tried_again_and_does_not_hold_up_others() -> None:
    driver = busy()
    first, second = driver.submit("a/1", A)
    driver.feed(m.CommandFailed(command=first, reason="disk"), answer(second))
    assert fetched(driver.submit("b/1", B)) == keys(B)
    assert driver.wait(4.9) == []
    assert fetched(driver.wait(0.2)) == [keys(A)[0]]


def test_many_turns_whose_fetches_are_under_way_do_not_hold_up_the_next() -> None:
    driver = Driver()
    names = range(10, 20)
    driver.join("n1", dram=1000, ssd=1000, inventory=on(Tier.SSD, *(text(name, 4) for name in names)))
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    commands = [command for name in names for command in driver.submit(f"{name}/1", text(name, 4))]
    assert len(fetched(commands)) == 8, "as many as may be in flight"


def test_what_left_dram_is_raised_again_for_the_next_who_needs_it() -> None:
    driver = busy()
    driver.obey(driver.submit("a/1", A))
    driver.submit("a/2", A)
    driver.submit("b/1", B)
    driver.feed(m.TurnCancelled("a/1"))
    lost = m.ChunkLost(node_id="n1", chunk=keys(A)[1], tier=Tier.DRAM, cause=m.Cause.LOST)
    assert fetched(driver.obey(driver.feed(lost))) == [keys(A)[1]]


def test_what_a_cancelled_turn_left_to_be_fetched_is_fetched_for_the_next_who_needs_it() -> None:
    driver = busy(max_fetches_in_flight=1)
    driver.obey(driver.submit("a/1", A))
    driver.submit("a/2", A)
    first = the(driver.submit("b/1", B, priority=-1), m.Fetch)
    lost = m.ChunkLost(node_id="n1", chunk=keys(A)[1], tier=Tier.DRAM, cause=m.Cause.LOST)
    assert fetched(driver.obey(driver.feed(lost))) == [], "no slot"
    driver.feed(m.TurnCancelled("a/1"))
    assert fetched(driver.obey([first])) == [keys(B)[0], keys(B)[1], keys(A)[1]]


def test_chunks_follow_when_the_fleet_changes() -> None:
    driver = Driver()
    driver.join("n1")
    driver.join("n2", inventory=on(Tier.DRAM, A))
    for number in (1, 2):
        driver.replica(f"r{number}", f"n{number}", slots=1)
        driver.submit(f"x/{number}", text(9, 4), reuse=False)
    assert driver.submit("a/1", A) == [], "they are in DRAM where it will probably run"
    assert {fetch.node_id for fetch in only(driver.feed(m.ReplicaLost("r2")), m.Fetch)} == {"n1"}


@pytest.mark.parametrize("tier", [Tier.SSD, Tier.OBJECT])
def test_prefetching_from_each_lower_tier(tier: Tier) -> None:
    driver = Driver()
    driver.join("n1", ssd=1000, bucket=1000, inventory=on(tier, A))
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    fetches = only(driver.submit("a/1", A), m.Fetch)
    node = SHARED if tier is Tier.OBJECT else "n1"
    assert [(fetch.source, fetch.source_node) for fetch in fetches] == [(tier, node)] * 2


def test_turns_waiting_for_chunks_step_aside() -> None:
    driver = two_nodes()
    fetches = driver.submit("a/1", A)
    assert the(driver.submit("b/1", B), m.Dispatch).turn_id == "b/1"
    assert the(driver.obey(fetches), m.Dispatch).turn_id == "a/1"


def test_a_chunk_raised_and_dropped_by_one_event_is_looked_at_again() -> None:
    """An arrival leaves nothing to do, unless the very event that tells of it also takes the chunk out again."""
    driver = Driver()
    driver.join(dram=1000, ssd=1000)
    driver.replica()
    driver.store(A)
    board = driver.scheduler.board
    chunk = board.catalog.chunks[key_of(A)]
    [copy] = [copy for place, copy in chunk.copies.items() if place.tier is Tier.DRAM]
    board.raised_chunks.add(chunk.key)
    driver.scheduler.evictor.drop(chunk, copy, m.Cause.EVICTED)
    assert chunk.key in board.changed_chunks - board.raised_chunks
