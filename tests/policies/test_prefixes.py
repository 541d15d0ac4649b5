"""Prefixes and tenants: how long they live, pinned, over, to be deleted; a few chunks an event, however many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies import messages as m
from policies.catalog import Chunk
from policies.lifetimes import Lifetimes
from policies.messages import Cause, Mark, Tier
from policies.prefixes import MAX_LEAVING, SLICE
from tests.policies.driver import Driver, answer, only, the
from tests.policies.test_administration import fill, gone, make, names
from tests.policies.texts import Tokens, chunks_of, key_of, text

ALICE, BOB = Mark(0, "alice"), Mark(0, "bob")
SYSTEM = text(9, 4)
A, B, D, E, F = (text(name, 4) for name in (1, 2, 3, 4, 5))


def prefix_of(tokens: Tokens) -> Mark:
    return Mark(len(tokens), key_of(tokens))


def of_tenant(tenant: Mark, tokens: Tokens, start: int = 0, cuts: tuple[int, ...] = ()) -> tuple[m.ChunkInfo, ...]:
    """Its chunks; the first one's parent is the tenant's root."""
    chunks = chunks_of(tokens, start, cuts)
    return tuple(info if info.start else replace(info, parent=tenant.key) for info in chunks)


def store(driver: Driver, tenant: Mark, *texts: Tokens) -> None:
    for tokens in texts:
        driver.now += 1.0
        driver.obey(driver.offer(of_tenant(tenant, tokens), session=f"of {tokens[0]}"))


def live(driver: Driver, prefix: Mark, seconds: float | None) -> None:
    driver.feed(m.PrefixLifetimeSet(prefix=prefix, seconds=seconds))


def expired(driver: Driver) -> set[str]:
    return {key for key, chunk in driver.scheduler.board.catalog.chunks.items() if chunk.expired}


def settle(driver: Driver) -> list[m.Command]:
    """Ticks until no wish is left, with obedient nodes."""
    commands: list[m.Command] = []
    for _ in range(100):
        if not driver.figures["prefix_wishes"]:
            return commands
        commands += driver.obey(driver.wait(0.05))
    raise AssertionError("wishes never end")


# --- time to live -----------------------------------------------------------------------------------------------------


def test_what_begins_with_a_prefix_expires_by_its_time_to_live() -> None:
    driver = make(dram=1000)
    mine, other = text(1, 12, SYSTEM), text(2, 8)
    live(driver, prefix_of(SYSTEM), 60.0)
    driver.store(mine)
    driver.store(other)
    driver.wait(59.0)
    assert expired(driver) == set()
    driver.wait(2.0)
    assert expired(driver) == set(names(SYSTEM, mine[:8], mine))
    driver.wait(driver.scheduler.config.session_ttl_s)
    assert expired(driver) == set(driver.scheduler.board.catalog.chunks), "the others live as everybody"


def test_use_begins_the_time_anew() -> None:
    driver = make(dram=1000, slots=2)
    live(driver, prefix_of(SYSTEM), 60.0)
    driver.store(text(1, 12, SYSTEM))
    driver.wait(50.0)
    driver.submit("a/1", text(1, 14, SYSTEM))
    driver.wait(50.0)
    assert expired(driver) == set()
    driver.wait(11.0)
    assert len(expired(driver)) == 3
    driver.submit("b/1", text(7, 8, SYSTEM))
    assert key_of(SYSTEM) not in expired(driver), "it was used again"


def test_the_longest_prefix_counts() -> None:
    driver = make(dram=1000)
    mine, other = text(1, 12, SYSTEM), text(2, 12, SYSTEM)
    live(driver, ALICE, 1000.0)
    live(driver, prefix_of(SYSTEM), 100.0)
    live(driver, prefix_of(mine[:8]), 10.0)
    store(driver, ALICE, mine, other, B)
    driver.wait(20.0)
    assert expired(driver) == set(names(mine[:8], mine))
    driver.wait(100.0)
    assert expired(driver) == set(names(mine[:8], mine, SYSTEM, other[:8], other))
    driver.wait(1000.0)
    assert len(expired(driver)) == 6


def test_tenants_have_times_of_their_own() -> None:
    driver = make(dram=1000)
    live(driver, ALICE, 10.0)
    live(driver, BOB, 1e6)
    store(driver, ALICE, text(1, 12))
    store(driver, BOB, text(2, 12))
    driver.store(text(3, 4))
    driver.wait(20.0)
    assert expired(driver) == set(names(text(1, 4), text(1, 8), text(1, 12)))
    driver.wait(4000.0)
    assert expired(driver) == {*names(text(1, 4), text(1, 8), text(1, 12)), key_of(text(3, 4))}


def test_what_is_stored_already_lives_by_it_too() -> None:
    driver = make(dram=1000)
    old, new = text(1, 8), text(2, 8)
    store(driver, ALICE, old)
    driver.wait(100.0)
    store(driver, ALICE, new)
    live(driver, ALICE, 60.0)
    assert expired(driver) == set(names(old[:4], old)), "its time is up already"
    driver.wait(61.0)
    assert expired(driver) == set(names(old[:4], old, new[:4], new))


def test_a_time_to_live_is_replaced_and_taken_back() -> None:
    driver = make(dram=1000)
    store(driver, ALICE, A)
    live(driver, ALICE, 60.0)
    live(driver, ALICE, 600.0)
    driver.wait(100.0)
    assert expired(driver) == set()
    assert driver.figures["prefixes_with_lifetimes"] == 1
    live(driver, ALICE, None)
    live(driver, BOB, None)
    driver.wait(700.0)
    assert expired(driver) == set()
    assert driver.figures["prefixes_with_lifetimes"] == 0


def test_expired_chunks_go_first() -> None:
    driver = make()
    live(driver, ALICE, 5.0)
    fill(driver, A, B)
    store(driver, ALICE, D)
    fill(driver, E)
    driver.wait(6.0)
    assert gone(driver.obey(driver.offer(chunks_of(F)))) == names(D, A)


def test_a_prefix_that_ends_inside_a_chunk_counts_for_the_whole_chunk() -> None:
    driver = make(dram=1000)
    mine = text(1, 8, text(9, 2))
    live(driver, prefix_of(mine[:2]), 10.0)
    driver.obey(driver.offer(chunks_of(mine, cuts=[2])))
    driver.wait(11.0)
    assert expired(driver) == set(names(mine[:4], mine))


def test_a_mark_that_becomes_known_later_counts_from_then_on() -> None:
    driver = make(dram=1000)
    mine = text(1, 8, text(9, 2))
    live(driver, prefix_of(mine[:2]), 10.0)
    driver.store(mine)
    driver.offer(chunks_of(mine, cuts=[2])[:1])
    settle(driver)
    driver.wait(11.0)
    assert expired(driver) == set(names(mine[:4], mine))


def test_a_node_that_comes_back_brings_chunks_with_their_time_to_live() -> None:
    driver = make(dram=1000)
    driver.feed(m.NodeLost("n1"))
    live(driver, ALICE, 10.0)
    inventory = [(info, Tier.DRAM) for info in reversed(of_tenant(ALICE, text(1, 12)))]
    driver.join(dram=1000, inventory=inventory)
    driver.wait(11.0)
    assert len(expired(driver)) == 3


def test_only_so_many_prefixes_have_times_of_their_own() -> None:
    driver = make(dram=1000, ghosts=2)
    store(driver, ALICE, A)
    for tenant in (ALICE, BOB, Mark(0, "carol")):
        live(driver, tenant, 10.0)
    assert list(driver.scheduler.board.catalog.lifetimes.by_prefix) == ["bob", "carol"]
    driver.wait(20.0)
    assert expired(driver) == set(), "alice's, the oldest, was given up"


def test_expiring_looks_at_what_is_due_and_at_nothing_else() -> None:
    """A thousand tenants of whom one is due: one is looked at."""
    lifetimes = Lifetimes(3600.0, 10_000)
    for number in range(1000):
        lifetimes.give(f"t{number}", 100.0 + number)
        lifetimes.note_use(lifetimes.find((), f"t{number}", None), f"k{number}", 0.0)
    assert list(lifetimes.overdue(100.5)) == ["k0"]
    assert len(lifetimes._due) == 999
    assert list(lifetimes.overdue(100.5)) == []


# --- pinned -----------------------------------------------------------------------------------------------------------


def test_all_of_a_tenant_is_pinned_until_time_is_up() -> None:
    driver = make()
    store(driver, ALICE, A, B)
    store(driver, BOB, D, E)
    driver.feed(m.PrefixPinned(prefix=ALICE, seconds=30.0))
    driver.now += 1.0
    assert gone(driver.obey(driver.offer(chunks_of(F)))) == names(D, E)
    assert driver.figures["leases"] == 1
    driver.wait(30.0)
    settle(driver)
    assert (driver.figures["leases"], driver.figures["sessions_pinned"]) == (0, 0)


def test_a_pin_of_a_prefix_is_replaced_and_taken_away() -> None:
    driver = make(dram=1000)
    store(driver, ALICE, A)
    driver.feed(m.PrefixPinned(prefix=ALICE, seconds=30.0))
    store(driver, ALICE, text(2, 12))
    driver.feed(m.PrefixPinned(prefix=ALICE, seconds=300.0))
    settle(driver)
    (lease,) = driver.scheduler.board.catalog.leases.by_owner.values()
    assert len(lease.held) == 4
    driver.wait(100.0)
    assert driver.figures["leases"] == 1, "the first one's time does not count any more"
    driver.feed(m.PrefixPinned(prefix=ALICE, seconds=0.0))
    settle(driver)
    assert driver.figures["leases"] == 0


def test_a_pinned_prefix_can_be_deleted() -> None:
    driver = make(dram=1000)
    store(driver, ALICE, text(1, 12))
    driver.feed(m.PrefixPinned(prefix=ALICE, seconds=1e6))
    driver.obey(driver.feed(m.PrefixDeleted(prefix=ALICE, seconds=60.0)))
    settle(driver)
    assert driver.stored() == set()
    assert driver.figures["leases"] == 0


# --- over, deleted ----------------------------------------------------------------------------------------------------


def test_what_is_over_goes_first_until_it_is_used() -> None:
    driver = make()
    store(driver, BOB, A, B)
    store(driver, ALICE, D, E)
    driver.feed(m.PrefixExpired(prefix=ALICE))
    driver.submit("d/1", text(3, 6))
    assert gone(driver.obey(driver.offer(chunks_of(F)))) == names(E, A)


def test_deleting_a_tenant_leaves_nothing_of_it_and_all_of_others() -> None:
    driver = make(dram=4000, ssd=4000, write_through=True)
    mine = [text(number, 12) for number in range(20, 30)]
    store(driver, ALICE, *mine)
    store(driver, BOB, B)
    commands = driver.feed(m.PrefixDeleted(prefix=ALICE, seconds=60.0))
    assert the(commands, m.Forget).marks == ("alice",)
    driver.obey(commands)
    settle(driver)
    assert driver.stored() == driver.stored(Tier.SSD) == {key_of(B)}
    plan = the(driver.submit("a/2", mine[0]), m.Dispatch).plan
    assert plan.recomputed == ((Cause.DELETED, 12),)
    late = of_tenant(ALICE, text(30, 8))
    assert the(driver.offer(late), m.Decline).chunks == tuple(info.key for info in late), "what still ran"
    driver.wait(61.0)
    assert only(driver.offer(late), m.Save), "the tenant is not banned"


def test_what_a_node_brings_of_a_tenant_that_was_deleted_once_is_not_lost() -> None:
    """New texts of the tenant have its root, too."""
    driver = make(dram=1000)
    store(driver, ALICE, A)
    driver.obey(driver.feed(m.PrefixDeleted(prefix=ALICE, seconds=1.0)))
    driver.wait(2.0)
    driver.feed(m.NodeLost("n1"))
    driver.join(dram=1000, inventory=[(info, Tier.DRAM) for info in of_tenant(ALICE, B) + of_tenant(ALICE, A)])
    assert driver.stored() == {key_of(B)}


def test_deleting_a_prefix_takes_what_goes_on_from_it() -> None:
    driver = make(dram=1000)
    mine, other = text(1, 12, SYSTEM), text(2, 12)
    driver.store(mine)
    driver.store(other)
    driver.obey(driver.feed(m.PrefixDeleted(prefix=prefix_of(SYSTEM), seconds=60.0)))
    settle(driver)
    assert driver.stored() == set(names(other[:4], other[:8], other))
    assert the(driver.offer(chunks_of(mine)), m.Decline).chunks == tuple(names(SYSTEM, mine[:8], mine))


def test_deleting_a_prefix_takes_its_inside_as_far_as_nobody_else_goes_on_from_there() -> None:
    driver = make(dram=2000)
    prefix = text(1, 14)
    mine, fork = text(2, 24, prefix), text(3, 12, prefix[:8])
    driver.obey(driver.offer(chunks_of(mine, cuts=[14])))
    driver.store(fork)
    driver.obey(driver.feed(m.PrefixDeleted(prefix=prefix_of(prefix), seconds=60.0)))
    settle(driver)
    assert driver.stored() == set(names(prefix[:4], prefix[:8], fork))


def test_offers_of_a_deleted_tenant_that_wait_for_bytes_are_declined() -> None:
    driver = make(dram=80)
    fill(driver, A)
    driver.feed(m.PrefixPinned(prefix=prefix_of(A), seconds=60.0))
    save = the(driver.offer(chunks_of(B), session="b"), m.Save)
    assert driver.offer(of_tenant(ALICE, text(3, 8)), session="d") == []
    commands = driver.feed(m.PrefixDeleted(prefix=ALICE, seconds=60.0))
    assert {key for decline in only(commands, m.Decline) for key in decline.chunks} == set(
        names(text(3, 4), text(3, 8))
    )
    driver.feed(answer(save))  # type: ignore[arg-type]


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wish",
    [
        m.PrefixLifetimeSet(prefix=ALICE, seconds=5.0),
        m.PrefixPinned(prefix=ALICE, seconds=100.0),
        m.PrefixExpired(prefix=ALICE),
        m.PrefixDeleted(prefix=ALICE, seconds=60.0),
    ],
)
def test_an_event_takes_a_slice_however_much_there_is(wish: m.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    num_chunks = 10 * SLICE
    driver = make(dram=100_000, high_watermark=1.0)
    tokens = text(1, 4 * num_chunks)
    driver.obey(driver.offer(of_tenant(ALICE, tokens)))
    touched: list[Chunk] = []
    changed = driver.scheduler.board.catalog.watch
    monkeypatch.setattr(driver.scheduler.board.catalog, "watch", lambda chunk: (touched.append(chunk), changed(chunk)))
    commands = driver.feed(wish)
    assert len({chunk.key for chunk in touched}) <= 3 * SLICE
    assert len(only(commands, m.Drop)) <= SLICE
    driver.obey(commands)
    settle(driver)
    assert not driver.figures["prefix_wishes"]


def test_deleting_waits_for_nodes_that_are_behind() -> None:
    driver = make(dram=1_000_000, high_watermark=1.0)
    driver.obey(driver.offer(of_tenant(ALICE, text(1, 4 * (MAX_LEAVING + 600)))[: MAX_LEAVING + 600]))
    drops = driver.feed(m.PrefixDeleted(prefix=ALICE, seconds=60.0))
    for _ in range(20):
        drops += driver.wait(0.05)
    assert driver.figures["prefix_wishes"] == 2
    driver.obey(drops)
    settle(driver)
    assert driver.stored() == set()
