"""What must hold between any two events: every index compared with every other. For tests; it walks over everything."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING

from policies.administration import Administrator
from policies.catalog import INCOMING, Catalog, Copy, CopyState
from policies.dispatching import Dispatcher
from policies.fleet import Fleet
from policies.messages import ChunkKey, TurnId
from policies.places import Place
from policies.queue import Order, WaitingQueue, needed_marks
from policies.turns import TurnState

if TYPE_CHECKING:
    from policies.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """AssertionError with the first contradiction found."""
    board = scheduler.board
    check_bytes(board.catalog)
    check_copies(board.catalog)
    check_marks(board.catalog)
    check_lifetimes(scheduler)
    check_families(board.catalog)
    check_leases(board.catalog, scheduler.dispatcher, scheduler.administrator)
    check_candidates(scheduler)
    check_queue(board.queue, scheduler.dispatcher, scheduler.administrator)
    check_doomed(scheduler)
    check_replicas(board.fleet, scheduler.dispatcher)
    check_offers(scheduler)


def check_bytes(catalog: Catalog) -> None:
    """Accounts are the sums of their copies and never above their ceilings."""
    used: Counter[Place] = Counter()
    reserved: Counter[Place] = Counter()
    leaving: Counter[Place] = Counter()
    fetching: Counter[Place] = Counter()
    incoming: Counter[tuple[str, CopyState]] = Counter()
    for chunk in catalog.chunks.values():
        for place, copy in chunk.copies.items():
            (reserved if copy.state in INCOMING else used)[place] += copy.num_bytes
            if copy.state is CopyState.DROPPING or copy.leaving:
                leaving[place] += copy.num_bytes
            fetching[place] += copy.state is CopyState.FETCHING
            if copy.state in INCOMING:
                incoming[place.node_id, copy.state] += 1
    counts = {(node_id, state): n for node_id, states in catalog.incoming.items() for state, n in states.items()}
    assert counts == dict(incoming), "copies on their way are miscounted"
    for place, account in catalog.accounts.items():
        ours = (account.used_bytes, account.reserved_bytes, account.leaving_bytes, account.num_fetching)
        theirs = (used[place], reserved[place], leaving[place], fetching[place])
        assert ours == theirs, f"account of {place}: {ours}, its copies: {theirs}"
        assert account.filled_bytes <= account.ceiling_bytes, f"{place} is over its budget"
        assert account.ceiling_bytes >= account.budget_bytes
    assert {*used, *reserved} <= catalog.accounts.keys(), "copies in a place that has no account"


def check_copies(catalog: Catalog) -> None:
    readers: Counter[int] = Counter()
    for chunk in catalog.chunks.values():
        assert chunk.copies, f"chunk {chunk.key} has no copy"
        for place, copy in chunk.copies.items():
            assert copy.place == place
            assert catalog.at[place][chunk.key] is chunk
            assert not copy.leaving or copy.state is CopyState.RESIDENT
            assert copy.state is CopyState.RESIDENT or not copy.holders, "only resident copies are leased"
            if copy.state in (CopyState.FETCHING, CopyState.DEMOTING):
                assert copy.source is not None
                readers[id(copy.source)] += 1
            else:
                assert copy.source is None
    for chunk in catalog.chunks.values():
        for copy in chunk.copies.values():
            assert copy.num_readers == readers[id(copy)], f"readers of {chunk.key} in {copy.place}"
    for place, chunks in catalog.at.items():
        assert all(place in chunk.copies for chunk in chunks.values())


def check_marks(catalog: Catalog) -> None:
    inside: defaultdict[ChunkKey, set[ChunkKey]] = defaultdict(set)
    for key, chunk in catalog.chunks.items():
        assert chunk.key == key
        assert chunk.marks[key] == chunk.end
        for mark, end in chunk.marks.items():
            assert chunk.start < end <= chunk.end
            if chunk.is_doomed:
                continue
            assert mark not in catalog.ghosts, f"mark {mark} is stored and a ghost"
            if mark != key:
                inside[mark].add(key)
    assert {mark: set(keys) for mark, keys in catalog.inside.items()} == dict(inside)
    assert catalog.num_tokens == sum(chunk.end - chunk.start for chunk in catalog.chunks.values())
    assert catalog.num_bytes == sum(chunk.num_bytes for chunk in catalog.chunks.values())


def check_lifetimes(scheduler: Scheduler) -> None:
    """Every chunk that has not expired waits for that in its own time to live, and what applies to it is that."""
    catalog, is_settled = scheduler.board.catalog, not scheduler.steward.wishes
    for key, chunk in catalog.chunks.items():
        assert (key in chunk.lifetime.unused) == (not chunk.expired)
        assert chunk.lifetime.is_watched or not chunk.lifetime.unused
        above = catalog.chunks.get(chunk.parent or "")
        if is_settled and above is not None and not (chunk.is_doomed or above.is_doomed):
            found = catalog.lifetimes.find(chunk.marks, chunk.parent, above.lifetime)
            assert chunk.lifetime is found, f"{key} lives by another time than it should"
    kept = sum(len(lifetime.unused) for lifetime in {chunk.lifetime for chunk in catalog.chunks.values()})
    assert kept == sum(not chunk.expired for chunk in catalog.chunks.values())


def check_families(catalog: Catalog) -> None:
    """Parents know their children, and outlive them unless they were lost."""
    children: defaultdict[ChunkKey, set[ChunkKey]] = defaultdict(set)
    for chunk in catalog.chunks.values():
        if chunk.parent is not None:
            children[chunk.parent].add(chunk.key)
    assert {key: set(keys) for key, keys in catalog.children.items()} == dict(children)
    live: Counter[ChunkKey] = Counter()
    staying: defaultdict[ChunkKey, Counter[Place]] = defaultdict(Counter)
    for chunk in catalog.chunks.values():
        if chunk.parent is None or chunk.start == 0:
            continue
        for copy in chunk.copies.values():
            live[chunk.parent] += copy.is_live
            if copy.is_staying:
                staying[chunk.parent][copy.place] += 1
    assert {key for key, count in live.items() if count} == catalog.families.keys()
    for key, family in catalog.families.items():
        assert family.num_live == live[key]
        assert family.staying == dict(staying[key])
        parent = catalog.chunks.get(key)
        is_orphan = parent is None or not parent.is_live
        assert not is_orphan or key in catalog.bereaved, f"{key} was given up before its children"


def check_leases(catalog: Catalog, dispatcher: Dispatcher, administrator: Administrator) -> None:
    holders: defaultdict[int, set[TurnId]] = defaultdict(set)
    for owner, lease in catalog.leases.by_owner.items():
        record = dispatcher.turns.get(owner)
        if owner in administrator.pins:
            assert lease.deadline == administrator.pins[owner], f"{owner} is to end at another time"
            assert not any(chunk.is_doomed for chunk in lease.held.values()), f"{owner} keeps what was deleted"
        else:
            assert record is not None, f"{owner} holds a lease and is not known"
            assert record.state is TurnState.DISPATCHED, f"{owner} holds a lease and is {record.state}"
        assert lease.deadline > 0.0 or lease.deadline == lease.deadline
        assert lease.held, f"the lease of {owner} holds nothing"
        for copy, chunk in lease.held.items():
            assert catalog.chunks.get(chunk.key) is chunk
            assert chunk.copies.get(copy.place) is copy
            holders[id(copy)].add(owner)
    for chunk in catalog.chunks.values():
        for copy in chunk.copies.values():
            assert copy.holders == holders[id(copy)], f"leases on {chunk.key} in {copy.place}"


def check_candidates(scheduler: Scheduler) -> None:
    """Next uses and candidacies are what they would be if they were found anew."""
    catalog, candidates = scheduler.board.catalog, scheduler.board.candidates
    ordered: defaultdict[Place, set[ChunkKey]] = defaultdict(set)
    expired: defaultdict[Place, set[ChunkKey]] = defaultdict(set)
    for chunk in catalog.chunks.values():
        assert chunk.next_use == candidates.find_next_use(chunk), f"next use of {chunk.key}"
        family = catalog.families.get(chunk.key)
        for copy in chunk.copies.values():
            listing = candidates.find_listing(chunk, copy, family)
            assert copy.listed_as == listing, f"{chunk.key} in {copy.place}: {copy.listed_as}, should be {listing}"
            if listing is not None:
                (expired if listing[0] else ordered)[copy.place].add(chunk.key)
                _check_evictable(copy)
    for listed, found in ((candidates.ordered, ordered), (candidates.expired, expired)):
        assert {place: set(keys) for place, keys in listed.items() if keys} == dict(found)


def _check_evictable(copy: Copy) -> None:
    assert copy.state is CopyState.RESIDENT
    assert not copy.holders
    assert not copy.num_readers


def check_doomed(scheduler: Scheduler) -> None:
    """What was deleted is remembered until it is gone, and found by nobody."""
    board = scheduler.board
    doomed = {key for key, chunk in board.catalog.chunks.items() if chunk.is_doomed}
    assert doomed <= board.doomed.keys()
    for key in doomed:
        chunk = board.catalog.chunks[key]
        assert chunk.next_use is None
        assert not chunk.superseded
        assert not any(chunk in board.catalog.carriers(mark) for mark in chunk.marks)
        assert not any(copy.is_idle for copy in chunk.copies.values()), f"{key} was deleted and could go"


def check_queue(queue: WaitingQueue, dispatcher: Dispatcher, administrator: Administrator) -> None:
    waiting = {turn_id: record for turn_id, record in dispatcher.turns.items() if record.is_waiting}
    expected = set(administrator.expected.values())
    assert len(queue) == len(waiting) + len(expected)
    assert not expected & dispatcher.turns.keys()
    last = max((record.order for record in waiting.values()), default=None)
    assert last is None or all(queue.order_of(turn_id) > last for turn_id in expected)
    ready = {record.order for record in waiting.values() if record.state is TurnState.WAITING}
    assert set(dispatcher.ready) == ready
    assert sorted(chain.from_iterable(dispatcher.ready_at.values())) == sorted(ready)
    for home, local in dispatcher.ready_at.items():
        assert all(dispatcher.turns[queue.turn_at(order) or ""].home == home for order in local)
    awaited: defaultdict[ChunkKey, set[TurnId]] = defaultdict(set)
    needs: defaultdict[ChunkKey, list[Order]] = defaultdict(list)
    for turn_id in expected:
        for mark in needed_marks(queue.turn(turn_id)):
            needs[mark].append(queue.order_of(turn_id))
    for turn_id, record in waiting.items():
        assert queue.order_of(turn_id) == record.order
        assert queue.turn_at(record.order) == turn_id
        assert bool(record.awaited) == (record.state is TurnState.FETCHING)
        for key in record.awaited:
            awaited[key].add(turn_id)
        for mark in needed_marks(record.turn):
            needs[mark].append(record.order)
    assert dispatcher.waiting_for == dict(awaited)
    for mark, orders in needs.items():
        assert queue.next_use(mark) == min(orders)


def check_replicas(fleet: Fleet, dispatcher: Dispatcher) -> None:
    placed: defaultdict[str, set[TurnId]] = defaultdict(set)
    for turn_id, record in dispatcher.turns.items():
        if not record.is_waiting:
            assert record.replica_id is not None
            placed[record.replica_id].add(turn_id)
    assert placed.keys() <= fleet.replicas.keys(), "a turn runs on a replica that is not known"
    assert set(fleet.open) == {replica.load for replica in fleet.replicas.values() if replica.is_open}
    for replica_id, replica in fleet.replicas.items():
        assert fleet.on_node[replica.spec.node_id][replica_id] is replica
        assert set(replica.running) == placed[replica_id]
        assert replica.stale.keys() == replica.stale_attempts.keys()
        assert replica.queued.keys() <= replica.running.keys()
        assert replica.num_tokens == sum(replica.running.values()) + sum(replica.stale.values())
        assert replica.num_queued_tokens == sum(replica.queued.values())
        assert replica.num_turns <= replica.spec.max_running_turns
        if replica.num_turns > 1:
            assert replica.num_tokens <= replica.spec.max_running_tokens


def check_offers(scheduler: Scheduler) -> None:
    for node_id, pending in scheduler.saver.pending.items():
        assert len(pending) <= scheduler.config.max_pending_offers
        assert not pending or node_id in scheduler.board.fleet.nodes
        assert all(offer.info.key == key for key, offer in pending.items())
