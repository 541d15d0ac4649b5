"""Sessions that are expected, pinned, over or deleted; replicas that close; looking in."""

from __future__ import annotations

import pytest

from policies import messages as m
from policies.inspection import ChunkView, CopyView
from policies.messages import Cause, SchedulerConfig, Tier
from tests.policies.driver import Driver, answer, only, the
from tests.policies.texts import Tokens, chunks_of, key_of, marks_of, text, turn_of

SYSTEM = text(9, 4)
A, B, D, E, F = (text(name, 4) for name in (1, 2, 3, 4, 5))


def make(*, dram: int = 200, ssd: int = 0, slots: int = 1, **config: object) -> Driver:
    """DRAM holds five full chunks of 40 bytes; above four of them, eviction goes on until three are left."""
    settings = {
        "write_through": False,
        "high_watermark": 0.9,
        "low_watermark": 0.6,
        "prefetch": "policies.prefetch:Off",
        "eviction": "policies.eviction:LookAhead",
    }
    driver = Driver(SchedulerConfig(**{**settings, **config}))  # type: ignore[arg-type]
    driver.join(dram=dram, ssd=ssd)
    driver.replica(slots=slots)
    return driver


def fill(driver: Driver, *texts: Tokens) -> None:
    for tokens in texts:
        driver.now += 1.0
        driver.store(tokens, session=f"of {tokens[0]}")


def gone(commands: list[m.Command], tier: Tier = Tier.DRAM) -> list[str]:
    return [drop.chunk for drop in only(commands, m.Drop) if drop.tier is tier]


def names(*texts: Tokens) -> list[str]:
    return [key_of(tokens) for tokens in texts]


def expect(driver: Driver, tokens: Tokens, seconds: float = 60.0, session: str = "a") -> list[m.Command]:
    turn = turn_of("whatever", tokens, session_id=session)
    return driver.feed(m.SessionExpected(turn=turn, seconds=seconds))


def pin(driver: Driver, tokens: Tokens, seconds: float = 60.0, session: str = "a") -> list[m.Command]:
    return driver.feed(m.SessionPinned(session_id=session, prompt=marks_of(tokens), seconds=seconds))


def delete(driver: Driver, tokens: Tokens, session: str = "a", after: int = 0) -> list[m.Command]:
    marks = tuple(mark for mark in marks_of(tokens) if mark.end > after)
    return driver.feed(m.SessionDeleted(session_id=session, prompt=marks, seconds=60.0))


def press(driver: Driver) -> list[str]:
    """A fifth chunk comes: what leaves for it."""
    driver.now += 1.0
    return gone(driver.obey(driver.offer(chunks_of(F))))


# --- expected ---------------------------------------------------------------------------------------------------------


def test_chunks_of_an_expected_session_go_last() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    expect(driver, A)
    assert driver.figures["sessions_expected"] == 1
    assert press(driver) == names(B, D), "A is the oldest, and would have gone first"


def test_real_turns_come_before_expected_ones() -> None:
    driver = make(ssd=1000)
    driver.submit("x/1", text(90, 4), reuse=False)  # the only slot is taken: turns wait
    fill(driver, A, B, D, E)
    expect(driver, B, session="b")
    for turn_id, tokens in (("a/1", A), ("d/1", D), ("e/1", E)):
        driver.submit(turn_id, tokens, priority=7)
    assert press(driver) == names(B, E), "what is only expected goes first, then the tail of the queue"


def test_an_expected_session_is_no_waiting_turn() -> None:
    driver = make()
    driver.submit("x/1", text(90, 4))
    expect(driver, A)
    driver.submit("b/1", B)
    assert (driver.figures["turns_waiting"], driver.figures["turns_running"]) == (1, 1)
    assert driver.scheduler.num_waiting == 1
    assert [view.turn_id for view in driver.scheduler.queue_view(10)] == ["b/1"]
    driver.finish("x/1")
    assert driver.finish("b/1") == [], "nothing else is dispatched"
    assert not only(driver.wait(1000.0), m.Dispatch)


