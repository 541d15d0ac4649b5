"""The node store: one actor per node that owns the node's chunks and moves them on the scheduler's command.

Chunks in DRAM are objects of Ray's store, owned by this process because it is this process that asks for them (a
shard's export, another store's export, its own put): they outlive the shard that computed them. It decides nothing:
what to save, raise, copy down or drop comes as a command, and what happened goes back as events. Files and buckets are
touched in a small thread pool, never in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from actors.heartbeat import keep_joined
from policies import messages as m
from storage import keys
from storage.filesystem import open_tier
from storage.format import ChunkHeader, CorruptChunk, read_chunk
from storage.object_store import ObjectStoreStats, RayTier
from storage.parts import in_parts, whole
from storage.tier import ChunkMissing, ChunkTier, TierError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

IO_THREADS = 4
SAMPLE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """What one node store keeps where. A tier without a URL does not exist."""

    dram_bytes: int
    ssd_url: str | None = None
    ssd_bytes: int = 0
    object_url: str | None = None
    object_bytes: int = 0


@dataclass(slots=True)
class Traffic:
    """Bytes moved since start, and the highest fill seen of each tier."""

    saved_bytes: int = 0
    fetched_bytes: dict[str, int] = field(default_factory=dict)
    demoted_bytes: dict[str, int] = field(default_factory=dict)
    failed_commands: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    ray_spilled_bytes: int = 0
    ray_fallback_bytes: int = 0


def chunk_info(header: ChunkHeader, num_bytes: int) -> m.ChunkInfo:
    """What the scheduler is told of a chunk."""
    marks = tuple(m.Mark(end, key) for end, key in header.marks)
    parent = header.parent if header.start else header.root  # the tenant's
    return m.ChunkInfo(
        key=header.key, parent=parent, start=header.start, end=header.end, num_bytes=num_bytes, marks=marks
    )


class NodeStore:
    """Plain class, made where an event loop runs; becomes an async actor, pinned to its node, in cluster/bringup.py.
    Ray may start it anew at any time: it reads its folder's inventory and joins by itself."""

    def __init__(self, node_id: m.NodeId, plan: StorePlan, scheduler: str, heartbeat_s: float) -> None:
        """`scheduler` is the actor's name: handles among its arguments would keep Ray from starting it anew."""
        keys.self_test()
        self.node_id = node_id
        self._scheduler = ray.get_actor(scheduler)
        self._tiers: dict[m.Tier, ChunkTier] = {}
        self._dram = RayTier(plan.dram_bytes)
        self._tiers[m.Tier.DRAM] = self._dram
        if plan.ssd_url:
            self._tiers[m.Tier.SSD] = open_tier(plan.ssd_url, plan.ssd_bytes)
        if plan.object_url:
            self._tiers[m.Tier.OBJECT] = open_tier(plan.object_url, plan.object_bytes)
        self._pool = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="store-io")
        self._traffic = Traffic()
        self._ray_stats = ObjectStoreStats()
        self._heartbeat_s = heartbeat_s
        self._background: list[asyncio.Task[None]] = []
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> None:
        """Returns when the scheduler knows this store and what its tiers hold already."""
        await self._started

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._background = [
            loop.create_task(keep_joined(self._scheduler, self.node_id, self._join, self._heartbeat_s)),
            loop.create_task(self._sample()),
        ]
        await self._join()

    async def _join(self) -> None:
        inventory = await self._io(self._inventory)
        tiers = tuple(m.TierSpec(tier=name, budget_bytes=tier.budget_bytes) for name, tier in self._tiers.items())
        event = m.NodeJoined(node_id=self.node_id, tiers=tiers, inventory=inventory)
        await self._scheduler.join_node.remote(event, ray.get_runtime_context().current_actor)

    def _inventory(self) -> tuple[m.StoredChunk, ...]:
        return tuple(
            m.StoredChunk(info=chunk_info(header, num_bytes), tier=name)
            for name, tier in self._tiers.items()
            for header, num_bytes in tier.inventory()
        )

    # --- the scheduler's commands -------------------------------------------------------------------------------------

    async def run(self, command: m.Command, helper: list[Any]) -> list[m.Event]:
        """Carries out one command; what it could not do comes back as CommandFailed. `helper` boxes an actor handle."""
        try:
            match command:
                case m.Save():
                    return await self._save(command, helper[0])
                case m.Fetch():
                    return await self._fetch(command, helper[0])
                case m.Demote():
                    return await self._demote(command)
                case m.Drop():
                    return await self._drop(command)
                case _:
                    raise TypeError(f"{type(command).__name__} is not a node store's command")
        except (TierError, CorruptChunk, RayError, OSError) as error:
            self._traffic.failed_commands += 1
            log.warning("%s failed: %s", type(command).__name__, error)
            return [*self._lost_copies(command, error), m.CommandFailed(command=command, reason=_reason(error))]

    async def _save(self, command: m.Save, shard: Any) -> list[m.Event]:
        results = await asyncio.gather(
            *(self._save_one(info, shard) for info in command.chunks), return_exceptions=True
        )
        saved = tuple(info.key for info, result in zip(command.chunks, results) if result is None)
        events: list[m.Event] = [m.ChunksSaved(node_id=self.node_id, chunks=saved)] if saved else []
        for info, result in zip(command.chunks, results):
            if result is None:
                continue
            if not isinstance(result, (TierError, RayError, CorruptChunk)):
                raise result
            self._traffic.failed_commands += 1
            failed = m.Save(node_id=command.node_id, replica_id=command.replica_id, chunks=(info,))
            events.append(m.CommandFailed(command=failed, reason=_reason(result)))
        return events

    async def _save_one(self, info: m.ChunkInfo, shard: Any) -> None:
        if shard is None:
            raise ChunkMissing(f"{info.key[:12]}: the replica that offered it is gone")
        if info.key in self._dram:
            await shard.drop_chunks.remote((info.key,))
            return
        self._dram.reserve(info.num_bytes)
        try:
            ref = shard.export_chunk.remote(info.key)
            await ref
        except BaseException:
            self._dram.release(info.num_bytes)
            raise
        self._dram.adopt(info.key, ref, info.num_bytes)
        self._traffic.saved_bytes += info.num_bytes

    async def _fetch(self, command: m.Fetch, peer: Any) -> list[m.Event]:
        if command.chunk not in self._dram:
            num_bytes = await (self._raise_local(command) if peer is None else self._pull(command, peer))
            moved = self._traffic.fetched_bytes
            moved[command.source] = moved.get(command.source, 0) + num_bytes
        return [m.ChunkFetched(node_id=self.node_id, chunk=command.chunk)]

    async def _raise_local(self, command: m.Fetch) -> int:
        return await self._io(self._copy, self._tiers[command.source], self._dram, command.chunk)

    async def _pull(self, command: m.Fetch, peer: Any) -> int:
        """From another node: its store exports the chunk to us; a copy of our own lives on this node."""
        boxed = await peer.export.remote(command.chunk, command.source)
        return await self._io(self._put_pulled, command.chunk, boxed)

    def _put_pulled(self, key: str, boxed: list[Any]) -> int:
        return self._dram.put(key, whole(ray.get(boxed[0])))

    async def _demote(self, command: m.Demote) -> list[m.Event]:
        source, target = self._tiers[self._demoted_from(command.chunk)], self._tiers[command.tier]
        num_bytes = await self._io(self._copy, source, target, command.chunk)
        moved = self._traffic.demoted_bytes
        moved[command.tier] = moved.get(command.tier, 0) + num_bytes
        return [m.ChunkDemoted(node_id=self.node_id, chunk=command.chunk, tier=command.tier, num_bytes=num_bytes)]

    def _demoted_from(self, key: m.ChunkKey) -> m.Tier:
        return m.Tier.DRAM if key in self._dram or m.Tier.SSD not in self._tiers else m.Tier.SSD

    async def _drop(self, command: m.Drop) -> list[m.Event]:
        await self._io(self._tiers[command.tier].delete, command.chunk)
        return [m.ChunkDropped(node_id=self.node_id, chunk=command.chunk, tier=command.tier)]

    @staticmethod
    def _copy(source: ChunkTier, target: ChunkTier, key: str) -> int:
        """Verified on the way: what crosses a tier is what was computed."""
        data = source.read(key)
        read_chunk(data).verify()
        return target.put(key, data)

    def _lost_copies(self, command: m.Command, error: Exception) -> list[m.Event]:
        """A source copy that turned out missing or corrupt is told as well."""
        if not isinstance(error, (ChunkMissing, CorruptChunk)):
            return []
        cause = m.Cause.CORRUPT if isinstance(error, CorruptChunk) else m.Cause.LOST
        match command:
            case m.Fetch():
                return [m.ChunkLost(node_id=command.source_node, chunk=command.chunk, tier=command.source, cause=cause)]
            case m.Demote():
                return [
                    m.ChunkLost(
                        node_id=self.node_id, chunk=command.chunk, tier=self._demoted_from(command.chunk), cause=cause
                    )
                ]
            case _:
                return []

    # --- readers ------------------------------------------------------------------------------------------------------

    async def checkout(self, chunk_keys: list[str]) -> list[Any]:
        """References to the DRAM copies, None where there is none; the scheduler's lease keeps them."""
        return [self._dram.ref(key) if key in self._dram else None for key in chunk_keys]

    async def export(self, key: str, tier: m.Tier) -> list[Any]:
        """For another node's store: a boxed reference to the chunk's bytes."""
        if tier == m.Tier.DRAM:
            return [self._dram.ref(key)]
        data = await self._io(self._tiers[tier].read, key)
        return [ray.put(in_parts(data))]

    # --- state --------------------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        used = {str(name): tier.used_bytes for name, tier in self._tiers.items()}
        budgets = {str(name): tier.budget_bytes for name, tier in self._tiers.items()}
        traffic = {name: getattr(self._traffic, name) for name in Traffic.__slots__}
        return {"node_id": self.node_id, "used_bytes": used, "budget_bytes": budgets, **traffic}

    async def _sample(self) -> None:
        while True:
            for name, tier in self._tiers.items():
                peak = self._traffic.peak_bytes
                peak[name] = max(peak.get(name, 0), tier.used_bytes)
            seen = await self._io(self._ray_stats.usage)
            if seen is not None:
                self._traffic.ray_spilled_bytes = max(self._traffic.ray_spilled_bytes, seen.spilled_bytes)
                self._traffic.ray_fallback_bytes = max(self._traffic.ray_fallback_bytes, seen.fallback_bytes)
            await asyncio.sleep(SAMPLE_S)

    async def _io(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _reason(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return "the actor that has the chunk died"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
