"""Nodes and replicas: what they can do and what runs on them. Knows no chunks and no queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from policies.messages import NodeId, NodeJoined, ReplicaId, ReplicaReady, Tier, TierSpec, TurnId
from policies.ordered import SortedKeys
from policies.places import STORE_TIERS, Place, place_of

Load = tuple[float, float, ReplicaId]
"""Shares of the slots and of the tokens in use; the lower one is less loaded."""


@dataclass(slots=True, eq=False)
class Replica:
    """A replica and the tokens reserved by each turn on it.

    `stale` holds turns that were cancelled or replaced while they were there: their slots stay taken until the replica
    says so, or for as long as a command may take.
    """

    spec: ReplicaReady
    changed: Callable[[Replica], None]  # hears of every change of `load` and `is_open`
    running: dict[TurnId, int] = field(default_factory=dict)
    stale: dict[TurnId, int] = field(default_factory=dict)
    stale_attempts: dict[TurnId, int] = field(default_factory=dict)
    queued: dict[TurnId, int] = field(default_factory=dict)  # dispatched and not started: tokens to compute
    num_tokens: int = 0
    num_queued_tokens: int = 0
    paused: bool = False  # a dispatch failed a moment ago
    closing: bool = False  # takes no further turns
    listed_as: Load | None = None  # how the fleet knows it; None: it is not open

    @property
    def num_turns(self) -> int:
        return len(self.running) + len(self.stale)

    @property
    def is_open(self) -> bool:
        return not self.paused and not self.closing and self.num_turns < self.spec.max_running_turns

    @property
    def load(self) -> Load:
        spec = self.spec
        turns = self.num_turns / max(1, spec.max_running_turns)
        return (turns, self.num_tokens / max(1, spec.max_running_tokens), spec.replica_id)

    def pause(self, is_paused: bool) -> None:
        self.paused = is_paused
        self.changed(self)

    def close(self) -> None:
        self.closing = True
        self.changed(self)

    def take(self, turn_id: TurnId, num_tokens: int, num_uncached_tokens: int) -> None:
        self.running[turn_id] = num_tokens
        self.queued[turn_id] = num_uncached_tokens
        self.num_tokens += num_tokens
        self.num_queued_tokens += num_uncached_tokens
        self.changed(self)

    def start(self, turn_id: TurnId) -> None:
        self.num_queued_tokens -= self.queued.pop(turn_id, 0)

    def release(self, turn_id: TurnId) -> None:
        """The turn's slot and tokens are free."""
        self.start(turn_id)
        self.num_tokens -= self.running.pop(turn_id)
        self.changed(self)

    def make_stale(self, turn_id: TurnId, attempt: int) -> None:
        """This attempt of the turn is not wanted any more, but its slot is still taken."""
        self.start(turn_id)
        self.stale[turn_id] = self.running.pop(turn_id)
        self.stale_attempts[turn_id] = attempt
        self.changed(self)

    def release_stale(self, turn_id: TurnId, attempt: int | None) -> bool:
        """Free the slot of this attempt (None: of any); False when it holds none."""
        if turn_id not in self.stale or attempt not in (None, self.stale_attempts[turn_id]):
            return False
        self.num_tokens -= self.stale.pop(turn_id)
        del self.stale_attempts[turn_id]
        self.changed(self)
        return True


@dataclass(slots=True, eq=False)
class Node:
    """A node's places, fastest first."""

    node_id: NodeId
    tiers: dict[Tier, TierSpec]
    places: tuple[Place, ...]
    dram: Place
    """Where its DRAM is, if it has any."""

    def below(self, tier: Tier) -> Place | None:
        """The next lower tier that this node has."""
        lower = STORE_TIERS[STORE_TIERS.index(tier) + 1 :]
        return next((place for place in self.places if place.tier in lower), None)