def test_an_expected_session_ends_when_it_speaks_or_time_is_up() -> None:
    driver = make()
    expect(driver, A)
    driver.submit("b/1", B)
    assert driver.figures["sessions_expected"] == 1, "another session spoke"
    driver.submit("a/7", A)
    assert driver.figures["sessions_expected"] == 0
    expect(driver, A, seconds=10.0)
    driver.wait(9.0)
    assert driver.figures["sessions_expected"] == 1
    driver.wait(2.0)
    assert driver.figures["sessions_expected"] == 0


def test_expected_again_it_is_replaced() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    expect(driver, A, seconds=5.0)
    expect(driver, B, seconds=50.0)
    driver.wait(10.0)
    assert driver.figures["sessions_expected"] == 1, "the first one's time does not count any more"
    assert press(driver) == names(A, D)
    expect(driver, B, seconds=0.0)
    assert driver.figures["sessions_expected"] == 0


def test_chunks_of_an_expected_session_are_raised_after_those_of_turns() -> None:
    driver = make(dram=400, ssd=1000, prefetch="policies.prefetch:LookAhead", max_fetches_in_flight=1)
    stored = [(info, Tier.SSD) for tokens in (A, B) for info in chunks_of(tokens)]
    driver.feed(m.NodeLost("n1"))
    driver.join(dram=400, ssd=1000, inventory=stored)
    driver.submit("x/1", text(90, 4), reuse=False)
    commands = expect(driver, A)
    assert the(commands, m.Fetch).chunk == key_of(A), "nobody else needs the link"
    driver.submit("b/1", B)
    expect(driver, A)
    assert the(driver.feed(answer(the(commands, m.Fetch))), m.Fetch).chunk == key_of(B)  # type: ignore[arg-type]


def test_a_turn_may_have_the_name_of_an_expected_one() -> None:
    driver = make()
    expect(driver, A, session="a")
    driver.submit("expected/a", B, session_id="b")
    assert driver.figures["sessions_expected"] == 0
    expect(driver, A, session="a")
    assert driver.figures["sessions_expected"] == 0


def test_only_so_many_sessions_are_expected() -> None:
    driver = make(ghosts=3)
    for number in range(5):
        expect(driver, A, session=f"s{number}")
    assert list(driver.scheduler.administrator.expected) == ["s2", "s3", "s4"]


# --- pinned -----------------------------------------------------------------------------------------------------------


def test_pinned_chunks_stay_until_time_is_up() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    pin(driver, A, seconds=10.0)
    assert press(driver) == names(B, D)
    assert (driver.figures["sessions_pinned"], driver.figures["leases"]) == (1, 1)
    driver.wait(20.0)
    assert (driver.figures["sessions_pinned"], driver.figures["leases"]) == (0, 0)
    fill(driver, B)
    driver.now += 1.0
    assert gone(driver.obey(driver.offer(chunks_of(text(6, 4))))) == names(A, E)


def test_a_shared_prefix_is_pinned_and_deleted_under_a_name_of_its_own() -> None:
    """Nobody by that name ever spoke: the marks say what is meant."""
    driver = make()
    fill(driver, A, B, D, E)
    pin(driver, A, session="the system prompt")
    assert key_of(A) not in press(driver)
    driver.obey(delete(driver, A, session="the system prompt"))
    assert key_of(A) not in driver.stored()
    assert driver.figures["leases"] == 0


def test_a_pin_is_replaced_and_taken_away() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    pin(driver, A, seconds=10.0)
    pin(driver, B, seconds=100.0)
    driver.wait(50.0)
    assert driver.figures["sessions_pinned"] == 1
    assert press(driver) == names(A, D)
    pin(driver, B, seconds=0.0)
    assert driver.figures["leases"] == 0


def test_a_pin_holds_the_lowest_copy_and_moves_down_when_there_is_a_lower_one() -> None:
    driver = make(ssd=1000, write_through=True)
    save = the(driver.offer(chunks_of(A)), m.Save)
    pin(driver, A)
    assert driver.figures["leases"] == 0, "what is on its way is not covered"
    demote = the(driver.feed(answer(save)), m.Demote)  # type: ignore[arg-type]
    pin(driver, A)
    assert holder_tiers(driver, A) == [Tier.DRAM]
    driver.obey([demote])
    assert holder_tiers(driver, A) == [Tier.SSD]
    fill(driver, B, D, E)
    assert key_of(A) in press(driver), "the copy in DRAM may go"
    assert driver.stored(Tier.SSD) >= {key_of(A)}


