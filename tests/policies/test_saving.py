"""The way in: offers, Save and Decline, write-through, tails that are replaced, offers that wait for bytes."""

from __future__ import annotations

import pytest

from policies import messages as m
from policies.messages import SchedulerConfig, Tier
from tests.policies.driver import Driver, answer, only, the
from tests.policies.texts import C, chunk_of, chunks_of, key_of, text

A, B = text(1, 10), text(2, 8)


def make(*, dram: int = 1000, ssd: int = 1000, bucket: int = 0, **config: object) -> Driver:
    driver = Driver(SchedulerConfig(**config))  # type: ignore[arg-type]
    driver.join(dram=dram, ssd=ssd, bucket=bucket)
    driver.replica()
    return driver


def test_offer_save_write_through() -> None:
    driver = make()
    chunks = chunks_of(A)
    assert driver.offer(chunks) == [m.Save(node_id="n1", replica_id="r1", chunks=chunks)]
    assert driver.figures["tiers"]["n1/dram"] == {"budget_bytes": 1000, "used_bytes": 0, "reserved_bytes": 100}
    assert driver.stored() == set()
    keys = tuple(info.key for info in chunks)
    assert driver.feed(m.ChunksSaved(node_id="n1", chunks=keys)) == [
        m.Demote(node_id="n1", chunk=key, tier=Tier.SSD) for key in keys
    ]
    assert driver.stored() == set(keys)
    assert driver.figures["tiers"]["n1/ssd"]["reserved_bytes"] == 100
    for info in chunks:
        demoted = m.ChunkDemoted(node_id="n1", chunk=info.key, tier=Tier.SSD, num_bytes=info.num_bytes)
        assert driver.feed(demoted) == []
    assert driver.stored() == driver.stored(Tier.SSD) == set(keys)
    assert driver.figures["tiers"]["n1/ssd"] == {"budget_bytes": 1000, "used_bytes": 100, "reserved_bytes": 0}


def test_without_write_through_nothing_is_copied_down() -> None:
    driver = make(write_through=False)
    assert len(driver.obey(driver.offer(chunks_of(A)))) == 1


def test_write_through_goes_to_the_next_tier_that_there_is() -> None:
    driver = make(ssd=0, bucket=1000)
    assert {command.tier for command in only(driver.obey(driver.offer(chunks_of(A))), m.Demote)} == {Tier.OBJECT}


def test_the_measured_size_counts() -> None:
    driver = make()
    save = the(driver.offer(chunks_of(text(1, 4))), m.Save)
    demote = the(driver.feed(answer(save)), m.Demote)
    driver.feed(m.ChunkDemoted(node_id="n1", chunk=demote.chunk, tier=Tier.SSD, num_bytes=33))
    assert driver.figures["tiers"]["n1/ssd"]["used_bytes"] == 33


def test_known_chunks_are_declined() -> None:
    driver = make()
    driver.store(A)
    keys = tuple(info.key for info in chunks_of(A))
    assert driver.offer(chunks_of(A)) == [m.Decline(replica_id="r1", chunks=keys)]


def test_chunks_on_their_way_are_declined_to_others_and_ignored_from_the_same() -> None:
    driver = make()
    driver.replica("r2")
    driver.offer(chunks_of(A))
    assert driver.offer(chunks_of(A)) == [], "the same offer twice"
    assert isinstance(driver.offer(chunks_of(A), replica_id="r2")[0], m.Decline)


def test_offers_from_strangers_are_declined_or_dropped() -> None:
    driver = make()
    assert isinstance(the(driver.offer(chunks_of(A), node_id="n9"), m.Decline), m.Decline)
    assert driver.offer(chunks_of(A), replica_id="r9") == [], "there is nobody to tell"


def test_a_chunk_bigger_than_dram_is_declined_with_all_that_follow() -> None:
    driver = make(dram=30)
    assert the(driver.offer(chunks_of(A)), m.Decline).chunks == tuple(info.key for info in chunks_of(A))


# --- tails ------------------------------------------------------------------------------------------------------------


def test_a_longer_tail_replaces_the_shorter_one() -> None:
    driver = make()
    driver.store(text(1, 6))
    heard = driver.obey(driver.offer(chunks_of(text(1, 8), 4, cuts=[6])))
    old = key_of(text(1, 6))
    assert {(command.chunk, command.tier) for command in only(heard, m.Drop)} == {(old, Tier.DRAM), (old, Tier.SSD)}
    assert driver.stored() == driver.stored(Tier.SSD) == {key_of(text(1, 4)), key_of(text(1, 8))}


def test_the_shorter_tail_stays_as_long_as_it_is_leased() -> None:
    driver = make(write_through=False)
    driver.store(text(1, 6))
    driver.submit("a/1", text(1, 7), cuts=[6])
    heard = driver.obey(driver.offer(chunks_of(text(1, 8), 4, cuts=[6])))
    assert only(heard, m.Drop) == []
    assert the(driver.start("a/1"), m.Drop).chunk == key_of(text(1, 6))


