"""The DRAM tier: chunks as objects of Ray's shared-memory object store, and what the node says about that store.

The only file of this room that imports Ray. How the tier is meant to be used (measured on Ray 2.60):

* The caller of an actor method owns what it returns, and what this process puts it owns too. The process that holds
  the RayTier must be that caller; when it dies its objects are gone.
* An object is a list of parts (`storage.parts`); whoever gets one makes it `whole` again.
* Reserve before every export, then adopt what came: bytes are never created before there is room for them.
* The budget stays well below the store's capacity. Above it Ray spills or falls back to disk by itself, and mixed
  object sizes fragment: at 80-90 % there were stalls, at 70 % none.
* Arrays come back read-only and zero-copy, but the memory is shared: `torch.from_numpy` would let one write to it and
  change the chunk for every process. Always copy out. A live view keeps its bytes after delete().
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from storage.account import Account
from storage.format import ChunkReader
from storage.header import Buffer, Bytes, ChunkHeader, CorruptChunk, byte_view
from storage.parts import in_parts, whole
from storage.tier import ChunkMissing, TierError, TierFull, open_chunk

SAFE_SHARE = 0.7
"""Largest share of a node's object store that a tier of mixed object sizes may use without stalls."""

_STATS_TIMEOUT_S = 5.0

_logger = logging.getLogger(__name__)


class RayTier:
    """A ChunkTier over object references, on the node and in the process that made it. Needs an initialised Ray.

    ValueError if the budget exceeds `max_share` of this node's object store. `deadline_s` limits the waiting for an
    object that has to come from elsewhere. References are only handed out by `ref`; box them in a list when passing
    them to a task, or Ray fetches them first.
    """

    def __init__(self, budget_bytes: int, *, deadline_s: float = 30.0, max_share: float = SAFE_SHARE) -> None:
        capacity = ObjectStoreStats().capacity_bytes
        if capacity is not None and budget_bytes > max_share * capacity:
            raise ValueError(
                f"a budget of {budget_bytes} bytes is more than {max_share:.0%} of this node's object store "
                f"({capacity} bytes): lower it, or start Ray with a larger object_store_memory"
            )
        self.budget_bytes = budget_bytes
        self.deadline_s = deadline_s
        self._account = Account(budget_bytes)
        self._refs: dict[str, ray.ObjectRef] = {}

    @property
    def used_bytes(self) -> int:
        return self._account.used_bytes

    def reserve(self, num_bytes: int) -> None:
        """Set bytes aside for an object that will be adopted. TierFull."""
        self._account.reserve(num_bytes)

    def release(self, num_bytes: int) -> None:
        """Give a reservation back: the object did not come."""
        self._account.release(num_bytes)

    def adopt(self, key: str, ref: ray.ObjectRef, num_bytes: int) -> bool:
        """Keep an object that this process owns; takes over `num_bytes` that were reserved before.

        False if the chunk is there already: the reservation is released and the reference not kept.
        """
        with self._account.admitting(key, num_bytes) as is_new:
            if is_new:
                self._refs[key] = ref
            return is_new

    def ref(self, key: str) -> ray.ObjectRef:
        """The object reference of a chunk; whoever holds it keeps the object alive. ChunkMissing."""
        try:
            return self._refs[key]
        except KeyError:
            raise ChunkMissing(f"chunk {key} is not in the object store of this node") from None

    def put(self, key: str, data: Buffer) -> int:
        view = byte_view(data)
        with self._account.adding(key, len(view)) as is_new:
            if is_new:
                self._refs[key] = _put(view)
        return self._account.get(key) or len(view)

    def open(self, key: str) -> ChunkReader:
        return open_chunk(key, self.read(key))

    def read(self, key: str) -> Bytes:
        try:
            return whole(ray.get(self.ref(key), timeout=self.deadline_s))
        except ray.exceptions.GetTimeoutError as error:
            raise TierError(f"chunk {key} did not arrive within {self.deadline_s} s") from error
        except ray.exceptions.RayError as error:  # lost with its owner or node, or never made: it will not come back
            self.delete(key)
            raise ChunkMissing(f"chunk {key} is lost: {error}") from error
        except ValueError as error:
            raise CorruptChunk(f"the object of chunk {key} holds no bytes: {error}") from error

    def delete(self, key: str) -> bool:
        with self._account.removing(key):
            return self._refs.pop(key, None) is not None

    def __contains__(self, key: object) -> bool:
        return key in self._refs

    def num_bytes(self, key: str) -> int:
        size = self._account.get(key)
        if size is None:
            raise ChunkMissing(f"chunk {key} is not in the object store of this node")
        return size

    def keys(self) -> list[str]:
        return self._account.keys()

    def inventory(self) -> Iterator[tuple[ChunkHeader, int]]:
        for key in self.keys():
            try:
                yield self.open(key).header, self.num_bytes(key)
            except CorruptChunk as error:
                _logger.warning("deleting damaged chunk %s: %s", key, error)
                self.delete(key)
            except ChunkMissing:
                continue
            except TierError as error:
                _logger.warning("skipping unreadable chunk %s: %s", key, error)

    def close(self) -> None:
        """Drop all references: the objects are freed unless somebody else holds them."""
        for key in self.keys():
            self.delete(key)


