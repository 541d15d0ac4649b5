"""Looking into a scheduler: what is stored where, who waits for what, figures for metrics. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.catalog import Catalog, CopyState
from policies.fleet import Replica
from policies.messages import ChunkKey, NodeId, SessionId, Tier, TurnId
from policies.places import STORE_TIERS, Account, Place
from policies.restore import Link, find_links, live
from policies.turns import TurnRecord

if TYPE_CHECKING:
    from policies.scheduler import Scheduler


class CopyView(NamedTuple):
    """A copy of a chunk: `state` says whether it is there, coming or going."""

    tier: Tier
    node_id: NodeId
    state: CopyState


class ChunkView(NamedTuple):
    """A chunk and all its copies."""

    key: ChunkKey
    start: int
    end: int
    num_bytes: int
    copies: list[CopyView]


class WaitingView(NamedTuple):
    """A waiting turn. `reusable_tokens` are counted once, by the fastest tier of any node that has them."""

    turn_id: TurnId
    session_id: SessionId
    priority: int
    waiting_s: float
    num_prompt_tokens: int
    reusable_tokens: dict[Tier, int]
    num_fetches: int


def where(catalog: Catalog, marks: Sequence[ChunkKey]) -> list[ChunkView]:
    """The chunks that hold these marks (ascending), also those on their way out."""
    chunks = catalog.cover(marks, lambda mark: catalog.chunks.get(mark) or catalog.representative(mark))
    return [
        ChunkView(
            chunk.key,
            chunk.start,
            chunk.end,
            chunk.num_bytes,
            [CopyView(place.tier, place.node_id, copy.state) for place, copy in chunk.copies.items()],
        )
        for chunk in chunks
    ]


def queue_view(scheduler: Scheduler, limit: int) -> list[WaitingView]:
    """The first `limit` turns that wait, in order, as of the last event."""
    board, turns = scheduler.board, scheduler.dispatcher.turns
    waiting = [turns[turn_id] for turn_id in board.queue.first(limit) if turn_id in turns]
    return [_view(record, board.catalog, board.now) for record in waiting]


def _view(record: TurnRecord, catalog: Catalog, now: float) -> WaitingView:
    turn = record.turn
    links = find_links(turn.prompt, catalog, live) if turn.reuse else []
    tokens: Counter[Tier] = Counter()
    for link in links:
        tier = _fastest_tier(link)
        if tier is not None:
            tokens[tier] += link.end - link.chunk.start
    return WaitingView(
        turn_id=turn.turn_id,
        session_id=turn.session_id,
        priority=turn.priority,
        waiting_s=now - record.submitted_at,
        num_prompt_tokens=turn.num_prompt_tokens,
        reusable_tokens=dict(tokens),
        num_fetches=sum(copy.state is CopyState.FETCHING for link in links for copy in link.chunk.copies.values()),
    )


def _fastest_tier(link: Link) -> Tier | None:
    tiers = [copy.place.tier for copy in link.chunk.copies.values() if copy.state is CopyState.RESIDENT]
    return min(tiers, key=STORE_TIERS.index, default=None)


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """Plain figures. `incoming`: by node, the copies on their way to its tiers by state; empty when nothing moves."""
    board = scheduler.board
    num_waiting = scheduler.num_waiting
    return {
        "turns_waiting": num_waiting,
        "turns_running": len(scheduler.dispatcher.turns) - num_waiting,
        "sessions_expected": len(scheduler.administrator.expected),
        "sessions_pinned": len(scheduler.administrator.pins),
        "prefixes_with_lifetimes": len(board.catalog.lifetimes.by_prefix),
        "prefix_wishes": len(scheduler.steward.wishes),
        "chunks": len(board.catalog.chunks),
        "chunks_deleting": len(board.doomed),
        "ghosts": len(board.catalog.ghosts),
        "leases": len(board.catalog.leases),
        "offers_pending": sum(map(len, scheduler.saver.pending.values())),
        "replicas": len(board.fleet.replicas),
        "nodes": len(board.fleet.nodes),
        "fleet": [_replica_figures(replica) for replica in board.fleet.replicas.values()],
        "incoming": {
            node_id: {state.value: count for state, count in counts.items()}
            for node_id, counts in board.catalog.incoming.items()
        },
        "tiers": {_name(place): _tier_figures(account) for place, account in board.catalog.accounts.items()},
        "counters": dict(board.counters),
        "policy_faults": dict(board.guard.num_faults),
        "policy_fault_texts": board.guard.texts(),
    }


def _name(place: Place) -> str:
    return f"{place.node_id}/{place.tier}"


def _replica_figures(replica: Replica) -> dict[str, Any]:
    spec = replica.spec
    return {
        "replica_id": spec.replica_id,
        "node_id": spec.node_id,
        "running": replica.num_turns,
        "tokens": replica.num_tokens,
        "capacity_turns": spec.max_running_turns,
        "capacity_tokens": spec.max_running_tokens,
        "closing": replica.closing,
    }


def _tier_figures(account: Account) -> dict[str, int]:
    return {
        "budget_bytes": account.budget_bytes,
        "used_bytes": account.used_bytes,
        "reserved_bytes": account.reserved_bytes,
    }
