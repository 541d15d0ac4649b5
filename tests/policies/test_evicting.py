"""The way down and out: watermarks, orders, leases, leaves before parents, full tiers, lost copies."""

from __future__ import annotations

import pytest

from policies import evicting
from policies import messages as m
from policies.messages import Cause, SchedulerConfig, Tier
from tests.policies.driver import Driver, answer, only, the
from tests.policies.texts import Tokens, chunks_of, key_of, text

A, B, D, E = text(1, 4), text(2, 4), text(3, 4), text(4, 4)


def make(*, dram: int = 200, ssd: int = 0, bucket: int = 0, **config: object) -> Driver:
    """DRAM holds five full chunks of 40 bytes; between the watermarks are one or two."""
    settings = {
        "write_through": False,
        "high_watermark": 0.9,
        "low_watermark": 0.6,
        "prefetch": "policies.prefetch:Off",
        "eviction": "policies.eviction:LookAhead",
        "serving_order": "policies.serving_order:Fcfs",
    }
    driver = Driver(SchedulerConfig(**{**settings, **config}))  # type: ignore[arg-type]
    driver.join(dram=dram, ssd=ssd, bucket=bucket)
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)  # the only slot is taken: turns wait
    return driver


def fill(driver: Driver, *texts: Tokens) -> None:
    for tokens in texts:
        driver.now += 1.0
        driver.store(tokens)


def gone(commands: list[m.Command], tier: Tier = Tier.DRAM) -> list[str]:
    return [drop.chunk for drop in only(commands, m.Drop) if drop.tier is tier]


def names(*texts: Tokens) -> list[str]:
    return [key_of(tokens) for tokens in texts]


# --- watermarks and orders --------------------------------------------------------------------------------------------


def test_nothing_goes_below_the_high_watermark() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    assert driver.stored() == set(names(A, B, D, E))


def test_above_the_high_watermark_it_evicts_to_the_low_one() -> None:
    driver = make()
    fill(driver, A, B, D, E, text(5, 4))
    assert driver.figures["tiers"]["n1/dram"]["used_bytes"] == 120


@pytest.mark.parametrize(
    ("policy", "order"),
    [("Fifo", names(A, B)), ("Lru", names(B, D)), ("LookAhead", names(B, D))],
)
def test_orders_when_nobody_waits(policy: str, order: list[str]) -> None:
    driver = make(eviction=f"policies.eviction:{policy}")
    fill(driver, A, B, D, E)
    driver.finish("x/1")
    driver.submit("a/1", A)  # reads A, which is the most recently used one then
    driver.finish("a/1")
    driver.now += 1.0
    assert gone(driver.obey(driver.offer(chunks_of(text(5, 4))))) == order


def test_look_ahead_goes_outside_the_queue_first_then_from_its_tail() -> None:
    driver = make(ssd=1000, low_watermark=0.2)
    fill(driver, A, B, D, E)
    for turn_id, tokens in (("b/1", B), ("a/1", A), ("d/1", D)):
        driver.submit(turn_id, tokens)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    demoted = [command.chunk for command in only(heard, m.Demote)]
    assert demoted == names(E, D, A, B)[: len(demoted)]
    assert len(demoted) >= 3
    assert gone(heard) == demoted


def test_look_ahead_follows_priorities() -> None:
    driver = make(ssd=1000)
    fill(driver, A, B)
    driver.submit("a/1", A, priority=3)
    driver.submit("b/1", B, priority=1)
    fill(driver, D, E)
    driver.submit("d/1", D)
    driver.submit("e/1", E)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert [command.chunk for command in only(heard, m.Demote)] == names(A, B)


def test_inside_the_window_chunks_are_demoted_never_dropped() -> None:
    driver = make()  # no lower tier: DRAM holds the sessions of 5 turns
    fill(driver, A, B, D, E)
    for turn_id, tokens in (("a/1", A), ("b/1", B), ("d/1", D), ("e/1", E)):
        driver.submit(turn_id, tokens)
    assert gone(driver.obey(driver.offer(chunks_of(text(5, 4))))) == []
    assert gone(driver.wait(1.0)) == names(text(5, 4)), "what nobody waits for goes, the rest stays"


def test_beyond_the_window_chunks_may_be_dropped() -> None:
    driver = make(dram=200)
    fill(driver, A, B, D, E)
    for number in range(8):
        driver.submit(f"q/{number}", text(50 + number, 4))
    driver.submit("a/1", A)
    driver.submit("b/1", B)
    driver.submit("d/1", D)
    driver.submit("e/1", E)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert gone(heard) == names(A, B), "outside the window nobody looks at the queue: least recently used first"


