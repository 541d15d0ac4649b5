"""HBM as a tier: chunks whose blocks stay in the pool after their turn, and while it runs, for others that begin alike.

    full chunks   found by their key; any number of turns share their blocks, nobody writes to them
    tails         part-filled last chunks, found below their parent; taken, not shared: the next turn of the
                  conversation goes on writing in the same blocks, and in the write-buffer slot with the raw keys

A chunk leaves when its blocks (or its slot) are needed: leaves of the prefix tree before their parents, in the order of
an eviction policy. Bookkeeping only, for the engine's thread; the blocks themselves are BlockPool's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.engine.blocks import BlockPool, BlockState
from actors.engine.save import WriteBuffer
from actors.engine.sequence import ChunkSpan, Sequence

PLACE = "hbm"


@dataclass(slots=True, kw_only=True, eq=False)
class KeptChunk:
    """One chunk in the pool; the facts an eviction policy may ask for."""

    key: str
    parent: str
    """Key of the prefix in front of it; the root's where there is none."""
    start: int
    end: int
    num_bytes: int
    stored_at: float
    last_used: float
    next_use: tuple[int, int] | None = None
    token_ids: tuple[int, ...]
    marks: tuple[tuple[int, str], ...]
    blocks: tuple[int, ...]
    slot: int | None
    """Of a tail."""
    num_turns: int = 0
    """That run and use it."""
    num_uses: int = 1
    turn: int = 0
    """Of its conversation: unknown here, as is the length of its answer."""
    answer_tokens: int = 0

    @property
    def is_tail(self) -> bool:
        return self.slot is not None


class BlockEviction(Protocol):
    """An order over the chunks that may leave, as `policies.eviction.EvictionPolicy` keeps it."""

    def add(self, place: Any, chunk: Any) -> None:
        """May be evicted from now on; again for the same chunk: its facts changed."""

    def remove(self, place: Any, key: str) -> None:
        """Is no candidate any more."""

    def victims(self, place: Any, count: int) -> SequenceOf[str]:
        """The `count` candidates that go first, in order; all of them when there are fewer."""


class OldestFirst:
    """The dull order: whoever became a candidate first goes first."""

    def __init__(self) -> None:
        self._order: dict[str, None] = {}

    def add(self, place: Hashable, chunk: KeptChunk) -> None:  # noqa: ARG002 - the contract
        self._order.pop(chunk.key, None)
        self._order[chunk.key] = None

    def remove(self, place: Hashable, key: str) -> None:  # noqa: ARG002 - the contract
        del self._order[key]

    def victims(self, place: Hashable, count: int) -> SequenceOf[str]:  # noqa: ARG002 - the contract
        return [key for key, _ in zip(self._order, range(count))]