def test_a_shorter_tail_saved_late_is_dropped_at_once() -> None:
    """Two turns of a session are saved out of order."""
    driver = make(write_through=False)
    driver.store(text(1, 4))
    short = the(driver.offer([chunk_of(text(1, 6), 4)]), m.Save)
    long = the(driver.offer([chunk_of(text(1, 8), 4, cuts=[6])]), m.Save)
    driver.feed(answer(long))
    assert the(driver.feed(answer(short)), m.Drop).chunk == key_of(text(1, 6))


def test_a_shorter_tail_is_declined_once_the_longer_one_is_there() -> None:
    driver = make()
    driver.obey(driver.offer(chunks_of(text(1, 8), cuts=[6])))
    assert the(driver.offer([chunk_of(text(1, 6), 4)]), m.Decline).chunks == (key_of(text(1, 6)),)


def test_a_replaced_tail_is_kept_when_the_longer_one_is_lost() -> None:
    driver = make(write_through=False)
    driver.store(text(1, 6))
    driver.submit("a/1", text(1, 7), cuts=[6])
    driver.obey(driver.offer(chunks_of(text(1, 8), 4, cuts=[6])))
    lost = m.ChunkLost(node_id="n1", chunk=key_of(text(1, 8)), tier=Tier.DRAM, cause=m.Cause.CORRUPT)
    driver.obey(driver.feed(lost))
    assert driver.start("a/1") == []
    assert key_of(text(1, 6)) in driver.stored()


def test_a_tail_with_children_is_not_replaced() -> None:
    """A text of exactly that length went on elsewhere: only full chunks have children, and they stay."""
    driver = make(write_through=False)
    driver.store(A)
    assert driver.stored() == {key_of(A[:4]), key_of(A[:8]), key_of(A)}
    driver.obey(driver.offer([chunk_of(text(3, 12, after=A), 8, cuts=[10])]))
    assert driver.stored() == {key_of(A[:4]), key_of(A[:8]), key_of(text(3, 12, after=A))}


# --- waiting for what is being saved ----------------------------------------------------------------------------------


def test_the_next_turn_waits_for_the_tail_that_is_being_saved() -> None:
    driver = make()
    save = the(driver.offer(chunks_of(A)), m.Save)
    assert driver.submit("a/2", text(2, 13, after=A), cuts=[10]) == []
    assert driver.wait(9.0) == []
    plan = the(driver.feed(answer(save)), m.Dispatch).plan
    assert (plan.num_reused, plan.recomputed) == (10, ((m.Cause.NEVER_STORED, 3),))


def test_but_not_longer_than_its_deadline() -> None:
    driver = make()
    driver.offer(chunks_of(A))
    driver.submit("a/2", text(2, 13, after=A), cuts=[10])
    plan = the(driver.wait(10.0), m.Dispatch).plan
    assert plan.recomputed == ((m.Cause.LATE, 10), (m.Cause.NEVER_STORED, 3))


def test_and_not_when_the_save_fails() -> None:
    driver = make()
    save = the(driver.offer(chunks_of(A)), m.Save)
    driver.submit("a/2", text(2, 13, after=A), cuts=[10])
    commands = driver.feed(m.CommandFailed(command=save, reason="dead"))
    assert the(commands, m.Dispatch).plan.recomputed == ((m.Cause.LOST, 10), (m.Cause.NEVER_STORED, 3))


def test_others_go_first_meanwhile() -> None:
    driver = make()
    driver.offer(chunks_of(A))
    driver.submit("a/2", text(2, 13, after=A), cuts=[10])
    assert the(driver.submit("b/1", B), m.Dispatch).turn_id == "b/1"


def test_a_tail_saved_on_another_node_is_waited_for_and_fetched() -> None:
    driver = make()
    driver.join("n2")
    driver.feed(m.ReplicaLost("r1"))
    driver.replica("r2", "n2")
    driver.replica("r1", "n1", slots=1)
    driver.submit("x/1", B, reuse=False)
    busy = "r1" if driver.scheduler.board.fleet.replicas["r1"].running else "r2"
    if busy == "r2":
        driver.finish("x/1", "r2")
        driver.feed(m.ReplicaLost("r2"))
        driver.replica("r2", "n2")
        driver.submit("x/1", B, reuse=False)
    save = the(driver.offer(chunks_of(A)), m.Save)
    assert driver.submit("a/2", text(2, 13, after=A), cuts=[10]) == []
    fetches = only(driver.feed(answer(save)), m.Fetch)
    assert {(fetch.node_id, fetch.source_node) for fetch in fetches} == {("n2", "n1")}
    assert the(driver.obey(fetches), m.Dispatch).plan.num_reused == 10


# --- offers that wait for bytes ---------------------------------------------------------------------------------------