def test_write_through_makes_eviction_free() -> None:
    driver = make(ssd=1000, write_through=True)
    fill(driver, A, B, D, E)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert [command.chunk for command in only(heard, m.Demote)] == names(text(5, 4))
    assert gone(heard) == names(A, B)
    assert driver.stored(Tier.SSD) == set(names(A, B, D, E, text(5, 4)))


def test_a_copy_leaves_only_when_the_one_below_is_written() -> None:
    driver = make(ssd=1000)
    fill(driver, A, B, D, E)
    commands = driver.offer(chunks_of(text(5, 4)))
    demotes = only(commands, m.Demote)
    assert [demote.chunk for demote in demotes] == names(A, B)
    assert only(commands, m.Drop) == []
    assert driver.feed(answer(demotes[0])) == [m.Drop(node_id="n1", chunk=key_of(A), tier=Tier.DRAM)]


def test_what_others_go_on_from_follows_them_down() -> None:
    """Its only copy may not go for good while they are there, but it must not fill DRAM for ever either."""
    driver = make(ssd=1000)
    texts = [text(number, 8) for number in range(1, 7)]
    fill(driver, *texts)
    driver.wait(60.0)
    assert only(driver.log, m.Decline) == []
    everything = {info.key for tokens in texts for info in chunks_of(tokens)}
    assert driver.stored() | driver.stored(Tier.SSD) == everything
    assert {info.key for info in chunks_of(texts[0])} <= driver.stored(Tier.SSD)


