"""Whole runs of a simulated cluster: what may happen next, what may go wrong, and how it comes to rest."""

from __future__ import annotations

from collections.abc import Callable

from policies import messages as m
from policies.catalog import CopyState
from tests.policies.parts import ReplicaSim, StoreSim
from tests.policies.world import World

_NOTHING_AT_REST = (
    "turns_waiting",
    "turns_running",
    "leases",
    "offers_pending",
    "sessions_expected",
    "sessions_pinned",
    "chunks_deleting",
)
PATIENCE_S = 1000.0
QUIET_S = 200.0  # longer than every duration of the configs in use
LOSABLE = (m.ChunksSaved, m.ChunkFetched, m.ChunkDemoted, m.ChunkDropped, m.CommandFailed, m.TurnStarted, m.ChunksReady)
"""Answers of stores and replicas. What a replica or a client says of a turn's end is not lost unless the replica is."""


def run(world: World, max_talks: int = 8) -> None:
    """Until the choices are used up; then everything calms down, and what must hold then is checked."""
    while not world.choices.is_used_up:
        _step(world, max_talks)
    settle(world)
    check_rest(world)


def _step(world: World, max_talks: int) -> None:
    choices = world.choices
    number = choices.below(16)
    if number < 5 and world.tasks:
        _execute(world)
    elif number < 10 and world.mail:
        _deliver(world)
    elif number < 12 and world.running():
        replica, turn_id = choices.pick(world.running())
        world.mail += world.progress(replica, turn_id)
    elif number < 14 and sum(talk.turn is not None for talk in world.talks) < max_talks:
        world.speak()
    elif number == 14:
        _pass_time(world)
    elif number == 15:
        _surprise(world)


def _execute(world: World) -> None:
    task = world.tasks.pop(world.choices.below(len(world.tasks)))
    if not world.setup.is_reliable and world.choices.once_in(10):
        if isinstance(task.command, m.Dispatch):  # as if its replica had died; if it has, its client asks again
            if world.has_died(task):
                world.mail += world.execute(task)
            else:  # heard at once: nobody else knows that this turn goes nowhere
                world.hear(world.refuse(task.command, "bad luck"))
        elif world.choices.once_in(2):
            world.mail.append(world.refuse(task.command, "bad luck"))
        return  # or lost
    world.mail += world.execute(task)


def _deliver(world: World) -> None:
    event = world.mail.pop(world.choices.below(len(world.mail)))
    if not world.setup.is_reliable and isinstance(event, LOSABLE) and world.choices.once_in(10):
        if world.choices.once_in(2):
            world.hear(event)
            world.mail.append(event)
        return  # or lost
    world.hear(event)


def _pass_time(world: World) -> None:
    """In a reliable world commands and answers take less time than they are given."""
    pause = world.choices.pick((0.1, 1.0, 6.0, 40.0))
    if world.setup.is_reliable and (world.tasks or world.mail or pause > 6.0):
        oldest = min((task.sent for task in world.tasks), default=world.now)
        pause = min(0.1, max(0.0, oldest + 5.0 - world.now))
    world.now += pause
    world.hear(m.Tick())


def _surprise(world: World) -> None:
    waiting = [talk for talk in world.talks if talk.turn is not None]
    surprises: list[Callable[[], None]] = [lambda: None]
    if waiting:
        surprises.append(lambda: world.hang_up(world.choices.pick(waiting)))
    if world.talks:
        deeds = (world.expect, world.pin, world.expire, world.delete, world.steer)
        surprises += [lambda deed=deed: deed(world.choices.pick(world.talks)) for deed in deeds]  # type: ignore[misc]
    replica = world.choices.pick(world.replicas)
    if not world.setup.is_reliable or any(not other.is_closing for other in world.replicas if other is not replica):
        surprises.append(lambda: world.close(replica))
    if not world.setup.is_reliable:
        surprises += [
            lambda: _lose_store(world, world.choices.pick(world.stores)),
            lambda: _restart_store(world, world.choices.pick(world.stores)),
            lambda: _lose_replica(world, world.choices.pick(world.replicas)),
            lambda: _restart_replica(world, world.choices.pick(world.replicas)),
            lambda: _rot(world),
        ]
        if waiting:
            surprises.append(lambda: world.ask_again(world.choices.pick(waiting)))
        if world.talks:
            surprises.append(lambda: _delete_behind_its_back(world, world.choices.pick(world.stores)))
    world.choices.pick(surprises)()


# --- misfortunes ------------------------------------------------------------------------------------------------------


def _lose_store(world: World, store: StoreSim) -> None:
    if store.is_alive:
        store.is_alive, store.life = False, store.life + 1
        store.content[m.Tier.DRAM].clear()
        world.mail.append(m.NodeLost(store.node_id))


def _restart_store(world: World, store: StoreSim) -> None:
    """It comes back with its disk, or it only seemed to be gone and comes back with everything."""
    if not store.is_alive or world.choices.once_in(2):
        store.content[m.Tier.DRAM].clear()
        store.life += 1
    if world.choices.once_in(3) and m.Tier.SSD in store.content:
        store.content[m.Tier.SSD].clear()
    store.is_alive = True
    world.recall(m.NodeLost(store.node_id))
    world.hear(world.joined(store))


