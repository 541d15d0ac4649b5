"""What people and programs say about all that begins with a prefix: how long it lives, pinned, over, to be deleted.

A tenant is the prefix of no tokens: `Mark(0, root)`, the parent of every first chunk of its texts. There may be
millions of chunks behind one mark, so the work is done a few chunks an event, parents first, one wish after the other:

    wishes    [delete t1 ...............][pin p2 ....][live t3 ..]
    events    |  |  |    |   |  |     |    |  |  |      |           each takes a slice

What is given up is refused and forgotten by replicas at once; only the walk over what is stored takes its time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from policies.administration import Administrator, lowest_copy
from policies.board import Board
from policies.catalog import Chunk
from policies.messages import (
    Cause,
    ChunkKey,
    Forget,
    PrefixDeleted,
    PrefixExpired,
    PrefixLifetimeSet,
    PrefixPinned,
)

SLICE = 32  # chunks of an event
MAX_WISHES = 4  # of an event
TICK_SLICE = 512  # of a Tick, twenty a second
MAX_LEAVING = 512  # deleted chunks that are still to be dropped: with so many, deleting waits

Bearers = Iterator[tuple[Chunk, int]]
Wish = Callable[[int], bool]
"""Takes the next so many chunks; whether that was all."""


class Steward:
    """See the module's docstring. Of a prefix that is pinned twice the later pin counts, as with sessions."""

    def __init__(self, board: Board, administrator: Administrator) -> None:
        self.wishes: deque[Wish] = deque()
        self.pinned: dict[ChunkKey, str] = {}  # by prefix: the owner of its lease
        self._board, self._catalog, self._administrator = board, board.catalog, administrator
        self._num_pins = 0
        self._catalog.resettle = self._resettle

    def proceed(self, count: int) -> None:
        """A slice of the first wish, or several short ones."""
        for _ in range(MAX_WISHES):
            if not self.wishes or not self.wishes[0](count):
                return
            self.wishes.popleft()

    # --- time to live -------------------------------------------------------------------------------------------------

    def on_lifetime_set(self, event: PrefixLifetimeSet) -> None:
        lifetimes, prefix = self._catalog.lifetimes, event.prefix.key
        if event.seconds is None:
            lifetimes.take(prefix)
        else:
            dropped = lifetimes.give(prefix, event.seconds)
            if dropped is not None:
                self._resettle(dropped)
        self._resettle(prefix)

    def _resettle(self, prefix: ChunkKey) -> None:
        bearers = self._catalog.bearers([prefix])

        def settle(chunk: Chunk, _first: int) -> None:
            self._catalog.settle_lifetime(chunk, self._board.now)

        self.wishes.append(lambda count: _each(bearers, count, settle))

    # --- pinned -------------------------------------------------------------------------------------------------------

    def on_pinned(self, event: PrefixPinned) -> None:
        prefix = event.prefix.key
        self._unpin(prefix)
        if event.seconds <= 0.0:
            return
        if len(self.pinned) >= self._board.config.ghosts:
            self._unpin(next(iter(self.pinned)))
        self._num_pins += 1
        owner = self.pinned[prefix] = f"prefix/{self._num_pins}/{prefix}"
        deadline = self._administrator.pins[owner] = self._board.now + event.seconds
        bearers = self._catalog.bearers([prefix])

        def pin(chunk: Chunk, _first: int) -> None:
            copy = None if chunk.superseded or chunk.is_doomed else lowest_copy(chunk)
            if copy is not None and self.pinned.get(prefix) == owner:
                self._catalog.leases.extend(owner, [(chunk, copy)], deadline)

        self.wishes.append(lambda count: _each(bearers, count, pin))
        self._board.timers.at(deadline, self._end_pin, prefix, owner)

    def _end_pin(self, prefix: ChunkKey, owner: str) -> None:
        if self.pinned.get(prefix) == owner:
            self._unpin(prefix)

    def _unpin(self, prefix: ChunkKey) -> None:
        owner = self.pinned.pop(prefix, None)
        if owner is None:
            return

        def release(count: int) -> bool:
            is_over = self._catalog.leases.release(owner, count)
            if is_over:
                del self._administrator.pins[owner]
            return is_over

        self.wishes.append(release)

    # --- over, deleted ------------------------------------------------------------------------------------------------

    def on_expired(self, event: PrefixExpired) -> None:
        bearers = self._catalog.bearers([event.prefix.key])

        def expire(chunk: Chunk, _first: int) -> None:
            if not chunk.expired:
                self._catalog.expire_chunk(chunk)

        self.wishes.append(lambda count: _each(bearers, count, expire))

    def on_deleted(self, event: PrefixDeleted) -> None:
        """Turns that read it go on; what they compute behind it is not kept."""
        prefix = event.prefix
        self._unpin(prefix.key)
        self._administrator.refuse_prefix(prefix.key, event.seconds)
        if prefix.end > 0:
            self._catalog.remember(prefix.key, Cause.DELETED)
        self._forget([prefix.key])
        bearers, above = self._catalog.bearers([prefix.key]), self._ancestors(prefix.key)

        def delete(count: int) -> bool:
            if len(self._board.doomed) >= MAX_LEAVING:
                return False
            found = list(islice(bearers, count))
            for chunk, first in found:
                self._administrator.doom({chunk.key: first})
            return len(found) < count

        def climb(count: int) -> bool:
            """Chunks inside the prefix go too, from its end on, up to the first that others go on from."""
            lonely: list[ChunkKey] = []
            while above and len(lonely) < count and self._is_lonely(above[0]):
                lonely.append(above.popleft())
                self._administrator.doom({lonely[-1]: 0})
            self._forget(lonely)
            return len(lonely) < count

        self.wishes.append(delete)
        self.wishes.append(climb)

    def _ancestors(self, prefix: ChunkKey) -> deque[ChunkKey]:
        """The chunks in front of the one that holds it, nearest first."""
        found: deque[ChunkKey] = deque()
        chunk = next(iter(self._catalog.carriers(prefix)), None)
        while chunk is not None and chunk.parent in self._catalog.chunks:
            found.append(chunk.parent)
            chunk = self._catalog.chunks[chunk.parent]
        return found

    def _is_lonely(self, key: ChunkKey) -> bool:
        """Whether all that goes on from it is being deleted."""
        children = [self._catalog.chunks[child] for child in self._catalog.children.get(key)]
        return all(child.is_doomed for child in children)

    def _forget(self, marks: list[ChunkKey]) -> None:
        for replica_id in self._board.fleet.replicas if marks else ():
            self._board.send(Forget(replica_id=replica_id, marks=tuple(marks)))


def _each(bearers: Bearers, count: int, do: Callable[[Chunk, int], None]) -> bool:
    """Whether there are no more."""
    num_done = 0
    for chunk, first in islice(bearers, count):
        do(chunk, first)
        num_done += 1
    return num_done < count
