"""Where a turn runs: the replicas with room for it, what running it there would take, and the policy's choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from policies.board import Board
from policies.catalog import Chunk
from policies.fleet import Replica
from policies.messages import NodeId, ReplicaId, Turn
from policies.placement import Affinity, PlacementPolicy, ReplicaOption
from policies.places import Place
from policies.restore import Link, find_copy


class Placer:
    """Finds a replica for a turn. Changes nothing."""

    def __init__(self, board: Board, policy: PlacementPolicy) -> None:
        self._board, self._policy = board, policy
        self._catalog, self._fleet = board.catalog, board.fleet

    def num_tokens(self, turn: Turn) -> int:
        """What the turn takes of a replica's KV capacity."""
        return turn.num_prompt_tokens + math.ceil(self._board.config.answer_reserve * turn.max_new_tokens)

    def find(self, turn: Turn, links: Sequence[Link], node_id: NodeId | None) -> Replica | None:
        """A replica with room for the turn, whose `links` are in reach; one on `node_id`, if there is one."""
        num_tokens = self.num_tokens(turn)
        replicas = self._with_room(turn, num_tokens, [node_id]) if node_id is not None else []
        last, hinted = self._board.sessions.last_replicas(turn)
        replicas = replicas or self._find_options(turn, num_tokens, links, (last, hinted))
        if not replicas:
            return None
        affinities = {hinted: Affinity.HINTED, last: Affinity.SESSION}
        estimates = {node: self._estimate(turn, links, node) for node in {r.spec.node_id for r in replicas}}
        options = [
            _option(
                replica,
                turn,
                *estimates[replica.spec.node_id],
                affinities.get(replica.spec.replica_id, Affinity.NONE),
            )
            for replica in replicas
        ]
        return self._fleet.replicas[self._ask(turn, options)]

    def _find_options(
        self, turn: Turn, num_tokens: int, links: Sequence[Link], liked: Iterable[ReplicaId | None]
    ) -> list[Replica]:
        """All replicas with room; if the policy needs no more, those where its chunks are, the `liked` ones and the
        least loaded ones."""
        enough = getattr(self._policy, "enough", None)
        nodes = {place.node_id: None for link in links for place in link.chunk.copies} if enough is not None else {}
        replicas = self._with_room(turn, num_tokens, nodes)
        for replica_id in dict.fromkeys(liked) if enough is not None else ():
            replica = self._fleet.replicas.get(replica_id) if replica_id is not None else None
            if replica is not None and replica.spec.node_id not in nodes and self._is_option(replica, turn, num_tokens):
                replicas.append(replica)
        chosen = {replica.spec.replica_id for replica in replicas}
        for replica in self._fleet.open_replicas():
            if enough is not None and len(replicas) >= enough:
                break
            if replica.spec.replica_id not in chosen and self._is_option(replica, turn, num_tokens):
                replicas.append(replica)
        return replicas

    def _with_room(self, turn: Turn, num_tokens: int, node_ids: Iterable[NodeId]) -> list[Replica]:
        found = (replica for node_id in node_ids for replica in self._fleet.on_node.get(node_id, {}).values())
        return [replica for replica in found if self._is_option(replica, turn, num_tokens)]

    def _is_option(self, replica: Replica, turn: Turn, num_tokens: int) -> bool:
        return turn.turn_id not in replica.stale and self._fleet.has_room(replica, num_tokens)

    def _estimate(self, turn: Turn, links: Sequence[Link], node_id: NodeId) -> tuple[int, float]:
        """(tokens of the turn that can be reused on this node, seconds to load them)."""
        num_reused, load_s = 0, 0.0
        places = self._fleet.places_of(node_id)
        for link in links:
            num_reused = link.end
            load_s += self._load_s(link.chunk, places)
        return min(num_reused, turn.num_prompt_tokens - 1), load_s

    def _load_s(self, chunk: Chunk, places: Sequence[Place]) -> float:
        copy = find_copy(chunk, places)
        if copy is not None:
            return copy.num_bytes / self._catalog.accounts[copy.place].bytes_per_s
        if any(place in places for place in chunk.copies):
            return 0.0  # just being written there
        return chunk.num_bytes / self._board.config.network_bytes_per_s

    def _ask(self, turn: Turn, options: Sequence[ReplicaOption]) -> ReplicaId:
        known = {option.replica_id for option in options}
        return self._board.guard.consult(
            self._policy,
            "choose",
            ask=lambda: self._policy.choose(turn, options),
            problem=lambda chosen: None if chosen in known else f"chose {chosen!r}, which was not offered",
            default=lambda: min(options, key=lambda option: (option.num_running_turns, option.replica_id)).replica_id,
        )


def _option(replica: Replica, turn: Turn, num_reused: int, load_s: float, affinity: Affinity) -> ReplicaOption:
    spec = replica.spec
    return ReplicaOption(
        replica_id=spec.replica_id,
        node_id=spec.node_id,
        num_running_turns=replica.num_turns,
        max_running_turns=spec.max_running_turns,
        num_running_tokens=replica.num_tokens,
        max_running_tokens=spec.max_running_tokens,
        num_queued_tokens=replica.num_queued_tokens,
        prefill_tokens_per_s=spec.prefill_tokens_per_s,
        num_reused_tokens=num_reused,
        num_uncached_tokens=turn.num_prompt_tokens - num_reused,
        load_s=load_s,
        affinity=affinity,
    )
