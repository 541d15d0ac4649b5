"""What people and programs say about sessions beyond their turns: expected, pinned, over, to be deleted.

    expected   a turn behind all others in the queue, never dispatched: its chunks are kept and raised like theirs
    pinned     a lease with a deadline on one copy of each chunk, the lowest there is
    expired    chunks that go first
    deleted    chunks that nobody finds any more, and that leave every tier as soon as nobody reads them

Decides nothing about turns: it has them cancelled, and replicas closed, by those who do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from policies.board import Board
from policies.catalog import Chunk, Copy, CopyState
from policies.dispatching import Dispatcher
from policies.evicting import Evictor
from policies.fetching import Fetcher
from policies.messages import (
    Cause,
    ChunkKey,
    Forget,
    SessionDeleted,
    SessionExpected,
    SessionExpired,
    SessionId,
    SessionPinned,
    StoredChunk,
    Turn,
    TurnId,
)
from policies.places import STORE_TIERS
from policies.queue import LAST_CLASS, Order
from policies.saving import Saver

EXPECTED, PIN = "expected/", "pin/"  # before a session's name: of its turn in the queue, of its lease


class Administrator:
    """See the module's docstring. At most `config.ghosts` sessions are expected, and as many pinned; the oldest go."""

    def __init__(self, board: Board, dispatcher: Dispatcher, saver: Saver, fetcher: Fetcher, evictor: Evictor) -> None:
        self.expected: dict[SessionId, TurnId] = {}  # the name of each one's turn in the queue
        self.pins: dict[str, float] = {}  # owners of leases (also those of prefixes, see prefixes.py), until when
        self._board, self._catalog = board, board.catalog
        self._dispatcher, self._saver, self._fetcher, self._evictor = dispatcher, saver, fetcher, evictor

    # --- expected -----------------------------------------------------------------------------------------------------

    def on_expected(self, event: SessionExpected) -> None:
        session_id = event.turn.session_id
        self._withdraw(session_id)
        name = EXPECTED + session_id
        if event.seconds <= 0.0 or name in self._dispatcher.turns:
            return
        if len(self.expected) >= self._board.config.ghosts:
            self._withdraw(next(iter(self.expected)))
        self.expected[session_id] = name
        order = self._board.queue.new_order((LAST_CLASS, self._board.now))
        self._board.candidates.note_marks(self._board.queue.add(replace(event.turn, turn_id=name), order))
        if event.turn.reuse:
            self._fetcher.note_waiting(order)
        self._board.timers.at(self._board.now + event.seconds, self._cease, session_id, order)

    def note_submitted(self, turn: Turn) -> None:
        """The session speaks: it is expected no longer. Nor is one that stands in the queue by this turn's name."""
        self._withdraw(turn.session_id)
        if turn.turn_id.startswith(EXPECTED):
            self._withdraw(turn.turn_id.removeprefix(EXPECTED))

    def _cease(self, session_id: SessionId, order: Order) -> None:
        name = self.expected.get(session_id)
        if name is not None and self._board.queue.order_of(name) == order:
            self._withdraw(session_id)

    def _withdraw(self, session_id: SessionId) -> None:
        name = self.expected.pop(session_id, None)
        if name is None:
            return
        order = self._board.queue.order_of(name)
        marks = self._board.queue.remove(name)
        self._board.candidates.note_marks(marks)
        self._fetcher.note_gone(order, marks)

    # --- pinned -------------------------------------------------------------------------------------------------------

    def on_pinned(self, event: SessionPinned) -> None:
        owner = PIN + event.session_id
        self._unpin(owner)
        if event.seconds <= 0.0:
            return
        chunks = self._catalog.cover((mark.key for mark in event.prompt), self._pinnable)
        copies = [(chunk, copy) for chunk in chunks if (copy := lowest_copy(chunk)) is not None]
        if not copies:
            return
        if len(self.pins) >= self._board.config.ghosts:
            self._unpin(next((pin for pin in self.pins if pin.startswith(PIN)), ""))
        deadline = self.pins[owner] = self._board.now + event.seconds
        self._catalog.leases.grant(owner, copies, deadline)
        self._board.timers.at(deadline, self._end_pin, owner, deadline)

    def _pinnable(self, mark: ChunkKey) -> Chunk | None:
        """The chunk with this mark that will stay longest."""
        stored = [chunk for chunk in self._catalog.carriers(mark) if lowest_copy(chunk) is not None]
        return min(stored, key=lambda chunk: chunk.superseded, default=None)

    def note_chunk(self, chunk: Chunk) -> None:
        """A copy of it came or went: its pins move to the lowest one, and faster tiers are free for others."""
        if not self.pins:
            return
        lowest = lowest_copy(chunk)
        for copy in chunk.copies.values():
            if lowest is not None and copy is not lowest:
                for owner in self._pins_on(copy):
                    self._catalog.leases.shift(owner, chunk, copy, lowest)

    def _pins_on(self, copy: Copy) -> list[str]:
        return sorted(owner for owner in copy.holders if owner in self.pins)

    def _end_pin(self, owner: str, deadline: float) -> None:
        if self.pins.get(owner) == deadline:
            self._unpin(owner)

    def _unpin(self, owner: str) -> None:
        if self.pins.pop(owner, None) is not None:
            self._catalog.leases.release(owner)

    # --- over ---------------------------------------------------------------------------------------------------------

    def on_expired(self, event: SessionExpired) -> None:
        """Chunks that were there before this scheduler belong to no session that it knows of."""
        session = self._board.sessions.get(event.session_id)
        chunks = [chunk for mark in event.prompt for chunk in self._catalog.carriers(mark.key)]
        for chunk in chunks:
            if (chunk.session is None or chunk.session is session) and not chunk.expired:
                self._catalog.expire_chunk(chunk)

    # --- deleted ------------------------------------------------------------------------------------------------------

    def on_deleted(self, event: SessionDeleted) -> None:
        """Its turns end first; what they still read or write leaves when they are done with it."""
        session_id, marks = event.session_id, [mark.key for mark in event.prompt]
        for turn_id in self.turns_of(session_id):
            self._dispatcher.cancel(turn_id)
        self._withdraw(session_id)
        self._unpin(PIN + session_id)
        self._refuse_offers(session_id, event.seconds)
        bearers = self._catalog.find_bearers(marks)
        self.doom(bearers)
        for mark in marks:
            self._catalog.remember(mark, Cause.DELETED)
        self._decline_pending(session_id, {*marks, *bearers})
        forgotten = tuple(dict.fromkeys([*marks, *bearers]))
        for replica_id in self._board.fleet.replicas if forgotten else ():
            self._board.send(Forget(replica_id=replica_id, marks=forgotten))

    def turns_of(self, session_id: SessionId) -> list[TurnId]:
        """Its turns that wait or run."""
        return [name for name, record in self._dispatcher.turns.items() if record.turn.session_id == session_id]

    def find_deleted(self, inventory: Iterable[StoredChunk]) -> dict[ChunkKey, int]:
        """What a joining node holds although it was deleted, and the end of the first deleted mark in each."""
        deleted: dict[ChunkKey, int] = {}
        for info in sorted((stored.info for stored in inventory), key=lambda info: info.start):
            chunk = self._catalog.chunks.get(info.key)
            if chunk is not None and not chunk.is_doomed:
                continue
            ends = [mark.end for mark in info.marks if self._is_ghost(mark.key)]
            if info.parent is not None and (info.parent in deleted or self._is_ghost(info.parent)):
                ends.append(info.start)
            if ends:
                deleted[info.key] = min(ends)
        return deleted

    def doom(self, deleted: Mapping[ChunkKey, int]) -> None:
        """Nobody finds these chunks any more; they are dropped as soon as they are idle. Pins do not hold them."""
        for key, first in deleted.items():
            chunk = self._catalog.chunks.get(key)
            if chunk is None:
                continue
            for copy in chunk.copies.values():
                for owner in self._pins_on(copy):
                    self._catalog.leases.let_go(owner, copy)
            self._catalog.doom(chunk, first)
            self._board.doomed[key] = None
            self._board.changed_chunks.add(key)

    def retire_doomed(self) -> None:
        """Drop the idle copies of what was deleted."""
        for key in list(self._board.doomed):
            chunk = self._catalog.chunks.get(key)
            if chunk is None or not chunk.is_doomed:
                del self._board.doomed[key]
                continue
            for copy in list(chunk.copies.values()):
                if copy.is_idle:
                    self._evictor.drop(chunk, copy, Cause.DELETED)

    def _is_ghost(self, mark: ChunkKey) -> bool:
        return self._catalog.ghosts.get(mark) is Cause.DELETED

    def _refuse_offers(self, session_id: SessionId, seconds: float) -> None:
        until = self._board.now + seconds
        self._board.sessions.deleted[session_id] = until
        self._board.timers.at(until, self._accept_offers, session_id, until)

    def refuse_prefix(self, prefix: ChunkKey, seconds: float) -> None:
        """For so long, nothing is kept that begins with it."""
        until = self._board.now + seconds
        self._board.sessions.deleted_prefixes[prefix] = until
        self._board.timers.at(until, self._accept_prefix, prefix, until)
        self._decline_pending(None, {prefix})

    def _accept_prefix(self, prefix: ChunkKey, until: float) -> None:
        if self._board.sessions.deleted_prefixes.get(prefix) == until:
            del self._board.sessions.deleted_prefixes[prefix]

    def _accept_offers(self, session_id: SessionId, until: float) -> None:
        if self._board.sessions.deleted.get(session_id) == until:
            del self._board.sessions.deleted[session_id]

    def _decline_pending(self, session_id: SessionId | None, deleted: set[ChunkKey]) -> None:
        """Offers that wait for bytes: those of the session, and those that hold a deleted mark or go on from one."""
        session = self._board.sessions.get(session_id) if session_id is not None else None
        for node_id, pending in self._saver.pending.items():
            for offer in list(pending.values()):
                info = offer.info
                is_deleted = info.parent in deleted or any(mark.key in deleted for mark in info.marks)
                if is_deleted:
                    deleted.add(info.key)
                if is_deleted or (session is not None and offer.session is session):
                    self._saver.withdraw(node_id, offer)


def lowest_copy(chunk: Chunk) -> Copy | None:
    """The readable copy in the lowest tier that has one."""
    readable = [copy for copy in chunk.copies.values() if copy.state is CopyState.RESIDENT]
    return max(readable, key=lambda copy: (STORE_TIERS.index(copy.place.tier), copy.place.node_id), default=None)
