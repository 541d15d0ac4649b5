"""Which copies may be evicted, and in which order: the seam between the catalog and the eviction policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from policies.catalog import Catalog, Chunk, Copy, CopyState, Family
from policies.eviction.contract import EvictionPolicy, learner_of
from policies.fleet import Fleet
from policies.messages import Cause, ChunkKey, Mark
from policies.outlook import Outlook
from policies.places import Place
from policies.plugins import Guard
from policies.queue import Order, WaitingQueue


class Candidates:
    """Watches the catalog: `note` hears of a chunk that changed, `settle` brings the next use of all such chunks, and
    the candidacy of their copies, up to date. One event changes a chunk several times; it is looked at when it matters.

    Expired chunks (time to live) are kept apart and go first; the policy orders the rest.
    """

    def __init__(
        self, catalog: Catalog, queue: WaitingQueue, fleet: Fleet, policy: EvictionPolicy, guard: Guard
    ) -> None:
        self.ordered: dict[Place, dict[ChunkKey, None]] = {}  # what the policy was told; also the safe default order
        self.expired: dict[Place, dict[ChunkKey, None]] = {}
        self._aside: set[ChunkKey] = set()
        self._catalog, self._queue, self._fleet = catalog, queue, fleet
        self._policy, self._guard = policy, guard
        self._learner = learner_of(policy)
        self._changed: dict[ChunkKey, Chunk] = {}

    def note(self, chunk: Chunk) -> None:
        """What is known of the chunk, or of its parent's or children's copies, changed."""
        self._changed[chunk.key] = chunk

    def settle(self) -> None:
        """Before anybody asks for `next_use`, `listed_as` or the order."""
        while self._changed:
            changed, self._changed = self._changed, {}
            for chunk in changed.values():
                self._refresh(chunk)

    def unlist(self, chunk: Chunk, copy: Copy) -> None:
        """The copy is about to be gone."""
        if copy.listed_as is not None:
            self._relist(chunk, copy, None)

    def _refresh(self, chunk: Chunk) -> None:
        chunk.next_use = self.find_next_use(chunk)
        family = self._catalog.families.get(chunk.key)
        for copy in chunk.copies.values():
            listing = self.find_listing(chunk, copy, family)
            if listing != copy.listed_as:
                self._relist(chunk, copy, listing)

    def note_marks(self, marks: Sequence[ChunkKey]) -> None:
        """The next use of these marks changed."""
        for mark in marks:
            chunk = self._catalog.representative(mark)
            if chunk is not None:
                self.note(chunk)

    def first(self, place: Place, count: int, outlook: Callable[[], Outlook]) -> Sequence[ChunkKey]:
        """The `count` candidates of a place that go first."""
        self.settle()
        expired = list(islice(self.expired.get(place, ()), count))
        wanted = count - len(expired)
        ordered = self.ordered.get(place, {})
        wanted = min(wanted, len(ordered))
        if not wanted:
            return expired
        victims: Sequence[ChunkKey] = self._guard.consult(
            self._policy,
            "victims",
            ask=lambda: self._policy.victims(place, wanted, outlook()),
            problem=lambda keys: _problem_with(keys, wanted, ordered),
            default=lambda: list(islice(ordered, wanted)),
        )
        return [*expired, *victims]

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
        """Let a policy that learns hear of a prompt."""
        learner = self._learner
        if learner is not None:
            self._guard.tell(self._policy, "note_prompt", lambda: learner.note_prompt(prompt, now))

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        """Let a policy that learns hear of a turn's end."""
        learner = self._learner
        if learner is not None:
            self._guard.tell(self._policy, "note_answer", lambda: learner.note_answer(prompt, turn, answer_tokens, now))

    def may_drop(self, chunk: Chunk, outlook: Callable[[], Outlook]) -> bool:
        """Whether the last copy of a victim may go for good."""
        self.settle()
        position = None if chunk.next_use is None else self._queue.position(chunk.next_use)
        return self._guard.consult(
            self._policy,
            "may_drop",
            ask=lambda: self._policy.may_drop(chunk, position, outlook()),
            problem=lambda answer: None if isinstance(answer, bool) else f"answered {answer!r}, not True or False",
            default=lambda: position is None,
        )

    def is_held(self, chunk: Chunk, copy: Copy) -> bool:
        """Whether it is the only copy of what others go on from: it may move, but not go."""
        return chunk.key in self._catalog.families and not _has_other(chunk, copy)

    def set_aside(self, chunk: Chunk) -> None:
        """Its held copy cannot move just now and is no candidate until `take_back`: those behind it are to be found."""
        self._aside.add(chunk.key)
        self.note(chunk)

    def take_back(self, key: ChunkKey) -> None:
        """The chunk may be gone by now, or be another one under the same key."""
        self._aside.discard(key)
        chunk = self._catalog.chunks.get(key)
        if chunk is not None:
            self.note(chunk)

    def find_next_use(self, chunk: Chunk) -> Order | None:
        """The first waiting turn among the marks for which this chunk is the representative."""
        orders = [
            order
            for mark in chunk.marks
            if (order := self._queue.next_use(mark)) is not None and self._catalog.representative(mark) is chunk
        ]
        return min(orders, default=None)

    def find_listing(self, chunk: Chunk, copy: Copy, family: Family | None) -> tuple[object, ...] | None:
        """How the copy should be listed now: None when it may not be evicted.

        A copy with staying children in the same place is not a leaf there. The only copy of a chunk with children
        anywhere may go no further than to a lower tier. Superseded and deleted chunks are dropped without asking a
        policy.
        """
        if not copy.is_idle or copy.leaving or chunk.superseded or chunk.is_doomed:
            return None
        if family is not None and family.staying.get(copy.place):
            return None
        is_held = family is not None and self.is_held(chunk, copy)
        if is_held and (chunk.key in self._aside or not self._fleet.has_below(copy.place)):
            return None
        return (chunk.expired and chunk.next_use is None, chunk.last_used, chunk.next_use)

    def _relist(self, chunk: Chunk, copy: Copy, listing: tuple[object, ...] | None) -> None:
        place, key = copy.place, chunk.key
        was_expired, is_expired = _is_expired(copy.listed_as), _is_expired(listing)
        if copy.listed_as is not None and (listing is None or was_expired != is_expired):
            if was_expired:
                del self.expired[place][key]
            else:
                del self.ordered[place][key]
                evicted = copy.leaving or (copy.state is CopyState.DROPPING and copy.cause is Cause.EVICTED)
                self._guard.tell(self._policy, "remove", lambda: self._policy.remove(place, key, evicted=evicted))
        copy.listed_as = listing
        if listing is None:
            return
        if is_expired:
            self.expired.setdefault(place, {})[key] = None
        else:
            self.ordered.setdefault(place, {})[key] = None
            self._guard.tell(self._policy, "add", lambda: self._policy.add(place, chunk))


def _is_expired(listing: tuple[object, ...] | None) -> bool:
    return listing is not None and bool(listing[0])


def _has_other(chunk: Chunk, copy: Copy) -> bool:
    return any(
        other is not copy and other.state is CopyState.RESIDENT and not other.leaving for other in chunk.copies.values()
    )


def _problem_with(keys: Sequence[ChunkKey], wanted: int, ordered: dict[ChunkKey, None]) -> str | None:
    if len(keys) != wanted or len(set(keys)) != wanted:
        return f"named {len(set(keys))} chunks, not {wanted}"
    strangers = [key for key in keys if key not in ordered]
    return f"named chunks that may not be evicted: {strangers[:3]}" if strangers else None