def _put(view: Bytes) -> ray.ObjectRef:
    try:
        return ray.put(in_parts(view))
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise TierFull(f"Ray's object store is full, lower the budget of the DRAM tier: {error}") from error
    except ray.exceptions.RayError as error:
        raise TierError(f"Ray's object store failed: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreUsage:
    """Bytes of one node's object store. Anything but 0 in the last two means that it was too full."""

    used_bytes: int
    fallback_bytes: int
    """In files, because shared memory had no place."""
    spilled_bytes: int
    """Written to disk by Ray itself, in total."""


class ObjectStoreStats:
    """Exact figures of this node's object store, from its raylet.

    Wraps a private interface of Ray once. Where that has changed or does not answer, the figures are None, and the
    tier's own account has to do.
    """

    def __init__(self) -> None:
        self._node = _this_node()
        self._channel: Any = None

    @property
    def capacity_bytes(self) -> int | None:
        """Size of the shared memory of this node's store."""
        memory = self._node.get("Resources", {}).get("object_store_memory")
        return None if memory is None else int(memory)

    def usage(self) -> ObjectStoreUsage | None:
        """The figures now; one call to the raylet, 1-4 ms."""
        try:
            import grpc  # type: ignore[import-untyped]
            from ray.core.generated import node_manager_pb2 as messages
            from ray.core.generated import node_manager_pb2_grpc as services

            request = messages.GetNodeStatsRequest(include_memory_info=False)
        except (ImportError, AttributeError, ValueError) as error:
            _logger.debug("no object store figures from this version of Ray: %s", error)
            return None
        try:
            if self._channel is None:
                self._channel = _connect(self._node)
            raylet = services.NodeManagerServiceStub(self._channel)
            stats = raylet.GetNodeStats(request, timeout=_STATS_TIMEOUT_S).store_stats
            return ObjectStoreUsage(
                used_bytes=stats.object_store_bytes_used,
                fallback_bytes=stats.object_store_bytes_fallback,
                spilled_bytes=stats.spilled_bytes_total,
            )
        except (grpc.RpcError, ImportError, AttributeError, KeyError) as error:
            _logger.debug("no object store figures from the raylet: %s", error)
            return None

    def close(self) -> None:
        """End the connection; the next usage() makes a new one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _this_node() -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    return next((node for node in ray.nodes() if node["NodeID"] == node_id), {})


def _connect(node: dict[str, Any]) -> Any:
    from ray._common.network_utils import build_address
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(build_address(node["NodeManagerAddress"], node["NodeManagerPort"]))
