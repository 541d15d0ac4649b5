"""A node's store: what its tiers hold, byte by byte, and how long the scheduler's commands take over its links.

Budgets are the store's own: bytes are reserved before they move, and a command that they do not fit is refused with
CommandFailed. It decides nothing. The bucket is one shelf that all nodes share.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from policies import messages as m
from policies.places import SHARED
from policies.simulator.clock import Clock
from policies.simulator.hardware import LinkSpeeds
from policies.simulator.links import Link


@dataclass(slots=True)
class Surroundings:
    """What all parts of a simulated cluster share."""

    clock: Clock
    chance: Random
    failure_share: float = 0.0
    mail: deque[m.Event] = field(default_factory=deque)
    """For the scheduler, in order."""
    traffic: Counter[str] = field(default_factory=Counter)
    """Bytes moved, by kind, and commands refused."""

    def fails(self) -> bool:
        """Whether a command fails by chance."""
        return self.failure_share > 0 and self.chance.random() < self.failure_share

    def refuse(self, command: m.Command, reason: str) -> None:
        self.traffic[f"refused.{type(command).__name__}.{reason}"] += 1
        self.mail.append(m.CommandFailed(command=command, reason=reason))


@dataclass(slots=True)
class Shelf:
    """One tier's chunks and bytes. What is coming counts as if it were there, but cannot be read."""

    budget_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    chunks: dict[m.ChunkKey, int] = field(default_factory=dict)
    coming: dict[m.ChunkKey, int] = field(default_factory=dict)

    def reserve(self, key: m.ChunkKey, num_bytes: int) -> bool:
        """Set bytes aside; False, and nothing changes, when they do not fit or the chunk is on its way already."""
        if self.used_bytes + num_bytes > self.budget_bytes or key in self.coming or key in self.chunks:
            return False
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.coming[key] = num_bytes
        return True

    def arrive(self, key: m.ChunkKey) -> int:
        """What was reserved is there; its bytes."""
        num_bytes = self.chunks[key] = self.coming.pop(key)
        return num_bytes

    def give_up(self, key: m.ChunkKey) -> None:
        """What was reserved does not come."""
        self.used_bytes -= self.coming.pop(key)

    def remove(self, key: m.ChunkKey) -> int:
        """Its bytes; 0 when it is not there."""
        num_bytes = self.chunks.pop(key, 0)
        self.used_bytes -= num_bytes
        return num_bytes


WriteBuffer = dict[m.ChunkKey, m.ChunkInfo]
"""What a replica offers: taken out by a Save, or forgotten by a Decline."""