def holder_tiers(driver: Driver, tokens: Tokens) -> list[Tier]:
    chunk = driver.scheduler.board.catalog.chunks[key_of(tokens)]
    return [place.tier for place, copy in chunk.copies.items() if copy.holders]


def test_a_pin_covers_each_token_once() -> None:
    """Of a tail and the longer chunk that holds its marks too, the longer one is kept."""
    driver = make(dram=1000)
    short, long = text(1, 6), text(1, 8)
    driver.store(short)
    driver.obey(driver.offer(chunks_of(long, 4, cuts=[6])))
    pin(driver, long)
    lease = driver.scheduler.board.catalog.leases.by_owner["pin/a"]
    assert [chunk.key for chunk in lease.held.values()] == names(long[:4], long)


def test_a_lost_copy_is_not_pinned_any_more() -> None:
    driver = make()
    fill(driver, A)
    pin(driver, A)
    driver.feed(m.ChunkLost(node_id="n1", chunk=key_of(A), tier=Tier.DRAM, cause=Cause.CORRUPT))
    assert driver.figures["leases"] == 0
    driver.wait(100.0)
    assert driver.figures["sessions_pinned"] == 0


# --- over -------------------------------------------------------------------------------------------------------------


def test_chunks_of_an_expired_session_go_first_those_that_others_used_do_not() -> None:
    driver = make()
    for number, tokens in enumerate((A, B, D, E)):
        driver.submit(f"s{number}/1", tokens)
        driver.finish(f"s{number}/1")
        driver.now += 1.0
        driver.store(tokens, session=f"s{number}")
    driver.submit("other/1", D)
    driver.finish("other/1")
    driver.feed(m.SessionExpired(session_id="s3", prompt=marks_of(E)))
    driver.feed(m.SessionExpired(session_id="s2", prompt=marks_of(D)))
    driver.feed(m.SessionExpired(session_id="nobody", prompt=marks_of(B)))
    assert press(driver) == names(E, A)


def test_what_was_stored_before_the_scheduler_began_expires_too() -> None:
    driver = make()
    driver.feed(m.NodeLost("n1"))
    stored = [(info, Tier.DRAM) for tokens in (A, B, D, E) for info in chunks_of(tokens)]
    driver.join(dram=200, inventory=stored)
    driver.feed(m.SessionExpired(session_id="unheard of", prompt=marks_of(D)))
    assert press(driver)[0] == key_of(D)


# --- deleted ----------------------------------------------------------------------------------------------------------


def test_deleted_chunks_leave_every_tier_with_what_goes_on_from_them() -> None:
    driver = make(dram=1000, ssd=1000, write_through=True)
    mine, fork = text(1, 12, SYSTEM), text(2, 16, text(1, 8, SYSTEM))
    driver.store(mine)
    driver.store(fork)
    driver.store(B)
    commands = delete(driver, mine, after=4)
    doomed = names(mine[:8], mine, fork[:12], fork)
    assert sorted(gone(commands)) == sorted(gone(commands, Tier.SSD)) == sorted(doomed)
    forget = the(commands, m.Forget)
    assert (forget.replica_id, sorted(forget.marks)) == ("r1", sorted(doomed))
    driver.obey(commands)
    kept = set(names(SYSTEM, B))
    assert driver.stored(Tier.DRAM) == driver.stored(Tier.SSD) == kept
    assert {driver.scheduler.board.catalog.ghosts[key] for key in doomed} == {Cause.DELETED}
    plan = the(driver.submit("a/2", mine), m.Dispatch).plan
    assert plan.num_reused == 4
    assert plan.recomputed == ((Cause.DELETED, 8),)


