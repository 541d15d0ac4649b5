"""What is stored where: the prefix tree of chunks, their copies, marks, families, recency and ghosts.

Holds state and keeps its indexes in step; decides nothing and sends nothing. A chunk is known as long as it has a copy
in any state. Every change of a copy goes through `_move`, which checks the table of legal moves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from policies.leases import Leases
from policies.lifetimes import Lifetime, Lifetimes
from policies.messages import Cause, ChunkInfo, ChunkKey, Mark, NodeId, ReplicaId
from policies.multimap import Multimap
from policies.places import Account, Place
from policies.queue import Order
from policies.sessions import SessionRecord

MAX_CARRIERS = 16  # of a mark inside a chunk: how many chunks are looked at, oldest first


class CopyState(StrEnum):
    SAVING = "saving"  # out of a replica's write buffer into DRAM
    FETCHING = "fetching"  # from a lower tier or another node into DRAM
    DEMOTING = "demoting"  # into a lower tier
    RESIDENT = "resident"  # committed: the only state in which a copy is read
    DROPPING = "dropping"  # unreadable; its bytes count until the drop is confirmed


INCOMING = frozenset({CopyState.SAVING, CopyState.FETCHING, CopyState.DEMOTING})

COPY_MOVES: dict[CopyState | None, frozenset[CopyState | None]] = {
    None: INCOMING | {CopyState.RESIDENT},
    CopyState.SAVING: frozenset({CopyState.RESIDENT, None}),
    CopyState.FETCHING: frozenset({CopyState.RESIDENT, None}),
    CopyState.DEMOTING: frozenset({CopyState.RESIDENT, None}),
    CopyState.RESIDENT: frozenset({CopyState.DROPPING}),
    CopyState.DROPPING: frozenset({None}),
}
"""Legal moves of a copy; None is "no such copy"."""


@dataclass(slots=True, eq=False)
class Copy:
    """One chunk in one place."""

    place: Place
    state: CopyState
    num_bytes: int
    deadline: float = 0.0  # of the command under way: when it is taken as failed (or a Drop is repeated)
    source: Copy | None = None  # what a Fetch or Demote reads
    replica_id: ReplicaId | None = None  # whose write buffer a Save reads
    fetched_at: float | None = None  # raised ahead of need, or for a turn, and read by none yet
    num_readers: int = 0  # Fetches and Demotes that read this copy
    holders: frozenset[str] = frozenset()  # owners of leases
    leaving: bool = False  # to be dropped as soon as the copy below it is written
    cause: Cause = Cause.EVICTED  # why it is being dropped
    listed_as: tuple[object, ...] | None = None  # how the eviction order knows it; None: not a candidate

    @property
    def is_staying(self) -> bool:
        return self.state in INCOMING or (self.state is CopyState.RESIDENT and not self.leaving)

    @property
    def is_live(self) -> bool:
        return self.state is not CopyState.DROPPING

    @property
    def is_idle(self) -> bool:
        """Readable, and nobody reads or pins it: it may be dropped as far as this copy is concerned."""
        return self.state is CopyState.RESIDENT and not self.num_readers and not self.holders


@dataclass(slots=True, eq=False)
class Chunk:
    """One immutable chunk and its copies. `marks` (key -> end) grows as more marks inside it become known."""

    key: ChunkKey
    parent: ChunkKey | None
    start: int
    end: int
    num_bytes: int
    marks: dict[ChunkKey, int]
    stored_at: float
    last_used: float
    lifetime: Lifetime  # by which it expires
    copies: dict[Place, Copy] = field(default_factory=dict)
    next_use: Order | None = None  # the first waiting turn that needs it
    num_uses: int = 1  # turns that stored or read it
    session: SessionRecord | None = None  # the conversation that used it last
    superseded: bool = False  # a longer chunk serves all its marks; it goes when it is idle
    expired: bool = False  # unused for longer than its time to live, or said to be over
    doomed_from: int | None = None  # marks that end here or later were deleted: no index leads here, it goes when idle

    @property
    def turn(self) -> int:
        """Which turn the conversation that used it last is at; 0 is unknown."""
        return self.session.turn if self.session is not None else 0

    @property
    def prompt_tokens(self) -> int:
        """Of that conversation's last prompt; 0 is unknown."""
        return self.session.prompt_tokens if self.session is not None else 0

    @property
    def answer_tokens(self) -> int:
        """Of that conversation's last answer; 0 is unknown."""
        return self.session.answer_tokens if self.session is not None else 0

    @property
    def is_doomed(self) -> bool:
        return self.doomed_from is not None

    @property
    def is_live(self) -> bool:
        for copy in self.copies.values():  # noqa: SIM110 - asked for very often, and any() takes twice as long
            if copy.state is not CopyState.DROPPING:
                return True
        return False

    def resident(self, place: Place) -> Copy | None:
        copy = self.copies.get(place)
        return copy if copy is not None and copy.state is CopyState.RESIDENT else None


