"""The way down and out: watermarks, making room, Demote, Drop, and copies that turn out to be lost.

Which chunk goes first is the eviction policy's decision; that nothing leased, busy or needed as a parent goes is not.
"""

from __future__ import annotations

from policies.board import Board
from policies.catalog import INCOMING, Chunk, Copy, CopyState
from policies.fleet import Node
from policies.messages import (
    Cause,
    ChunkDemoted,
    ChunkDropped,
    ChunkInfo,
    ChunkKey,
    ChunkLost,
    Demote,
    Drop,
    Mark,
    NodeId,
    Tier,
)
from policies.places import Place, place_of
from policies.queue import Order
from policies.restore import find_copy

BATCH = 8  # victims asked for at a time
MAX_TRIES = 48  # victims looked at before giving up until the next event


class Evictor:
    """Frees bytes. A Drop is never taken back: its copy stays unreadable, and the Drop is repeated, until confirmed."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._catalog = board.catalog
        board.when_overdue[CopyState.DROPPING] = self._repeat_drop
        board.when_overdue[CopyState.DEMOTING] = self.fail_demote

    # --- making room --------------------------------------------------------------------------------------------------

    def relieve(self, place: Place) -> None:
        """Between the watermarks: once above the high one, evict until the low one is in sight."""
        account = self._catalog.accounts.get(place)
        if account is None:
            return
        config = self._board.config
        if account.filled_bytes > config.high_watermark * account.budget_bytes:
            account.evicting = True
        if account.evicting:
            surplus = account.filled_bytes - account.leaving_bytes - config.low_watermark * account.budget_bytes
            account.evicting = surplus > 0
            if surplus > 0:
                self._evict(place, surplus, None)

    def make_room(self, place: Place, num_bytes: int, share: float = 1.0, needed_by: Order | None = None) -> bool:
        """Evict until `num_bytes` more would fit below `share` of the budget; whether that many are on their way.

        With `needed_by`, only chunks go that are needed later than that turn, or not at all.
        """
        account = self._catalog.accounts[place]
        limit = share * account.budget_bytes
        missing = account.filled_bytes - account.leaving_bytes + num_bytes - limit
        if missing > 0:
            self._evict(place, missing, needed_by)
        return account.filled_bytes - account.leaving_bytes + num_bytes <= limit

    def _evict(self, place: Place, num_bytes: float, needed_by: Order | None) -> None:
        tried: set[ChunkKey] = set()
        node_id = self._board.fleet.carrier_of(place)
        if node_id is None:
            return
        node = self._board.fleet.nodes[node_id]
        while num_bytes > 0 and len(tried) < MAX_TRIES:
            victims = [
                key
                for key in self._board.candidates.first(place, len(tried) + BATCH, self._board.outlook)
                if key not in tried
            ]
            if not victims:
                return
            for key in victims:
                if num_bytes <= 0:
                    return
                tried.add(key)
                chunk = self._catalog.chunks[key]
                if self._may_go(chunk, needed_by):
                    num_bytes -= self._evict_one(chunk, place, node)

    def _may_go(self, chunk: Chunk, needed_by: Order | None) -> bool:
        """Not what is needed sooner; without a turn to compare with, not what was just brought for a turn."""
        if chunk.next_use is None:
            return True
        return chunk.next_use > needed_by if needed_by is not None else chunk.next_use not in self._board.awaiting

    def _evict_one(self, chunk: Chunk, place: Place, node: Node) -> int:
        """Drop the copy if there is one below, else demote it, else drop it if the policy agrees: bytes leaving."""
        self._board.candidates.settle()
        copy = chunk.copies[place]
        if copy.listed_as is None:  # an eviction just before changed its standing
            return 0
        below = node.below(place.tier)
        if below is not None:
            if find_copy(chunk, node.places[node.places.index(place) + 1 :]) is not None:
                return self.drop(chunk, copy, Cause.EVICTED)
            if below in chunk.copies and chunk.copies[below].state in INCOMING:
                return 0
            if self.demote(chunk, node, below):
                self._catalog.set_leaving(chunk, copy, leaving=True)
                return copy.num_bytes
            if not self._board.has_failed(chunk.key, below) and self.make_room(below, chunk.num_bytes):
                return 0
        candidates = self._board.candidates
        candidates.settle()
        is_candidate = copy.listed_as is not None  # making room below may have changed it
        if is_candidate and candidates.is_held(chunk, copy):
            candidates.set_aside(chunk)
            self._board.timers.at(self._board.now + self._board.config.retry_s, candidates.take_back, chunk.key)
        elif is_candidate and candidates.may_drop(chunk, self._board.outlook):
            return self.drop(chunk, copy, Cause.EVICTED)
        return 0

    # --- commands -----------------------------------------------------------------------------------------------------

    def demote(self, chunk: Chunk, node: Node, place: Place) -> bool:
        """Copy the chunk to a lower place if bytes can be had there now."""
        if place in chunk.copies or self._board.has_failed(chunk.key, place):
            return False
        source = find_copy(chunk, node.places[: node.places.index(place)])
        if source is None:
            return False
        copy = self._catalog.begin_copy(chunk, place, CopyState.DEMOTING, source)
        if copy is None:
            return False
        self._board.expect(chunk, copy, self._board.config.command_deadline_s)
        self._board.changed_places.add(place)
        self._board.send(Demote(node_id=node.node_id, chunk=chunk.key, tier=place.tier))
        return True

    def drop(self, chunk: Chunk, copy: Copy, cause: Cause) -> int:
        """Give up a resident copy; returns its bytes, which are free once the drop is confirmed."""
        self._board.note_drop(copy, cause)
        self._catalog.condemn(chunk, copy, cause)
        self._board.changed_chunks.add(chunk.key)
        self._board.raised_chunks.discard(chunk.key)  # raised and dropped by one event: there is more to do after all
        self._repeat_drop(chunk, copy)
        return copy.num_bytes

    def _repeat_drop(self, chunk: Chunk, copy: Copy) -> None:
        self._board.expect(chunk, copy, self._board.config.command_deadline_s)
        self._send_drop(chunk.key, copy.place)

    def _send_drop(self, key: ChunkKey, place: Place) -> None:
        node_id = self._board.fleet.carrier_of(place)
        if node_id is not None:
            self._board.send(Drop(node_id=node_id, chunk=key, tier=place.tier))

    def retire_superseded(self) -> None:
        """Drop idle copies of chunks that a longer one has replaced, if that one is still there."""
        for key in list(self._board.superseded):
            chunk = self._catalog.chunks.get(key)
            if chunk is None or not chunk.superseded or not chunk.is_live:
                del self._board.superseded[key]
            elif not any(
                find_copy(other, list(other.copies)) for other in self._catalog.carriers(key) if other is not chunk
            ):
                chunk.superseded = False
                self._catalog.changed(chunk)
                del self._board.superseded[key]
            else:
                for copy in list(chunk.copies.values()):
                    if copy.is_idle:
                        self.drop(chunk, copy, Cause.EVICTED)

    # --- events -------------------------------------------------------------------------------------------------------

    def on_demoted(self, event: ChunkDemoted) -> None:
        place = place_of(event.node_id, event.tier)
        chunk, copy = self._find(event.chunk, place)
        if chunk is None or copy is None:
            self.settle_stray(event.chunk, place, event.num_bytes)
        elif copy.state is not CopyState.DEMOTING:
            self._board.note_stale("ChunkDemoted")
        else:
            self._catalog.arrive(chunk, copy, self._board.now, event.num_bytes, used=False)
            self._board.changed_chunks.add(chunk.key)
            self._board.changed_places.add(place)
            for above in self._stop_leaving(chunk, place):
                self._board.candidates.settle()
                if above.listed_as is not None:
                    self.drop(chunk, above, Cause.EVICTED)

    def on_dropped(self, event: ChunkDropped) -> None:
        place = place_of(event.node_id, event.tier)
        chunk, copy = self._find(event.chunk, place)
        if chunk is None or copy is None or copy.state in INCOMING:
            self._board.note_stale("ChunkDropped")
        elif copy.state is CopyState.RESIDENT:
            self._board.note_stale("ChunkDropped")  # nobody asked: make sure that it is gone
            self.drop(chunk, copy, Cause.LOST)
        else:
            self._catalog.vanish(chunk, copy, copy.cause)
            self._note_freed(chunk.key, place)

    def on_lost(self, event: ChunkLost) -> None:
        """Not read any more at once; a Drop clears what may be left of it, and frees its bytes."""
        chunk, copy = self._find(event.chunk, place_of(event.node_id, event.tier))
        if chunk is None or copy is None or copy.state is not CopyState.RESIDENT:
            self._board.note_stale("ChunkLost")
        else:
            self.drop(chunk, copy, event.cause)

    def on_demote_failed(self, command: Demote) -> None:
        chunk, copy = self._find(command.chunk, place_of(command.node_id, command.tier))
        if chunk is None or copy is None or copy.state is not CopyState.DEMOTING:
            self._board.note_stale("CommandFailed")
        else:
            self.fail_demote(chunk, copy)

    def fail_demote(self, chunk: Chunk, copy: Copy) -> None:
        self._board.note_failure(chunk.key, copy.place)
        self._catalog.abandon(chunk, copy, Cause.LOST)
        self._note_freed(chunk.key, copy.place)
        self._stop_leaving(chunk, copy.place)

    def on_drop_failed(self, command: Drop) -> None:
        chunk, copy = self._find(command.chunk, place_of(command.node_id, command.tier))
        if chunk is None or copy is None or copy.state is not CopyState.DROPPING:
            self._board.note_stale("CommandFailed")
        else:
            self._board.expect(chunk, copy, self._board.config.retry_s)

    def settle_stray(self, key: ChunkKey, place: Place, num_bytes: int | None) -> None:
        """A copy was reported where none was expected (a late answer): keep it if it fits, else have it removed."""
        account = self._catalog.accounts.get(place)
        if account is None:
            self._board.note_stale("node")
            return
        self._board.note_stale("copy")
        chunk = self._catalog.chunks.get(key)
        size = 0 if chunk is None else chunk.num_bytes if num_bytes is None else num_bytes
        if chunk is None or chunk.superseded or account.filled_bytes + size > account.budget_bytes:
            self._send_drop(key, place)
        else:
            self._catalog.adopt(_info_of(chunk, size), place, self._board.now)
            self._board.changed_places.add(place)
            self._board.changed_chunks.add(key)

    def lose_places(self, node_id: NodeId) -> None:
        """All copies on this node are gone; what others were copying from them will fail by itself. OBJECT stays."""
        for place in (Place(node_id, Tier.DRAM), Place(node_id, Tier.SSD)):
            for chunk in list(self._catalog.at.get(place, {}).values()):
                self._board.changed_chunks.add(chunk.key)
                self._catalog.lose(chunk, chunk.copies[place])
            self._catalog.at.pop(place, None)
            self._catalog.accounts.pop(place, None)

    def _stop_leaving(self, chunk: Chunk, place: Place) -> list[Copy]:
        """The copies that waited for this one to be written: they are ordinary copies again."""
        waiting = [
            copy
            for copy in chunk.copies.values()
            if copy.leaving and (place.tier is Tier.OBJECT or copy.place.node_id == place.node_id)
        ]
        for copy in waiting:
            self._catalog.set_leaving(chunk, copy, leaving=False)
            self._board.changed_places.add(copy.place)
        return waiting

    def _find(self, key: ChunkKey, place: Place) -> tuple[Chunk | None, Copy | None]:
        chunk = self._catalog.chunks.get(key)
        return chunk, chunk.copies.get(place) if chunk is not None else None

    def _note_freed(self, key: ChunkKey, place: Place) -> None:
        """Bytes are free there, or will not be taken: also good news for those who want to demote to this place."""
        self._board.changed_chunks.add(key)
        for node in self._board.fleet.nodes_with(place):
            self._board.changed_places.update(node.places)
            self._board.freed_nodes.add(node.node_id)


def _info_of(chunk: Chunk, num_bytes: int) -> ChunkInfo:
    marks = tuple(Mark(end, key) for key, end in sorted(chunk.marks.items(), key=lambda item: item[1]))
    return ChunkInfo(
        key=chunk.key, parent=chunk.parent, start=chunk.start, end=chunk.end, num_bytes=num_bytes, marks=marks
    )