def test_a_chunk_that_only_begins_before_the_deleted_text_leaves_too() -> None:
    """And what it shares with others is no deleted text."""
    driver = make(dram=1000)
    system = text(9, 2)
    mine, other = text(1, 4, system), text(2, 4, system)
    driver.obey(driver.offer(chunks_of(mine, cuts=[2])))
    driver.obey(delete(driver, mine, after=2))
    assert driver.stored() == set()
    ghosts = driver.scheduler.board.catalog.ghosts
    assert (ghosts[key_of(mine)], ghosts[key_of(system)]) == (Cause.DELETED, Cause.EVICTED)
    driver.join("n1", dram=1000, inventory=[(info, Tier.DRAM) for info in chunks_of(other, cuts=[2])])
    assert driver.stored() == set(names(other))


def test_readers_finish_first_and_new_turns_do_not_read_it() -> None:
    driver = make(dram=1000, slots=3)
    driver.store(A)
    assert the(driver.submit("b/1", text(2, 8, A)), m.Dispatch).plan.num_reused == 4
    assert gone(delete(driver, A)) == [], "b reads it"
    assert driver.figures["chunks_deleting"] == 1
    assert the(driver.submit("d/1", text(3, 8, A)), m.Dispatch).plan.num_reused == 0
    assert gone(driver.obey(driver.start("b/1"))) == names(A)
    assert driver.figures["chunks_deleting"] == driver.figures["chunks"] == 0


def test_what_is_under_way_arrives_and_goes() -> None:
    driver = make(dram=1000, ssd=1000, write_through=True)
    save = the(driver.offer(chunks_of(A)), m.Save)
    assert gone(delete(driver, A)) == []
    commands = driver.feed(answer(save))  # type: ignore[arg-type]
    assert gone(commands) == names(A)
    assert not only(commands, m.Demote)
    driver.obey(commands)
    demote = the(driver.feed(answer(the(driver.offer(chunks_of(B)), m.Save))), m.Demote)  # type: ignore[arg-type]
    assert gone(delete(driver, B, session="b")) == [], "it is being read"
    commands = driver.feed(answer(demote))  # type: ignore[arg-type]
    assert gone(commands) == gone(commands, Tier.SSD) == names(B)


def test_the_same_text_may_be_saved_anew_while_the_deleted_chunk_is_read() -> None:
    driver = make(dram=1000, slots=2)
    short, long = text(1, 6), text(1, 8)
    driver.store(short)
    driver.submit("b/1", text(2, 8, short), cuts=[6])
    delete(driver, short, after=4)
    assert the(driver.offer(chunks_of(short, 4), session="b"), m.Decline).chunks == (key_of(short),)
    driver.obey(driver.offer(chunks_of(long, 4, cuts=[6]), session="b"))
    assert driver.figures["chunks_deleting"] == 1
    driver.obey(driver.start("b/1"))
    assert driver.stored() == set(names(long[:4], long))
    assert the(driver.submit("d/1", text(3, 8, short), cuts=[6]), m.Dispatch).plan.num_reused == 6


def test_a_drop_of_deleted_chunks_is_repeated() -> None:
    driver = make()
    driver.store(A)
    drop = the(delete(driver, A), m.Drop)
    driver.feed(m.CommandFailed(command=drop, reason="busy"))
    assert driver.wait(driver.scheduler.config.retry_s) == [drop]


def test_turns_of_a_deleted_session_end() -> None:
    driver = make(slots=2)
    dispatch = the(driver.submit("a/1", A), m.Dispatch)
    driver.submit("b/1", B)
    driver.submit("a/2", D)
    expect(driver, E)
    assert driver.scheduler.turns_of("a") == ["a/1", "a/2"]
    commands = delete(driver, A)
    assert the(commands, m.Cancel).attempt == dispatch.attempt
    assert driver.scheduler.turns_of("a") == []
    assert driver.figures["sessions_expected"] == 0
    assert driver.figures["turns_waiting"] == 0


def test_offers_of_a_deleted_session_are_declined_for_a_while() -> None:
    driver = make(dram=1000)
    delete(driver, A)
    late = chunks_of(text(1, 8))
    assert the(driver.offer(late, session="a"), m.Decline).chunks == tuple(info.key for info in late)
    assert driver.scheduler.board.catalog.ghosts[key_of(A)] is Cause.DELETED
    assert only(driver.offer(chunks_of(B), session="b"), m.Save)
    driver.wait(61.0)
    assert only(driver.offer(late, session="a"), m.Save)