@dataclass(slots=True)
class Family:
    """The copies of a chunk's children: how many stay at each place, and how many there are at all."""

    staying: dict[Place, int] = field(default_factory=dict)
    num_live: int = 0


class Catalog:
    """All indexes over chunks. `watch` is called with every chunk whose standing as a candidate may have changed,
    `unlist` with every copy that is about to be gone, `resettle` with every mark behind which others' time to live may
    apply now."""

    def __init__(self, max_ghosts: int, lifetimes: Lifetimes) -> None:
        self.lifetimes = lifetimes
        self.chunks: dict[ChunkKey, Chunk] = {}
        self.accounts: dict[Place, Account] = {}
        self.at: dict[Place, dict[ChunkKey, Chunk]] = {}
        self.inside = Multimap()  # mark -> chunks carrying it before their end, by age
        self.families: dict[ChunkKey, Family] = {}  # by the parent's key, whether the parent is known or not
        self.children = Multimap()  # likewise, by age
        self.incoming: dict[NodeId, Counter[CopyState]] = {}  # copies on their way to a node's tiers
        self.bereaved: set[ChunkKey] = set()  # keys of lost parents whose children live on
        self.ghosts: OrderedDict[ChunkKey, Cause] = OrderedDict()
        self.leases = Leases(self.changed)
        self.num_tokens = 0
        self.num_bytes = 0
        self.watch: Callable[[Chunk], None] = lambda _chunk: None
        self.unlist: Callable[[Chunk, Copy], None] = lambda _chunk, _copy: None
        self.resettle: Callable[[ChunkKey], None] = lambda _mark: None
        self._max_ghosts = max_ghosts

    # --- marks --------------------------------------------------------------------------------------------------------

    def carriers(self, mark: ChunkKey) -> Sequence[Chunk]:
        """Chunks that contain the prefix `mark`: the one that ends there, then longer ones, oldest first."""
        own, inside = self._ending_at(mark), self.inside.get(mark, MAX_CARRIERS)
        if not inside:  # nearly always
            return () if own is None else (own,)
        longer = [self.chunks[key] for key in inside]
        return longer if own is None else [own, *longer]

    def representative(self, mark: ChunkKey) -> Chunk | None:
        """The carrier to which the need for this mark is charged."""
        own = self._ending_at(mark)
        if own is not None and not own.superseded:
            return own
        return next((chunk for chunk in self.carriers(mark) if not chunk.superseded), own)

    def covering(self, mark: ChunkKey) -> Chunk | None:
        """A carrier that has, or is about to have, a readable copy anywhere."""
        return next((chunk for chunk in self.carriers(mark) if chunk.is_live), None)

    def cover(self, marks: Iterable[ChunkKey], choose: Callable[[ChunkKey], Chunk | None]) -> list[Chunk]:
        """The chunks chosen for these marks (ascending), each once and in their order; what the chunk chosen for a
        later mark holds needs no other."""
        chosen: list[Chunk] = []
        held: set[ChunkKey] = set()
        for mark in reversed(list(marks)):
            chunk = choose(mark) if mark not in held else None
            if chunk is not None:
                chosen.append(chunk)
                held.update(chunk.marks)
        return chosen[::-1]

    def _ending_at(self, mark: ChunkKey) -> Chunk | None:
        own = self.chunks.get(mark)
        return own if own is not None and own.doomed_from is None else None

    def add_marks(self, chunk: Chunk, marks: tuple[Mark, ...]) -> None:
        """More prefixes are known to end inside this chunk."""
        for mark in marks if not chunk.is_doomed else ():
            if mark.key not in chunk.marks and chunk.start < mark.end < chunk.end:
                chunk.marks[mark.key] = mark.end
                self.inside.add(mark.key, chunk.key)
                self.ghosts.pop(mark.key, None)
                if mark.key in self.lifetimes.by_prefix:
                    self.resettle(mark.key)
        self.changed(chunk)

    # --- copies coming ------------------------------------------------------------------------------------------------

    def begin_save(self, info: ChunkInfo, session: SessionRecord | None, place: Place, now: float) -> Copy | None:
        """Reserve bytes for a new chunk of a conversation in DRAM; None, and nothing changes, when they do not fit."""
        if not self.accounts[place].reserve(info.num_bytes):
            return None
        chunk = self._learn(info, now)
        chunk.session = session
        return self._enter(chunk, Copy(place, CopyState.SAVING, info.num_bytes))

    def begin_copy(self, chunk: Chunk, place: Place, state: CopyState, source: Copy) -> Copy | None:
        """Reserve bytes for a Fetch or Demote and hold its source; None, and nothing changes, when they do not fit."""
        if not self.accounts[place].reserve(chunk.num_bytes):
            return None
        source.num_readers += 1
        return self._enter(chunk, Copy(place, state, chunk.num_bytes, source=source))

    def arrive(self, chunk: Chunk, copy: Copy, now: float, num_bytes: int | None = None, *, used: bool = True) -> None:
        """An incoming copy is committed (with that many bytes, if measured). Being demoted is not being used."""
        self._let_go_of_source(chunk, copy)
        reserved_bytes, copy.num_bytes = copy.num_bytes, copy.num_bytes if num_bytes is None else num_bytes
        self._count_incoming(copy, -1)
        self.accounts[copy.place].settle(reserved_bytes, copy.num_bytes)
        copy.replica_id = None
        if used:
            self.touch(chunk, now)
        self._move(chunk, copy, CopyState.RESIDENT)

    def abandon(self, chunk: Chunk, copy: Copy, cause: Cause) -> None:
        """An incoming copy will not come."""
        self._let_go_of_source(chunk, copy)
        self._count_incoming(copy, -1)
        self.accounts[copy.place].cancel(copy.num_bytes)
        copy.cause = cause
        self._move(chunk, copy, None)

    def adopt(self, info: ChunkInfo, place: Place, now: float) -> Copy:
        """A committed copy was found in a place where none was known."""
        self.accounts[place].inherit(info.num_bytes)
        return self._enter(self._learn(info, now), Copy(place, CopyState.RESIDENT, info.num_bytes))

    # --- copies going -------------------------------------------------------------------------------------------------

    def condemn(self, chunk: Chunk, copy: Copy, cause: Cause) -> None:
        """A resident copy is read no more; its bytes count until it has vanished."""
        self.leases.detach(copy)
        self.set_leaving(chunk, copy, leaving=False)
        copy.cause = cause
        self.accounts[copy.place].leaving_bytes += copy.num_bytes
        self._move(chunk, copy, CopyState.DROPPING)

    def vanish(self, chunk: Chunk, copy: Copy, cause: Cause) -> None:
        """A resident or dropping copy is gone and its bytes are free."""
        if copy.state is CopyState.RESIDENT:
            self.condemn(chunk, copy, cause)
        account = self.accounts[copy.place]
        account.leaving_bytes -= copy.num_bytes
        account.free(copy.num_bytes)
        copy.cause = cause
        self._move(chunk, copy, None)

    def lose(self, chunk: Chunk, copy: Copy) -> None:
        """The node that held the copy, or was about to, is gone."""
        if copy.state in INCOMING:
            self.abandon(chunk, copy, Cause.LOST)
        else:
            self.vanish(chunk, copy, Cause.LOST)

    def set_leaving(self, chunk: Chunk, copy: Copy, *, leaving: bool) -> None:
        """Whether a resident copy is to be dropped once the copy below it is written."""
        if copy.leaving == leaving:
            return
        self._count_in_family(chunk, copy, -1)
        copy.leaving = leaving
        self._count_in_family(chunk, copy, +1)
        self.accounts[copy.place].leaving_bytes += copy.num_bytes if leaving else -copy.num_bytes
        self._settle_kin(chunk)
        self.changed(chunk)

    # --- use ----------------------------------------------------------------------------------------------------------

    def touch(self, chunk: Chunk, now: float) -> None:
        chunk.last_used = now
        chunk.expired = False
        self.lifetimes.note_use(chunk.lifetime, chunk.key, now)

    def use(self, chunk: Chunk, session: SessionRecord | None, now: float) -> None:
        """A turn of this conversation reads the chunk."""
        chunk.num_uses += 1
        chunk.session = session
        self.touch(chunk, now)

    def expire(self, now: float) -> None:
        """Chunks unused for longer than their time to live are the first to go from now on."""
        for key in self.lifetimes.overdue(now):
            self.expire_chunk(self.chunks[key])

    def expire_chunk(self, chunk: Chunk) -> None:
        """The chunk is among the first to go from now on, until it is used again."""
        chunk.lifetime.unused.pop(chunk.key, None)
        chunk.expired = True
        self.changed(chunk)

    def settle_lifetime(self, chunk: Chunk, now: float) -> bool:
        """The chunk, which its parent came before, lives by what applies now; whether that is something else.

        What it was unused for before counts if that is too long already, else its time begins anew.
        """
        lifetime = self._find_lifetime(chunk.marks, chunk.parent)
        if lifetime is chunk.lifetime:
            return False
        chunk.lifetime.unused.pop(chunk.key, None)
        chunk.lifetime = lifetime
        if not chunk.expired and chunk.last_used + lifetime.seconds < now:
            self.expire_chunk(chunk)
        elif not chunk.expired:
            self.lifetimes.note_use(lifetime, chunk.key, now)
        return True

    def _find_lifetime(self, marks: Iterable[ChunkKey], parent: ChunkKey | None) -> Lifetime:
        above = self.chunks.get(parent) if parent is not None else None
        return self.lifetimes.find(marks, parent, above.lifetime if above is not None else None)

    def supersede(self, chunk: Chunk, by: Chunk) -> None:
        """`by` is longer and serves all marks of `chunk`, its beginning."""
        self.add_marks(by, tuple(Mark(end, key) for key, end in chunk.marks.items()))
        chunk.superseded = True
        self.changed(chunk)
        self.changed(by)

    def remember(self, mark: ChunkKey, cause: Cause) -> None:
        """Name the cause for which this prefix is not stored, if it is not. Once deleted, that stays the cause."""
        if self._ending_at(mark) is not None or mark in self.inside:
            return
        self.ghosts[mark] = Cause.DELETED if self.ghosts.get(mark) is Cause.DELETED else cause
        self.ghosts.move_to_end(mark)
        if len(self.ghosts) > self._max_ghosts:
            self.ghosts.popitem(last=False)

    # --- deletion -----------------------------------------------------------------------------------------------------

    def bearers(self, marks: Sequence[ChunkKey]) -> Iterator[tuple[Chunk, int]]:
        """The chunks that hold one of these marks or go on from there, parents first, each with the end of such a mark
        in it; again when an earlier one is found. Between two answers the catalog may change: what comes behind a chunk
        that was answered already may be missing."""
        known, todo = set(marks), deque(marks)
        while todo:
            mark = todo.popleft()
            for key in (mark, *self.inside.get(mark), *self.children.get(mark)):
                chunk = self.chunks.get(key)
                if chunk is None:
                    continue
                first = chunk.marks.get(mark, chunk.start)
                beyond = [other for other, end in chunk.marks.items() if end >= first and other not in known]
                known.update(beyond)
                todo.extend(beyond)
                yield chunk, first

    def find_bearers(self, marks: Sequence[ChunkKey]) -> dict[ChunkKey, int]:
        """All of them, and the end of the first such mark in each."""
        found: dict[ChunkKey, int] = {}
        for chunk, first in self.bearers(marks):
            found[chunk.key] = min(first, found.get(chunk.key, first))
        return found

    def doom(self, chunk: Chunk, first: int) -> None:
        """Marks of this chunk that end at `first` or later were deleted: nobody finds it any more."""
        chunk.doomed_from = first if chunk.doomed_from is None else min(first, chunk.doomed_from)
        chunk.superseded = False
        for mark, end in chunk.marks.items():
            self.inside.discard(mark, chunk.key)
            if end >= chunk.doomed_from:
                self.remember(mark, Cause.DELETED)
        self.changed(chunk)

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0

    # --- keeping the indexes in step ----------------------------------------------------------------------------------

    def _learn(self, info: ChunkInfo, now: float) -> Chunk:
        chunk = self.chunks.get(info.key)
        if chunk is None:
            marks = {mark.key: mark.end for mark in info.marks}
            lifetime = self._find_lifetime(marks, info.parent)
            chunk = Chunk(info.key, info.parent, info.start, info.end, info.num_bytes, marks, now, now, lifetime)
            self.chunks[info.key] = chunk
            if self.lifetimes.by_prefix and info.key in self.children:
                self.resettle(info.key)  # it was lost, or its node named its children first
            if info.parent is not None:
                self.children.add(info.parent, info.key)
            self.num_tokens += info.end - info.start
            self.num_bytes += info.num_bytes
            for mark in marks:
                self.ghosts.pop(mark, None)
                if mark != info.key:
                    self.inside.add(mark, info.key)
        else:
            self.add_marks(chunk, info.marks)
        self.touch(chunk, now)
        return chunk

    def _enter(self, chunk: Chunk, copy: Copy) -> Copy:
        assert copy.place not in chunk.copies, "there is a copy of this chunk here already"
        assert copy.state in COPY_MOVES[None]
        chunk.copies[copy.place] = copy
        self.at.setdefault(copy.place, {})[chunk.key] = chunk
        self._count_incoming(copy, +1)
        self._count_in_family(chunk, copy, +1)
        self._settle_kin(chunk)
        self.changed(chunk)
        return copy

    def _move(self, chunk: Chunk, copy: Copy, state: CopyState | None) -> None:
        assert state in COPY_MOVES[copy.state], f"a copy cannot go from {copy.state} to {state}"
        self._count_in_family(chunk, copy, -1)
        if state is None:
            self.unlist(chunk, copy)
            del chunk.copies[copy.place]
            del self.at[copy.place][chunk.key]
        else:
            copy.state = state
            self._count_in_family(chunk, copy, +1)
        self._settle_kin(chunk, copy.cause)
        if chunk.copies:
            self.changed(chunk)
        else:
            self._forget(chunk, copy.cause)

    def _forget(self, chunk: Chunk, cause: Cause) -> None:
        del self.chunks[chunk.key]
        chunk.lifetime.unused.pop(chunk.key, None)
        self.num_tokens -= chunk.end - chunk.start
        self.num_bytes -= chunk.num_bytes
        if chunk.parent is not None:
            self.children.discard(chunk.parent, chunk.key)
        for mark, end in chunk.marks.items():
            self.inside.discard(mark, chunk.key)
            self.remember(mark, self._cause_of_loss(chunk, end, cause))
        self.changed(chunk)

    @staticmethod
    def _cause_of_loss(chunk: Chunk, end: int, cause: Cause) -> Cause:
        """Of what a deleted chunk holds, the part before the deleted text only went with it."""
        if chunk.doomed_from is None:
            return cause
        return Cause.DELETED if end >= chunk.doomed_from else Cause.EVICTED

    def changed(self, chunk: Chunk) -> None:
        """Tell the watcher, also about the chunks from or to which the need for a mark may have moved."""
        self.watch(chunk)
        for mark in chunk.marks:
            own = self.chunks.get(mark)
            if own is not None and own is not chunk:
                self.watch(own)
            if mark in self.inside:
                inside = (other for other in self.carriers(mark) if other is not own and not other.superseded)
                for other in islice(inside, 2):  # the representative now, and the one before this chunk came
                    if other is not chunk:
                        self.watch(other)

    def _let_go_of_source(self, chunk: Chunk, copy: Copy) -> None:
        if copy.source is not None:
            copy.source.num_readers -= 1
            copy.source = None
            self.changed(chunk)

    def _count_incoming(self, copy: Copy, change: int) -> None:
        if copy.state not in INCOMING:
            return
        counts = self.incoming.get(copy.place.node_id)
        if counts is None:
            counts = self.incoming[copy.place.node_id] = Counter()
        counts[copy.state] += change
        if not counts[copy.state]:
            del counts[copy.state]
        if not counts:
            del self.incoming[copy.place.node_id]
        if copy.state is CopyState.FETCHING:
            self.accounts[copy.place].num_fetching += change

    def _count_in_family(self, chunk: Chunk, copy: Copy, change: int) -> None:
        if chunk.parent is None or chunk.start == 0 or not copy.is_live:
            return
        family = self.families.setdefault(chunk.parent, Family())
        family.num_live += change
        if copy.is_staying:
            family.staying[copy.place] = family.staying.get(copy.place, 0) + change
            if not family.staying[copy.place]:
                del family.staying[copy.place]

    def _settle_kin(self, chunk: Chunk, cause: Cause | None = None) -> None:
        """After the chunk's copies changed: keep `bereaved`, and let the watcher look at its parent."""
        if chunk.key in self.families:
            if chunk.is_live:
                self.bereaved.discard(chunk.key)
            elif cause is not Cause.EVICTED:
                self.bereaved.add(chunk.key)
        if chunk.parent is None or chunk.start == 0:
            return
        parent = self.chunks.get(chunk.parent)
        family = self.families.get(chunk.parent)
        if family is not None and not family.num_live:
            del self.families[chunk.parent]
            self.bereaved.discard(chunk.parent)
        elif family is not None and (parent is None or not parent.is_live):
            self.bereaved.add(chunk.parent)
        if parent is not None:
            self.watch(parent)