class Fleet:
    """The nodes that joined and the replicas that are ready."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self.replicas: dict[ReplicaId, Replica] = {}
        self.open: SortedKeys[Load] = SortedKeys()  # the replicas that can take a turn, least loaded first
        self.on_node: dict[NodeId, dict[ReplicaId, Replica]] = {}
        self.hosts: Counter[NodeId] = Counter()  # nodes and their numbers of replicas; without closing ones
        self.largest_tokens = 0  # the biggest replica's capacity; without closing ones
        self.dram_budget_bytes = 0
        self.ssd_budget_bytes = 0

    def add_node(self, event: NodeJoined) -> Node:
        tiers = {spec.tier: spec for spec in event.tiers if spec.tier in STORE_TIERS}
        places = tuple(place_of(event.node_id, tier) for tier in STORE_TIERS if tier in tiers)
        node = self.nodes[event.node_id] = Node(event.node_id, tiers, places, Place(event.node_id, Tier.DRAM))
        self._sum_budgets()
        return node

    def remove_node(self, node_id: NodeId) -> None:
        self.nodes.pop(node_id, None)
        self._sum_budgets()

    def add_replica(self, spec: ReplicaReady) -> Replica:
        replica = self.replicas[spec.replica_id] = Replica(spec, self._relist)
        self.on_node.setdefault(spec.node_id, {})[spec.replica_id] = replica
        self._relist(replica)
        self._count_replicas()
        return replica

    def remove_replica(self, replica_id: ReplicaId) -> None:
        replica = self.replicas.pop(replica_id, None)
        if replica is None:
            return
        if replica.listed_as is not None:
            self.open.discard(replica.listed_as)
        replica.changed = _nobody  # timers may still know it
        neighbours = self.on_node[replica.spec.node_id]
        del neighbours[replica_id]
        if not neighbours:
            del self.on_node[replica.spec.node_id]
        self._count_replicas()

    def close_replica(self, replica_id: ReplicaId) -> None:
        self.replicas[replica_id].close()
        self._count_replicas()

    def replicas_on(self, node_id: NodeId) -> list[ReplicaId]:
        return list(self.on_node.get(node_id, ()))

    def open_replicas(self) -> Iterator[Replica]:
        """Those that can take a turn, least loaded first."""
        return (self.replicas[replica_id] for *_, replica_id in self.open)

    def places_of(self, node_id: NodeId) -> tuple[Place, ...]:
        node = self.nodes.get(node_id)
        return node.places if node else ()

    def has_below(self, place: Place) -> bool:
        """Whether what lies there can be moved to a lower tier of the same node."""
        node = self.nodes.get(place.node_id)
        return node is not None and node.below(place.tier) is not None

    def has_room(self, replica: Replica, num_tokens: int) -> bool:
        """Whether the replica can take a turn of so many tokens; one bigger than every replica runs alone."""
        if not replica.is_open:
            return False
        if replica.num_tokens + num_tokens <= replica.spec.max_running_tokens:
            return True
        return replica.num_turns == 0 and num_tokens > self.largest_tokens

    def nodes_with(self, place: Place) -> list[Node]:
        """The nodes that have this place: one, or for the shared one all that have the tier."""
        if place.tier is Tier.OBJECT:
            return [node for node in self.nodes.values() if place in node.places]
        node = self.nodes.get(place.node_id)
        return [node] if node is not None else []

    def carrier_of(self, place: Place) -> NodeId | None:
        """A node that can act on this place: itself, or for the shared one any node that has the tier."""
        if place.tier is not Tier.OBJECT:
            return place.node_id if place.node_id in self.nodes else None
        return next((node.node_id for node in self.nodes.values() if place in node.places), None)

    def _relist(self, replica: Replica) -> None:
        load = replica.load if replica.is_open else None
        if load == replica.listed_as:
            return
        if replica.listed_as is not None:
            self.open.discard(replica.listed_as)
        if load is not None:
            self.open.add(load)
        replica.listed_as = load

    def _count_replicas(self) -> None:
        specs = [replica.spec for replica in self.replicas.values() if not replica.closing]
        self.hosts = Counter(spec.node_id for spec in specs)
        self.largest_tokens = max((spec.max_running_tokens for spec in specs), default=0)

    def _sum_budgets(self) -> None:
        def total(tier: Tier) -> int:
            return sum(node.tiers[tier].budget_bytes for node in self.nodes.values() if tier in node.tiers)

        self.dram_budget_bytes, self.ssd_budget_bytes = total(Tier.DRAM), total(Tier.SSD)


def _nobody(_replica: Replica) -> None:
    """Hears of changes of a replica that is gone."""