def test_offers_that_wait_for_bytes_are_declined() -> None:
    driver = make(dram=80)
    fill(driver, A)
    pin(driver, A, session="z")
    save = the(driver.offer(chunks_of(B), session="b"), m.Save)
    assert driver.offer(chunks_of(D), session="d") == []
    assert driver.offer(chunks_of(text(6, 8, D))[1:], session="other") == []
    assert driver.figures["offers_pending"] == 2
    declined = only(delete(driver, D, session="d"), m.Decline)
    assert [decline.chunks for decline in declined] == [(key_of(D),), (key_of(text(6, 8, D)),)]
    assert driver.figures["offers_pending"] == 0
    driver.obey([save])


def test_pins_do_not_hold_what_is_deleted() -> None:
    driver = make()
    driver.store(A)
    pin(driver, A, session="other", seconds=1e6)
    assert gone(delete(driver, A)) == names(A)
    assert driver.figures["leases"] == 0
    pin(driver, A, session="other", seconds=1e6)
    assert driver.figures["leases"] == 0, "nor can it be pinned any more"


def test_what_a_node_brings_back_of_it_is_dropped() -> None:
    driver = make(dram=1000, ssd=1000)
    mine = text(1, 12, SYSTEM)
    driver.feed(m.NodeLost("n1"))
    delete(driver, mine[:8], after=4)
    inventory = [(info, Tier.SSD) for info in (*chunks_of(mine), *chunks_of(B))]
    commands = driver.join(dram=1000, ssd=1000, inventory=inventory)
    assert sorted(gone(commands, Tier.SSD)) == sorted(names(mine[:8], mine)), "with what goes on from it"
    driver.obey(commands)
    assert driver.stored(Tier.SSD) == set(names(SYSTEM, B))
    again = driver.join(dram=1000, ssd=1000, inventory=inventory)
    assert sorted(gone(again, Tier.SSD)) == sorted(names(mine[:8], mine)), "however often"


def test_a_turn_that_waits_for_a_deleted_chunk_goes_without() -> None:
    driver = make(dram=1000)
    driver.join("n2", dram=1000, ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(A)])
    fetch = the(driver.submit("b/1", text(2, 8, A)), m.Fetch)
    assert the(delete(driver, A), m.Dispatch).plan.steps == ()
    commands = driver.feed(answer(fetch))  # type: ignore[arg-type]
    assert (gone(commands), gone(commands, Tier.SSD)) == (names(A), names(A))


def test_deleting_nothing_is_fine() -> None:
    driver = make()
    assert delete(driver, ()) == []
    assert len(only(delete(driver, A), m.Forget)) == 1, "HBM may hold what the store never had"


# --- closing replicas -------------------------------------------------------------------------------------------------


def test_a_closing_replica_gets_no_further_turns() -> None:
    driver = make(slots=2)
    driver.submit("a/1", A)
    driver.feed(m.ReplicaClosing("r1"))
    assert driver.submit("b/1", B) == []
    [figures] = driver.figures["fleet"]
    assert figures == {
        "replica_id": "r1",
        "node_id": "n1",
        "running": 1,
        "tokens": 8,
        "capacity_turns": 2,
        "capacity_tokens": 1000,
        "closing": True,
    }
    assert driver.start("a/1") == driver.finish("a/1") == [], "what runs goes on"
    assert driver.figures["fleet"][0]["running"] == 0
    assert the(driver.replica("r1", slots=2), m.Dispatch).turn_id == "b/1"
    assert not driver.figures["fleet"][0]["closing"]


def test_a_turn_too_big_for_the_replicas_left_runs_alone() -> None:
    driver = Driver()
    driver.join()
    driver.replica("small", tokens=10)
    driver.replica("big", tokens=1000)
    driver.feed(m.ReplicaClosing("big"))
    assert the(driver.submit("a/1", text(1, 50)), m.Dispatch).replica_id == "small"