def test_an_offer_waits_for_bytes_and_is_saved_when_they_are_free() -> None:
    driver = make(dram=100, ssd=0)
    driver.store(A)
    commands = driver.offer(chunks_of(B))
    drops = only(commands, m.Drop)
    assert only(commands, m.Save) == []
    assert {drop.chunk for drop in drops} <= {info.key for info in chunks_of(A)}
    assert driver.figures["offers_pending"] == 2
    heard = driver.obey(drops)
    saved = [info.key for save in only(heard, m.Save) for info in save.chunks]
    assert saved == [key_of(B[:4]), key_of(B)]
    assert driver.figures["offers_pending"] == 0


def test_an_offer_that_waits_too_long_is_declined() -> None:
    driver = make(dram=100, ssd=0)
    driver.store(A)
    driver.submit("a/1", A)  # everything is leased
    assert driver.offer(chunks_of(B)) == []
    assert driver.wait(4.9) == []
    commands = driver.wait(0.2)
    assert {key for decline in only(commands, m.Decline) for key in decline.chunks} == {key_of(B[:4]), key_of(B)}
    assert driver.figures["offers_pending"] == 0
    assert only(driver.submit("b/1", B), m.Dispatch)[0].plan.recomputed == ((m.Cause.DECLINED, 8),)


def test_offers_beyond_the_limit_are_declined_at_once() -> None:
    driver = make(dram=100, ssd=0, max_pending_offers=1)
    driver.store(A)
    driver.submit("a/1", A)
    assert the(driver.offer(chunks_of(B)), m.Decline).chunks == (key_of(B),)


def test_waiting_offers_go_with_their_replica() -> None:
    driver = make(dram=100, ssd=0)
    driver.store(A)
    driver.submit("a/1", A)
    driver.offer(chunks_of(B))
    assert driver.feed(m.ReplicaLost("r1")) == []
    assert driver.figures["offers_pending"] == 0
    assert only(driver.wait(10.0), m.Decline) == []


def test_waiting_offers_are_declined_when_their_node_is_lost() -> None:
    driver = make(dram=100, ssd=0)
    driver.store(A)
    driver.submit("a/1", A)
    driver.offer(chunks_of(B))
    commands = driver.feed(m.NodeLost("n1"))
    assert {key for decline in only(commands, m.Decline) for key in decline.chunks} == {key_of(B[:4]), key_of(B)}


# --- answers that fail, come late or twice ----------------------------------------------------------------------------


def test_a_partly_failed_save() -> None:
    driver = make(write_through=False)
    chunks = chunks_of(A)
    save = the(driver.offer(chunks), m.Save)
    part = m.Save(node_id="n1", replica_id="r1", chunks=chunks[1:])
    driver.feed(m.ChunksSaved(node_id="n1", chunks=(chunks[0].key,)))
    assert driver.feed(m.CommandFailed(command=part, reason="full")) == [
        m.Decline(replica_id="r1", chunks=(info.key,)) for info in chunks[1:]
    ]
    assert driver.stored() == {chunks[0].key}
    assert driver.figures["tiers"]["n1/dram"]["reserved_bytes"] == 0
    assert driver.feed(m.CommandFailed(command=save, reason="again")) == []


def test_a_save_without_an_answer_fails_in_time() -> None:
    driver = make()
    driver.offer(chunks_of(A))
    assert driver.wait(29.0) == []
    assert len(only(driver.wait(1.0), m.Decline)) == 3
    assert driver.figures["counters"]["overdue.saving"] == 3
    assert driver.figures["tiers"]["n1/dram"]["reserved_bytes"] == 0


@pytest.mark.parametrize("is_known", [False, True])
def test_a_save_confirmed_after_its_deadline(is_known: bool) -> None:
    """Kept when the chunk is still known by another copy, else removed: nothing lies there unaccounted for."""
    driver = make(write_through=False)
    tokens = text(1, 4)
    save = the(driver.offer(chunks_of(tokens)), m.Save)
    driver.wait(30.0)
    if is_known:
        driver.join("n2", inventory=[(chunk_of(tokens, 0), Tier.DRAM)])
    commands = driver.feed(answer(save))
    if is_known:
        assert commands == []
        assert driver.stored() == {key_of(tokens)}
    else:
        assert commands == [m.Drop(node_id="n1", chunk=key_of(tokens), tier=Tier.DRAM)]
        assert driver.feed(answer(commands[0])) == []


def test_saved_twice() -> None:
    driver = make(write_through=False)
    save = the(driver.offer(chunks_of(A)), m.Save)
    driver.feed(answer(save))
    assert driver.feed(answer(save)) == []
    assert driver.figures["tiers"]["n1/dram"]["used_bytes"] == 100


def test_a_session_is_offered_again_after_its_chunks_were_lost() -> None:
    driver = make(write_through=False)
    driver.store(A)
    driver.feed(m.NodeLost("n1"))
    driver.join()
    assert len(the(driver.offer(chunks_of(A)), m.Save).chunks) == len(A) // C + 1