@dataclass(frozen=True, slots=True)
class Match:
    """The beginning of a prompt that is in the pool: full chunks from token 0, perhaps a tail behind them."""

    chunks: tuple[KeptChunk, ...] = ()
    tail: KeptChunk | None = None

    @property
    def all_chunks(self) -> tuple[KeptChunk, ...]:
        return self.chunks if self.tail is None else (*self.chunks, self.tail)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that some turn holds already."""
        return sum(len(chunk.blocks) for chunk in self.chunks if chunk.num_turns)


@dataclass
class KeptChunks:
    """The index. `blocks` and `buffer` are told who keeps what."""

    blocks: BlockPool
    buffer: WriteBuffer
    eviction: BlockEviction
    bytes_per_token: int
    place: Hashable = PLACE
    num_evicted: int = 0
    _by_key: dict[str, KeptChunk] = field(default_factory=dict)
    _candidates: dict[str, KeptChunk] = field(default_factory=dict)
    _tails: dict[str, dict[str, KeptChunk]] = field(default_factory=dict)  # by their parents
    _wanted: dict[str, tuple[int, int]] = field(default_factory=dict)
    _num_children: Counter[str] = field(default_factory=Counter)  # by the parent's key, be it here or not

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_tails(self) -> int:
        return sum(len(tails) for tails in self._tails.values())

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def match(self, sequence: Sequence) -> Match:
        """How much of a waiting turn's prompt is here. Its last token is never taken from here: it is computed."""
        chunks: list[KeptChunk] = []
        size, last = sequence.chunk_tokens, sequence.num_tokens - 1
        while (len(chunks) + 1) * size <= last:
            chunk = self._by_key.get(sequence.key_before(len(chunks) + 1))
            if chunk is None:
                break
            chunks.append(chunk)
        return Match(tuple(chunks), self._match_tail(sequence, len(chunks), last))

    def _match_tail(self, sequence: Sequence, index: int, last: int) -> KeptChunk | None:
        """The longest tail behind these full chunks that the prompt goes on from."""
        tails = self._tails.get(sequence.key_before(index), {}).values()
        fitting = sorted((tail for tail in tails if tail.end <= last), key=lambda tail: -tail.end)
        return next((t for t in fitting if tuple(sequence.token_ids[t.start : t.end]) == t.token_ids), None)

    def add(
        self, span: ChunkSpan, parent: str, blocks: Iterable[int], now: float, slot: int | None = None
    ) -> KeptChunk:
        """A chunk that a turn has computed or loaded, whose key is not here yet. A full chunk is used by that turn from
        now on; of a tail the caller's hold on its slot passes to the index."""
        chunk = KeptChunk(
            key=span.key,
            parent=parent,
            start=span.start,
            end=span.end,
            num_bytes=len(span.token_ids) * self.bytes_per_token,
            stored_at=now,
            last_used=now,
            token_ids=span.token_ids,
            marks=span.marks,
            blocks=tuple(blocks),
            slot=slot,
            num_turns=0 if slot is not None else 1,
        )
        assert chunk.key not in self._by_key
        self.blocks.keep(chunk.blocks)
        self._by_key[chunk.key] = chunk
        if chunk.is_tail:
            self._tails.setdefault(parent, {})[chunk.key] = chunk
        self._count_child(chunk, 1)
        self._relist(chunk)
        return chunk

    def share(self, chunks: Iterable[KeptChunk], now: float) -> None:
        """A turn uses these full chunks: it holds their blocks from now on."""
        for chunk in chunks:
            chunk.num_turns += 1
            chunk.num_uses += 1
            chunk.last_used = now
            self.blocks.hold(chunk.blocks)
            self._relist(chunk)

    def take_tail(self, tail: KeptChunk) -> int:
        """A turn goes on with this tail: its blocks and the hold on its slot, which is returned, are the turn's."""
        assert tail.slot is not None
        slot = tail.slot
        self.buffer.hold(slot)
        self.blocks.hold(tail.blocks)
        self._forget(tail)
        return slot

    def release(self, chunks: Iterable[KeptChunk], now: float) -> None:
        """A turn uses these full chunks no longer; it releases their blocks itself."""
        for chunk in chunks:
            chunk.num_turns -= 1
            chunk.last_used = now
            self._relist(chunk)

    def note_waiting(self, matches: Iterable[tuple[int, Match]]) -> None:
        """All turns that wait for blocks, by arrival, with what they would find here."""
        wanted: dict[str, tuple[int, int]] = {}
        for arrival, match in matches:
            for chunk in match.all_chunks:
                wanted[chunk.key] = min((0, arrival), wanted.get(chunk.key, (0, arrival)))
        for key in self._wanted.keys() | wanted.keys():
            known = self._by_key.get(key)
            if known is not None and known.next_use != wanted.get(key):
                known.next_use = wanted.get(key)
                self._relist(known)
        self._wanted = wanted

    def holds(self, chunk: KeptChunk) -> bool:
        """Whether it is still here: not evicted, nor dropped."""
        return self._by_key.get(chunk.key) is chunk

    def drop(self, chunks: Iterable[KeptChunk]) -> None:
        """Nobody finds these any more, nor what follows them. Turns that use them go on, and add nothing behind."""
        doomed = {chunk.key for chunk in chunks if self.holds(chunk)}
        while doomed:
            children = {chunk.key for chunk in self._by_key.values() if chunk.parent in doomed} - doomed
            for key in doomed:
                self._forget(self._by_key[key])
            doomed = children

    def drop_marked(self, marks: Set[str]) -> None:
        """`drop` for all chunks that hold one of these marks, or whose prefix is one."""
        self.drop([chunk for chunk in self._by_key.values() if _holds(chunk, marks)])

    def make_room(self, num_free: int) -> None:
        """Evicts until so many blocks are free, as far as evicting helps."""
        while self.blocks.num_free < num_free and self._candidates:
            self._forget(self._first_victim())
            self.num_evicted += 1

    def give_slot(self) -> bool:
        """Evicts the tail that goes first, for its slot; False if no tail can go."""
        for key in self._order(len(self._candidates)):
            chunk = self._candidates[key]
            if chunk.is_tail:
                self._forget(chunk)
                self.num_evicted += 1
                return True
        return False

    def clear(self) -> None:
        """Everything that no turn uses leaves."""
        while self._candidates:
            self._forget(self._first_victim())

    def _first_victim(self) -> KeptChunk:
        return self._candidates[self._order(1)[0]]

    def _order(self, count: int) -> SequenceOf[str]:
        """What the policy says; the candidates as they came where it names a chunk that is none."""
        keys = self.eviction.victims(self.place, count)
        sound = [key for key in keys if key in self._candidates]
        return sound or list(self._candidates)[:count]

    def _forget(self, chunk: KeptChunk) -> None:
        if chunk.key in self._candidates:
            del self._candidates[chunk.key]
            self.eviction.remove(self.place, chunk.key)
        del self._by_key[chunk.key]
        self.blocks.let_go(chunk.blocks)
        if chunk.slot is not None:
            self.buffer.release(chunk.slot)
            tails = self._tails[chunk.parent]
            del tails[chunk.key]
            if not tails:
                del self._tails[chunk.parent]
        self._count_child(chunk, -1)

    def _count_child(self, chunk: KeptChunk, by: int) -> None:
        self._num_children[chunk.parent] += by
        if not self._num_children[chunk.parent]:
            del self._num_children[chunk.parent]
        parent = self._by_key.get(chunk.parent)
        if parent is not None:
            self._relist(parent)

    def _relist(self, chunk: KeptChunk) -> None:
        """Candidates are what no turn uses and nothing in the pool follows."""
        if not self.holds(chunk):
            return
        if not chunk.num_turns and not self._num_children[chunk.key]:
            self._candidates[chunk.key] = chunk
            self.eviction.add(self.place, chunk)
        elif chunk.key in self._candidates:
            del self._candidates[chunk.key]
            self.eviction.remove(self.place, chunk.key)

    def check(self) -> None:
        """AssertionError unless the index agrees with itself and with the pool."""
        for chunk in self._by_key.values():
            children = [c for c in self._by_key.values() if c.parent == chunk.key]
            assert len(children) == self._num_children[chunk.key], "children are miscounted"
            is_candidate = not chunk.num_turns and not children
            assert (chunk.key in self._candidates) == is_candidate, "a candidate is missing, or is none"
            states = {self.blocks.state(block) for block in chunk.blocks}
            held = chunk.num_turns > 0
            assert held == (BlockState.HELD in states), "a chunk's turns and its blocks' disagree"


def _holds(chunk: KeptChunk, marks: Set[str]) -> bool:
    return chunk.parent in marks or any(key in marks for _, key in chunk.marks)