def test_what_cannot_move_down_keeps_nobody_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the head stays where it is, as its tail lies below, and what came later goes for good."""
    monkeypatch.setattr(evicting, "BATCH", 1)
    monkeypatch.setattr(evicting, "MAX_TRIES", 1)
    driver = make(ssd=1000, command_deadline_s=1e6, retry_s=1e3)
    fill(driver, text(1, 8), B, D)
    head, tail = (info.key for info in chunks_of(text(1, 8)))
    commands = driver.offer(chunks_of(E))
    while driver.stored(Tier.SSD) != {tail}:
        commands = [new for command in commands if (event := answer(command)) for new in driver.feed(event)]
    for number in range(5, 15):
        failed = [m.CommandFailed(command=demote, reason="no space") for demote in only(commands, m.Demote)]
        others = [event for command in commands if not isinstance(command, m.Demote) and (event := answer(command))]
        commands = [*driver.feed(*failed, *others), *driver.offer(chunks_of(text(number, 4)))]
    assert head in driver.stored()
    assert {drop.chunk for drop in only(driver.log, m.Drop) if drop.chunk != tail}
    num_before = len(driver.log)
    driver.obey([*commands, *driver.wait(2e3), *driver.offer(chunks_of(text(20, 4)))])
    assert head in {demote.chunk for demote in only(driver.log[num_before:], m.Demote)}, "tried again, after retry_s"


def test_the_last_copy_of_what_others_go_on_from_is_not_dropped() -> None:
    """Where nothing can be written below, the longer chunks go first."""
    driver = make(dram=100, ssd=50)
    fill(driver, text(1, 8), text(2, 4), text(3, 4), text(4, 4))
    head, tail = (info.key for info in chunks_of(text(1, 8)))
    dropped = [(drop.chunk, drop.tier) for drop in only(driver.log, m.Drop)]
    assert dropped.index((tail, Tier.SSD)) < dropped.index((head, Tier.SSD))


def test_a_failed_demotion_keeps_the_copy_and_evicts_another() -> None:
    driver = make(ssd=1000, low_watermark=0.8)
    fill(driver, A, B, D, E)
    driver.submit("a/1", A)
    demote = the(driver.offer(chunks_of(text(5, 4))), m.Demote)
    assert demote.chunk == key_of(B)
    commands = driver.feed(m.CommandFailed(command=demote, reason="disk"))
    assert gone(commands) == [key_of(B)], "nobody needs it"
    assert driver.figures["tiers"]["n1/ssd"]["reserved_bytes"] == 0


def test_a_failed_demotion_keeps_what_is_needed() -> None:
    driver = make(ssd=1000, low_watermark=0.8)
    fill(driver, A, B, D, E)
    for turn_id, tokens in (("a/1", A), ("b/1", B), ("d/1", D), ("e/1", E)):
        driver.submit(turn_id, tokens)
    demote = the(driver.offer(chunks_of(text(5, 4))), m.Demote)
    assert demote.chunk == key_of(E)
    commands = driver.feed(m.CommandFailed(command=demote, reason="disk"))
    assert the(commands, m.Demote).chunk == key_of(D), "the next one is tried"
    assert key_of(E) in driver.stored()


# --- what stays -------------------------------------------------------------------------------------------------------


def test_leases_protect() -> None:
    driver = make()
    fill(driver, A, B, D, E)
    driver.finish("x/1")
    dispatch = the(driver.submit("a/1", A), m.Dispatch)
    assert dispatch.plan.num_reused == 3
    heard = driver.obey(driver.offer(chunks_of(text(5, 12))))
    assert key_of(A) not in gone(heard)
    assert key_of(A) in driver.stored()


def test_leases_end_when_the_turn_has_started() -> None:
    driver = make(eviction="policies.eviction:Fifo")
    fill(driver, A, B, D, E)
    driver.finish("x/1")
    driver.submit("a/1", A)
    driver.start("a/1")
    assert driver.figures["leases"] == 0
    assert gone(driver.obey(driver.offer(chunks_of(text(5, 4)))))[0] == key_of(A)


def test_leases_expire() -> None:
    driver = make(eviction="policies.eviction:Fifo")
    fill(driver, A, B, D, E)
    driver.finish("x/1")
    driver.submit("a/1", A)
    driver.wait(59.0)
    assert driver.figures["leases"] == 1
    driver.wait(1.0)
    assert driver.figures["leases"] == 0
    assert driver.figures["counters"]["overdue.lease"] == 1
    driver.start("a/1")
    driver.finish("a/1")


def test_leaves_go_before_their_parents() -> None:
    driver = make(eviction="policies.eviction:Fifo", low_watermark=0.2)
    fill(driver, text(1, 12))
    fill(driver, B)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    order = gone(heard)
    assert [key for key in order if key != key_of(B)] == names(text(1, 12), text(1, 8), text(1, 4))


def test_a_parent_of_leased_chunks_stays() -> None:
    driver = make(eviction="policies.eviction:Fifo", low_watermark=0.1)
    fill(driver, text(1, 12))
    driver.finish("x/1")
    driver.submit("a/1", text(1, 12))
    driver.obey(driver.offer(chunks_of(text(5, 8))))
    assert set(names(text(1, 4), text(1, 8), text(1, 12))) <= driver.stored()


def test_time_to_live_goes_first() -> None:
    driver = make(session_ttl_s=100.0, eviction="policies.eviction:Lru")
    fill(driver, A)
    driver.now = 90.0
    fill(driver, B, D)
    driver.submit("b/1", B)
    driver.now = 102.0
    driver.wait(0.0)
    fill(driver, E)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert gone(heard)[0] == key_of(A)


def test_what_a_waiting_turn_needs_does_not_expire() -> None:
    driver = make(session_ttl_s=10.0)
    fill(driver, A, B, D, E)
    driver.submit("a/1", A)
    driver.wait(20.0)
    assert gone(driver.obey(driver.offer(chunks_of(text(5, 4))))) == names(B, D)


# --- full tiers -------------------------------------------------------------------------------------------------------


def test_a_full_ssd_is_evicted_as_well() -> None:
    driver = make(ssd=80, write_through=True, low_watermark=0.9)
    fill(driver, A, B)
    assert driver.stored(Tier.SSD) < set(names(A, B)), "80 bytes are above its high watermark"
    fill(driver, D, E, text(5, 4), text(6, 4))
    assert driver.figures["tiers"]["n1/ssd"]["used_bytes"] <= 80
    assert driver.figures["tiers"]["n1/dram"]["used_bytes"] <= 180


def test_a_full_ssd_of_needed_chunks_is_not_emptied_for_others() -> None:
    driver = make(ssd=1000, low_watermark=0.9)
    fill(driver, A, B, D, E, text(5, 4))
    assert driver.stored(Tier.SSD) == set(names(A))


def test_dram_full_of_leased_chunks_evicts_nothing() -> None:
    driver = make(dram=200, high_watermark=1.0, low_watermark=1.0)
    fill(driver, text(1, 20))
    driver.finish("x/1")
    driver.submit("a/1", text(1, 20))
    assert driver.offer(chunks_of(B)) == []
    assert driver.figures["offers_pending"] == 1


def test_dram_smaller_than_one_chunk() -> None:
    driver = make(dram=30)
    assert the(driver.offer(chunks_of(A)), m.Decline).chunks == (key_of(A),)
    assert len(only(driver.obey(driver.offer(chunks_of(text(5, 3)))), m.Save)) == 1


def test_a_node_without_dram_saves_nothing() -> None:
    driver = make(dram=0, ssd=1000)
    assert the(driver.offer(chunks_of(A)), m.Decline).chunks == (key_of(A),)


# --- drops and losses -------------------------------------------------------------------------------------------------


def test_bytes_count_until_the_drop_is_confirmed() -> None:
    driver = make(dram=80, high_watermark=1.0, low_watermark=1.0)
    fill(driver, A, B)
    drop = the(driver.offer(chunks_of(D)), m.Drop)
    assert driver.figures["tiers"]["n1/dram"]["used_bytes"] == 80
    assert len(only(driver.feed(answer(drop)), m.Save)) == 1


def test_a_drop_is_repeated_until_it_is_confirmed() -> None:
    driver = make()
    fill(driver, A)
    drop = the(driver.feed(m.ChunkLost(node_id="n1", chunk=key_of(A), tier=Tier.DRAM, cause=Cause.LOST)), m.Drop)
    assert driver.feed(m.CommandFailed(command=drop, reason="busy")) == []
    assert driver.wait(5.0) == [drop], "after a failure soon"
    assert driver.wait(30.0) == [drop], "after silence in time"
    assert driver.feed(answer(drop)) == []
    assert driver.figures["chunks"] == 0


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD, Tier.OBJECT])
def test_a_lost_copy_is_not_read_any_more_and_its_remains_are_cleared(tier: Tier) -> None:
    driver = make(ssd=1000, bucket=1000)
    driver.join(dram=200, ssd=1000, bucket=1000, inventory=[(info, tier) for info in chunks_of(A)])
    lost = m.ChunkLost(node_id="n1", chunk=key_of(A), tier=tier, cause=Cause.CORRUPT)
    assert driver.feed(lost) == [m.Drop(node_id="n1", chunk=key_of(A), tier=tier)]
    assert driver.feed(lost) == [], "told twice"


def test_a_lost_copy_that_is_leased_ends_its_lease() -> None:
    driver = make()
    fill(driver, text(1, 8))
    driver.finish("x/1")
    driver.submit("a/1", text(1, 8))
    driver.feed(m.ChunkLost(node_id="n1", chunk=key_of(text(1, 8)), tier=Tier.DRAM, cause=Cause.CORRUPT))
    assert driver.figures["leases"] == 1, "on the other chunk"
    driver.feed(m.ChunkLost(node_id="n1", chunk=key_of(text(1, 4)), tier=Tier.DRAM, cause=Cause.CORRUPT))
    assert driver.figures["leases"] == 0
    assert driver.start("a/1") == []


def test_a_copy_dropped_without_a_command_is_dropped_for_good() -> None:
    driver = make()
    fill(driver, A)
    dropped = m.ChunkDropped(node_id="n1", chunk=key_of(A), tier=Tier.DRAM)
    assert driver.feed(dropped) == [m.Drop(node_id="n1", chunk=key_of(A), tier=Tier.DRAM)]
    assert driver.feed(dropped) == []
    assert driver.stored() == set()


def test_a_demotion_without_an_answer_fails_in_time() -> None:
    driver = make(ssd=1000, write_through=True)
    save = the(driver.offer(chunks_of(A)), m.Save)
    demote = the(driver.feed(answer(save)), m.Demote)
    driver.wait(30.0)
    assert driver.figures["tiers"]["n1/ssd"]["reserved_bytes"] == 0
    assert driver.feed(answer(demote)) == [], "it was written after all"
    assert driver.stored(Tier.SSD) == {key_of(A)}


def test_demoted_after_the_chunk_is_forgotten() -> None:
    driver = make(ssd=1000, write_through=True)
    save = the(driver.offer(chunks_of(A)), m.Save)
    demote = the(driver.feed(answer(save)), m.Demote)
    driver.wait(30.0)
    driver.obey(driver.feed(m.ChunkLost(node_id="n1", chunk=key_of(A), tier=Tier.DRAM, cause=Cause.LOST)))
    assert driver.feed(answer(demote)) == [m.Drop(node_id="n1", chunk=key_of(A), tier=Tier.SSD)]


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_node_joins_with_what_it_holds() -> None:
    driver = make()
    driver.join("n2", ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(A)])
    assert driver.stored(Tier.SSD, "n2") == {key_of(A)}
    assert driver.figures["tiers"]["n2/ssd"]["used_bytes"] == 40


def test_a_node_joins_again_with_something_else() -> None:
    driver = make()
    driver.join("n2", ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(A)])
    driver.join("n2", ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(B)])
    assert driver.stored(Tier.SSD, "n2") == {key_of(B)}
    assert driver.figures["tiers"]["n2/ssd"]["used_bytes"] == 40


def test_an_inventory_larger_than_the_budget_is_evicted() -> None:
    driver = make()
    driver.join("n2", ssd=100, inventory=[(info, Tier.SSD) for info in chunks_of(text(1, 20))])
    driver.obey(driver.wait(0.0))
    assert driver.figures["tiers"]["n2/ssd"]["used_bytes"] == 200, "it was commanded when the node joined"
    driver.obey([command for command in driver.log if isinstance(command, m.Drop) and command.node_id == "n2"])
    assert driver.figures["tiers"]["n2/ssd"]["used_bytes"] <= 100


def test_an_inventory_without_parents_is_kept() -> None:
    """They may come back from another node; and they are evicted like anything else."""
    driver = make()
    driver.join("n2", ssd=1000, inventory=[(info, Tier.SSD) for info in chunks_of(text(1, 12))[1:]])
    assert len(driver.stored(Tier.SSD, "n2")) == 2


def test_inventory_of_a_tier_that_is_gone_is_ignored() -> None:
    driver = make()
    driver.join("n2", inventory=[(info, Tier.SSD) for info in chunks_of(A)])
    assert driver.figures["chunks"] == 0


def test_superseded_tails_of_an_inventory_are_dropped() -> None:
    driver = make()
    short, long = chunks_of(text(1, 6))[1], chunks_of(text(1, 8), cuts=[6])[1]
    stored = [(info, Tier.SSD) for info in (*chunks_of(text(1, 4)), short, long)]
    assert gone(driver.join("n2", ssd=1000, inventory=stored), Tier.SSD) == [short.key]


def test_a_lost_node_takes_its_copies_along() -> None:
    driver = make(ssd=1000, write_through=True)
    fill(driver, A)
    driver.join("n2", inventory=[(info, Tier.DRAM) for info in chunks_of(B)])
    driver.feed(m.NodeLost("n1"))
    assert driver.figures["chunks"] == 1
    assert set(driver.figures["tiers"]) == {"n2/dram"}


# --- one bucket for all nodes -----------------------------------------------------------------------------------------


def test_the_bucket_is_one_place_with_one_budget() -> None:
    driver = make(bucket=1000, write_through=True)
    driver.join("n2", bucket=1000)
    fill(driver, A)
    assert driver.figures["tiers"]["shared/object"]["used_bytes"] == 40
    driver.replica("r2", "n2")
    assert isinstance(driver.offer(chunks_of(A), replica_id="r2", node_id="n2")[0], m.Decline)


def test_the_bucket_outlives_its_nodes() -> None:
    driver = make(bucket=1000, write_through=True)
    fill(driver, A)
    driver.feed(m.NodeLost("n1"))
    assert driver.figures["chunks"] == 1
    driver.join("n2", bucket=500)
    assert driver.figures["tiers"]["shared/object"] == {"budget_bytes": 500, "used_bytes": 40, "reserved_bytes": 0}


def test_another_node_clears_the_bucket_for_one_that_is_gone() -> None:
    driver = make(bucket=1000, write_through=True)
    fill(driver, A)
    driver.join("n2", bucket=1000)
    driver.feed(m.NodeLost("n1"))
    lost = m.ChunkLost(node_id="n2", chunk=key_of(A), tier=Tier.OBJECT, cause=Cause.CORRUPT)
    assert driver.feed(lost) == [m.Drop(node_id="n2", chunk=key_of(A), tier=Tier.OBJECT)]


def test_both_nodes_list_the_bucket_in_their_inventory() -> None:
    driver = Driver()
    inventory = [(info, Tier.OBJECT) for info in chunks_of(A)]
    driver.join("n1", bucket=1000, inventory=inventory)
    driver.join("n2", bucket=1000, inventory=inventory)
    assert driver.figures["tiers"]["shared/object"]["used_bytes"] == 40