def _delete_behind_its_back(world: World, store: StoreSim) -> None:
    """Nobody hears of the store while a conversation is deleted; it comes back with all that it had."""
    if store.is_alive:
        world.hear(m.NodeLost(store.node_id))
        world.delete(world.choices.pick(world.talks))
        store.life += 1
        world.hear(world.joined(store))


def _lose_replica(world: World, replica: ReplicaSim) -> None:
    if replica.is_alive:
        _stop_replica(world, replica)
        replica.is_alive = False
        world.hear(m.ReplicaLost(replica.spec.replica_id))


def _restart_replica(world: World, replica: ReplicaSim) -> None:
    _stop_replica(world, replica)
    replica.is_alive, replica.is_closing = True, False
    world.hear(replica.spec)


def _stop_replica(world: World, replica: ReplicaSim) -> None:
    """Its clients see it die before the scheduler hears of it, or after."""
    world.recall(replica.spec)
    replica.life += 1
    replica.buffer.clear()
    replica.forgotten.clear()
    talks = [job.talk for turn_id, job in replica.jobs.items() if job.is_wanted]
    replica.jobs.clear()
    for talk in talks:
        world.ask_again(talk, is_now=world.choices.once_in(2))


def _rot(world: World) -> None:
    places = [(store, tier) for store in world.stores for tier in store.budgets if store.content[tier]]
    if places:
        store, tier = world.choices.pick(places)
        key = world.choices.pick(list(store.content[tier]))
        del store.content[tier][key]
        if world.choices.once_in(2):
            world.mail.append(m.ChunkLost(node_id=store.node_id, chunk=key, tier=tier, cause=m.Cause.CORRUPT))


# --- rest -------------------------------------------------------------------------------------------------------------


def settle(world: World) -> None:
    """No more misfortune: everything is up, every command is executed, every answer heard, every turn ends."""
    for store in world.stores:
        if not store.is_alive:
            _restart_store(world, store)
    for replica in world.replicas:
        if not replica.is_alive or (replica.is_closing and not world.setup.is_reliable):
            _restart_replica(world, replica)
    _rest(world)
    if not world.setup.is_reliable and world.deletions:  # what nobody knew of is told by an inventory
        for store in world.stores:
            world.hear(world.joined(store))
        _rest(world)


def _rest(world: World) -> None:
    quiet_since, patience = world.now, world.now + PATIENCE_S
    while world.now < quiet_since + QUIET_S:
        _exchange(world)
        running = world.running()
        for replica, turn_id in running:
            if turn_id in replica.jobs:
                world.mail += world.progress(replica, turn_id)
        is_busy = running or world.mail or any(talk.turn is not None for talk in world.talks)
        if is_busy:
            quiet_since = world.now
            assert world.now < patience, "it does not come to rest"
        world.now += 0.5 if is_busy else 5.0
        world.hear(m.Tick())


def _exchange(world: World) -> None:
    """Commands and answers, in order, until nobody has anything to say."""
    for _ in range(5000):
        if world.tasks:
            world.mail += world.execute(world.tasks.pop(0))
        if world.mail:
            world.hear(world.mail.pop(0))
        elif not world.tasks:
            return
    raise AssertionError(f"they talk without end: {world.tasks[:3]}")


def check_rest(world: World) -> None:
    """Every turn ended; nothing is pinned, reserved, offered or under way; a reliable world's catalog is the truth."""
    waiting = [talk.turn.turn_id for talk in world.talks if talk.turn is not None]
    assert not waiting, f"never answered: {waiting}"
    figures = world.scheduler.snapshot()
    for name in _NOTHING_AT_REST:
        assert figures[name] == 0, f"{name}: {figures[name]}"
    assert all(tier["reserved_bytes"] == 0 for tier in figures["tiers"].values())
    catalog = world.scheduler.board.catalog
    states = {copy.state for chunk in catalog.chunks.values() for copy in chunk.copies.values()}
    assert states <= {CopyState.RESIDENT}, states
    assert not world.scheduler.board.failed, "failures are forgiven in time"
    assert not any(replica.stale or replica.queued for replica in world.scheduler.board.fleet.replicas.values())
    assert not figures["incoming"]
    _check_deletions(world)
    if world.setup.is_reliable:
        believed = {(place.node_id, place.tier): set(chunks) for place, chunks in catalog.at.items() if chunks}
        stored = {
            ("shared" if tier is m.Tier.OBJECT else store.node_id, tier): set(content)
            for store in world.stores
            for tier, content in store.content.items()
            if content
        }
        assert believed == stored
        assert not world.refusals, dict(world.refusals)


def _check_deletions(world: World) -> None:
    """No tier of any node holds a chunk that was deleted, as far as its deletion can still be remembered."""
    can_tell = world.setup.is_reliable or world.setup.config.ghosts > 100
    for deletion in world.deletions if can_tell else ():
        for store in world.stores:
            for tier, content in store.content.items():
                found = [key for key, info in content.items() if deletion.covers(info)]
                assert not found, f"{found} of {deletion.session_id} are still in {tier} of {store.node_id}"
