"""A front process's way to the cluster's actors, which may be replaced while it runs (a restart, another scale)."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.shard import ModelInfo
from cluster.client import Client
from policies.inspection import WaitingView
from storage.histories import Record

log = logging.getLogger(__name__)

ASK_LIMIT_S = 5.0
OUTDATED = "another model is served now, and this process is about to end: try again"


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """Who is there. Travels between processes; handles do not keep actors alive."""

    bring_up: str
    """Another one: everything was started anew."""
    model: ModelInfo
    model_name: str
    scheduler: Any
    history: Any
    stores: dict[str, Any]
    replicas: dict[str, Any]
    slots_per_replica: int


@dataclass
class Connection:
    """Asks the actors. What one of them cannot answer in time is missing from the answer."""

    state: ClusterState
    max_waiting_turns: int | None = None
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.state.scheduler, self.state.model, self.max_waiting_turns, may_move=True)
        self.shelf = HistoryShelf(self)
        self.is_outdated = False
        """Another model is served now: this process's tokens mean nothing to it."""

    def adopt(self, state: ClusterState) -> None:
        """From now on these are the actors, if they have the same model."""
        self.is_outdated = state.model.root != self.model.root
        if self.is_outdated:
            self.client.give_up(OUTDATED)
            return
        if state.bring_up != self.state.bring_up:
            self.client.move(state.scheduler, state.model)
        self.state = state

    @property
    def model(self) -> ModelInfo:
        return self.state.model

    @property
    def model_name(self) -> str:
        return self.state.model_name

    @property
    def num_slots(self) -> int:
        """Turns that run at a time."""
        return len(self.state.replicas) * self.state.slots_per_replica

    async def scheduler_stats(self) -> dict[str, Any]:
        """Empty while it restarts."""
        return await _ask(self.state.scheduler.snapshot.remote(), {})

    async def queue_view(self, limit: int) -> list[WaitingView]:
        return await _ask(self.state.scheduler.queue_view.remote(limit), [])

    async def store_stats(self) -> list[dict[str, Any]]:
        return await _ask_all([store.stats.remote() for store in self.state.stores.values()])

    async def replica_stats(self) -> list[dict[str, Any]]:
        return await _ask_all([replica.stats.remote() for replica in self.state.replicas.values()])

    async def kept(self, keys: list[str]) -> set[str]:
        """Which of these chunks some replica has in HBM."""
        found = await _ask_all([replica.kept.remote(keys) for replica in self.state.replicas.values()])
        return {key for keys in found for key in keys}


class HistoryShelf:
    """The histories' actor as a shelf. Without it conversations are not recognised, and answered all the same."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, keys: list[str], limit: int | None = None) -> list[Record]:
        return await _ask(self._connection.state.history.get.remote(keys, limit), [])

    async def put(self, records: list[Record], since: float) -> None:
        """RayError or TimeoutError when they are not kept."""
        await asyncio.wait_for(_wrap(self._connection.state.history.put.remote(records, since)), ASK_LIMIT_S)

    async def delete(self, owner: str) -> int:
        count: int = await self._connection.state.history.delete.remote(owner)
        return count


async def _wrap(ref: Any) -> Any:
    return await ref


async def _ask(ref: Any, otherwise: Any) -> Any:
    try:
        return await asyncio.wait_for(_wrap(ref), ASK_LIMIT_S)
    except (RayError, TimeoutError) as error:
        log.warning("an actor did not answer: %s", error)
        return otherwise


async def _ask_all(refs: list[Any]) -> list[Any]:
    answers = await asyncio.gather(*(_ask(ref, None) for ref in refs))
    return [answer for answer in answers if answer is not None]