def test_an_unknown_replica_cannot_close() -> None:
    driver = make()
    driver.feed(m.ReplicaClosing("r9"))
    assert driver.stale() == 1


# --- looking in -------------------------------------------------------------------------------------------------------


def test_where() -> None:
    driver = make(dram=1000, ssd=1000, write_through=True)
    tokens = text(1, 6)
    driver.store(tokens[:4])
    driver.offer(chunks_of(tokens, 4))
    marks = [mark.key for mark in marks_of(tokens)]
    dram, ssd = CopyView(Tier.DRAM, "n1", "resident"), CopyView(Tier.SSD, "n1", "resident")  # type: ignore[arg-type]
    saving = CopyView(Tier.DRAM, "n1", "saving")  # type: ignore[arg-type]
    assert driver.scheduler.where(marks) == [
        ChunkView(marks[0], 0, 4, 40, [dram, ssd]),
        ChunkView(marks[1], 4, 6, 20, [saving]),
    ]
    assert driver.scheduler.where([marks[1], *names(B)]) == [ChunkView(marks[1], 4, 6, 20, [saving])]
    delete(driver, tokens)
    states = [copy.state for chunk in driver.scheduler.where(marks) for copy in chunk.copies]
    assert states == ["dropping", "dropping", "saving"], "what is deleted can be seen going"


def test_where_names_a_chunk_that_holds_several_marks_once() -> None:
    driver = make(dram=1000)
    tokens = text(1, 8)
    driver.obey(driver.offer(chunks_of(tokens, cuts=[2, 6])))
    found = driver.scheduler.where([mark.key for mark in marks_of(tokens, cuts=[2, 6])])
    assert [(view.start, view.end) for view in found] == [(0, 4), (4, 8)]


def test_queue_view() -> None:
    driver = make(dram=1000, ssd=1000)
    driver.store(A)
    driver.feed(m.NodeLost("n1"))
    long = text(1, 8, A)
    stored = [(chunks_of(long)[0], Tier.DRAM), (chunks_of(long)[1], Tier.SSD)]
    driver.join(dram=1000, ssd=1000, inventory=stored)
    driver.submit("x/1", text(90, 4), reuse=False)
    driver.now += 2.0
    driver.submit("b/1", B, priority=1)
    driver.now += 3.0
    driver.submit("a/1", (*long, 7), session_id="a")
    driver.wait(1.0)
    first, second = driver.scheduler.queue_view(5)
    assert (first.turn_id, first.session_id, first.priority, first.waiting_s) == ("a/1", "a", 0, 1.0)
    assert (first.num_prompt_tokens, first.num_fetches) == (9, 0)
    assert first.reusable_tokens == {Tier.DRAM: 4, Tier.SSD: 4}
    assert (second.turn_id, second.waiting_s, second.reusable_tokens) == ("b/1", 4.0, {})
    assert driver.scheduler.queue_view(1) == [first]


def test_incoming_copies_are_counted_until_nothing_moves() -> None:
    driver = make(dram=1000, ssd=1000, write_through=True)
    assert driver.figures["incoming"] == {}
    commands = driver.offer(chunks_of(text(1, 8)))
    assert driver.figures["incoming"] == {"n1": {"saving": 2}}
    commands = driver.feed(answer(commands[0]))  # type: ignore[arg-type]
    assert driver.figures["incoming"] == {"n1": {"demoting": 2}}
    driver.obey(commands)
    assert driver.figures["incoming"] == {}
    driver.join("n2", dram=1000)
    driver.feed(m.ReplicaClosing("r1"))
    driver.replica("r2", "n2")
    fetches = driver.submit("a/1", text(1, 8))
    assert driver.figures["incoming"] == {"n2": {"fetching": 2}}
    assert driver.scheduler.queue_view(1)[0].num_fetches == 2
    driver.obey(fetches)
    assert driver.figures["incoming"] == {}


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_seconds_are_no_pin_and_no_expectation(seconds: float) -> None:
    driver = make()
    driver.store(A)
    pin(driver, A, seconds=seconds)
    expect(driver, A, seconds=seconds)
    assert driver.figures["leases"] == driver.figures["sessions_pinned"] == driver.figures["sessions_expected"] == 0