class NodeStore:
    """See the module's docstring. `peers`: all stores by node, this one too."""

    def __init__(
        self,
        node_id: m.NodeId,
        shelves: Mapping[m.Tier, Shelf],
        speeds: LinkSpeeds,
        surroundings: Surroundings,
        peers: Mapping[m.NodeId, NodeStore],
        drop_s: float,
    ) -> None:
        self.node_id, self.shelves = node_id, shelves
        self.ssd_read = Link(speeds.ssd_read, speeds.ssd_latency_s)
        self.object_read = Link(speeds.object_read, speeds.object_latency_s)
        self._ssd_write = Link(speeds.ssd_write, speeds.ssd_latency_s)
        self._object_write = Link(speeds.object_write, speeds.object_latency_s)
        self._network = Link(speeds.network, speeds.network_latency_s)
        self._around, self._peers, self._drop_s = surroundings, peers, drop_s

    # --- save ---------------------------------------------------------------------------------------------------------

    def save(self, command: m.Save, buffer: WriteBuffer, link: Link) -> None:
        """Out of a replica's write buffer, over its link. The chunks that fit are answered together."""
        dram = self.shelves[m.Tier.DRAM]
        taken = []
        for info in command.chunks:
            if info.key in buffer and dram.reserve(info.key, info.num_bytes):
                taken.append(info)
            else:
                reason = "full" if info.key in buffer else "missing"
                self._around.refuse(_save_of(command, (info,)), reason)
        if taken:
            when = link.send(self._around.clock.now, sum(info.num_bytes for info in taken))
            self._around.clock.at(when, self._saved, command, tuple(taken), buffer)

    def _saved(self, command: m.Save, chunks: tuple[m.ChunkInfo, ...], buffer: WriteBuffer) -> None:
        dram = self.shelves[m.Tier.DRAM]
        if self._around.fails():
            for info in chunks:
                dram.give_up(info.key)
            self._around.refuse(_save_of(command, chunks), "chance")
            return
        for info in chunks:
            self._around.traffic["saved"] += dram.arrive(info.key)
            buffer.pop(info.key, None)
        self._around.mail.append(m.ChunksSaved(node_id=self.node_id, chunks=tuple(info.key for info in chunks)))

    # --- fetch --------------------------------------------------------------------------------------------------------

    def fetch(self, command: m.Fetch) -> None:
        """Into DRAM, from a lower tier or another node."""
        now, key = self._around.clock.now, command.chunk
        store = self if command.source is m.Tier.OBJECT else self._peers[command.source_node]
        num_bytes = store.shelves[command.source].chunks.get(key)
        if num_bytes is None:
            at = SHARED if command.source is m.Tier.OBJECT else command.source_node
            self._around.mail.append(m.ChunkLost(node_id=at, chunk=key, tier=command.source, cause=m.Cause.LOST))
            self._around.refuse(command, "missing")
            return
        if not self.shelves[m.Tier.DRAM].reserve(key, num_bytes):
            self._around.refuse(command, "full")
            return
        when = store.read(command.source, now, num_bytes)
        if store is not self:
            when = max(when, self._network.send(now, num_bytes))
        self._around.clock.at(when, self._fetched, command, store is not self)

    def read(self, tier: m.Tier, now: float, num_bytes: int) -> float:
        """Use the link that reads this tier; when the last byte is out. DRAM is read at the reader's speed."""
        if tier is m.Tier.SSD:
            return self.ssd_read.send(now, num_bytes)
        return self.object_read.send(now, num_bytes) if tier is m.Tier.OBJECT else now

    def _fetched(self, command: m.Fetch, is_from_peer: bool) -> None:
        dram = self.shelves[m.Tier.DRAM]
        if self._around.fails():
            dram.give_up(command.chunk)
            self._around.refuse(command, "chance")
            return
        num_bytes = dram.arrive(command.chunk)
        self._around.traffic[f"fetched.{command.source}"] += num_bytes
        if is_from_peer:
            self._around.traffic["network"] += num_bytes
        self._around.mail.append(m.ChunkFetched(node_id=self.node_id, chunk=command.chunk))

    # --- demote and drop ----------------------------------------------------------------------------------------------

    def demote(self, command: m.Demote) -> None:
        """Into a lower tier, from DRAM or else from SSD."""
        now, key = self._around.clock.now, command.chunk
        tiers = [tier for tier in (m.Tier.DRAM, m.Tier.SSD) if tier in self.shelves and tier is not command.tier]
        source = next((tier for tier in tiers if key in self.shelves[tier].chunks), None)
        if source is None:
            self._around.refuse(command, "missing")
            return
        num_bytes = self.shelves[source].chunks[key]
        if not self.shelves[command.tier].reserve(key, num_bytes):
            self._around.refuse(command, "full")
            return
        link = self._ssd_write if command.tier is m.Tier.SSD else self._object_write
        when = max(self.read(source, now, num_bytes), link.send(now, num_bytes))
        self._around.clock.at(when, self._demoted, command)

    def _demoted(self, command: m.Demote) -> None:
        shelf = self.shelves[command.tier]
        if self._around.fails():
            shelf.give_up(command.chunk)
            self._around.refuse(command, "chance")
            return
        num_bytes = shelf.arrive(command.chunk)
        self._around.traffic[f"demoted.{command.tier}"] += num_bytes
        self._around.mail.append(
            m.ChunkDemoted(node_id=self.node_id, chunk=command.chunk, tier=command.tier, num_bytes=num_bytes)
        )

    def drop(self, command: m.Drop) -> None:
        self._around.clock.at(self._around.clock.now + self._drop_s, self._dropped, command)

    def _dropped(self, command: m.Drop) -> None:
        self._around.traffic[f"dropped.{command.tier}"] += self.shelves[command.tier].remove(command.chunk)
        self._around.mail.append(m.ChunkDropped(node_id=self.node_id, chunk=command.chunk, tier=command.tier))


def _save_of(command: m.Save, chunks: tuple[m.ChunkInfo, ...]) -> m.Save:
    return m.Save(node_id=command.node_id, replica_id=command.replica_id, chunks=chunks)
