"""A turn inside the engine: its tokens, how far they are computed, what it holds, and the states it goes through.

      ┌──────────┐ (given up: its rows are not safe)
    QUEUED ──> RESTORING ──> WAITING ──> RUNNING ──> FINISHED
       └───────────────────────^            any state ──^

This file decides nothing and touches no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from actors.engine.batching import Demand, Phase
from actors.engine.blocks import BlockTable
from actors.engine.params import seed_of
from actors.engine.sampling import SamplingRow
from actors.engine.text import TextStream
from actors.engine.turns import FailedRestore, FinishReason, Request, RestoreSource
from storage.keys import chain


class SequenceState(StrEnum):
    QUEUED = "queued"
    """Holds nothing; its blocks are not free yet."""
    RESTORING = "restoring"
    """Holds its blocks; a loader writes into them."""
    WAITING = "waiting"
    """What could be restored is in place; no forward has seen it yet."""
    RUNNING = "running"
    FINISHED = "finished"


MOVES = {
    SequenceState.QUEUED: {SequenceState.RESTORING, SequenceState.WAITING, SequenceState.FINISHED},
    SequenceState.RESTORING: {SequenceState.WAITING, SequenceState.QUEUED, SequenceState.FINISHED},
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.FINISHED},
    SequenceState.FINISHED: set(),
}

_PHASES = {
    SequenceState.QUEUED: Phase.QUEUED,
    SequenceState.RESTORING: Phase.LOADING,
    SequenceState.WAITING: Phase.COMPUTING,
    SequenceState.RUNNING: Phase.COMPUTING,
}

_NEXT_PROMPT_TOKENS = 128
_MOST_GROWTH = 256  # beyond doubling: few answers are as long as they may be


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """Identity of the tokens [start, start + len(token_ids)) of a turn as a chunk."""

    start: int
    token_ids: tuple[int, ...]
    parent: str | None
    marks: tuple[tuple[int, str], ...]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def key(self) -> str:
        return self.marks[-1][1]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a source that this turn wants, and what must be in it."""

    source: RestoreSource
    token_ids: tuple[int, ...]
    """At most source.num_tokens: the last token of a prompt is always computed, for its logits."""
    parent: str | None
    """Key of the prefix in front of the chunk."""

    @property
    def start(self) -> int:
        return self.source.start

    @property
    def end(self) -> int:
        return self.source.start + len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Of the whole chunk: it is read and verified whole."""
        return self.source.num_bytes


class Sequence:
    """One turn. Owned by the engine's thread."""

    def __init__(self, request: Request, arrival: int, table: BlockTable, chunk_tokens: int) -> None:
        self.request = request
        self.arrival = arrival
        self.table = table
        self.chunk_tokens = chunk_tokens
        self.token_ids = list(request.token_ids)
        self.num_computed = 0
        self.islands: list[tuple[int, int]] = []
        """Spans ahead of `num_computed` whose KV is in place: jumped over when they are reached."""
        self.state = SequenceState.QUEUED
        self.added_at = time.monotonic()
        self.admitted_at = self.added_at
        self.text: TextStream | None = None
        """Set for turns that have stop strings."""
        self.num_in_hbm = 0
        """Tokens whose blocks it found in the pool."""
        self.failed_restore: tuple[FailedRestore, ...] | None = None
        """Set once its restore was given up: it is not tried again."""
        self.slots: dict[int, int] = {}
        """Write-buffer slot of each open chunk, by chunk index."""
        self.saving = request.save
        """False once a chunk could not be captured: what follows it could never be reached."""
        self.keeping = request.save
        """False once a chunk of it is kept by another turn in other blocks."""
        self.doomed = False
        """Its conversation was deleted: nothing of it is kept or offered."""
        self.stored: set[int] = set()
        """Chunks (by index) that the store has whole: not captured, even where they are computed."""
        self.known_keys: set[str] = set()
        """Prefixes that the store holds, as the restored chunks' marks say: not offered again."""
        self.num_settled_chunks = 0
        """Full chunks that were handed to the saver and to the pool's index, or were there already."""
        self.cuts: set[int] = {*request.cuts, request.num_prompt}
        self._keys = [request.root]  # key of [0, i * chunk_tokens)

    @property
    def turn_id(self) -> str:
        return self.request.turn_id

    def move_to(self, state: SequenceState) -> None:
        if state not in MOVES[self.state]:
            raise AssertionError(f"turn {self.turn_id} cannot go from {self.state} to {state}")
        self.state = state

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Those of earlier attempts included."""
        return self.num_tokens - self.request.num_prompt

    @property
    def expected_growth(self) -> int:
        """Tokens that this turn and the conversation's next one may add: room for them is worth leaving."""
        num_left = self.request.sampling.max_new_tokens - self.num_generated
        return min(2 * num_left + _NEXT_PROMPT_TOKENS, self.num_tokens + _MOST_GROWTH)

    def demand(self, num_shared_blocks: int | None = None) -> Demand:
        """`num_shared_blocks`: for one that is queued, blocks it would share with running turns."""
        return Demand(
            turn_id=self.turn_id,
            arrival=self.arrival,
            phase=_PHASES[self.state],
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            num_blocks=len(self.table.blocks) if num_shared_blocks is None else num_shared_blocks,
            stop=self.islands[0][0] if self.islands else None,
        )

    @cached_property
    def _fallback_seed(self) -> int:
        return seed_of(self.turn_id)

    def push(self, token_id: int) -> None:
        """A token was sampled."""
        self.token_ids.append(token_id)
        self._read(token_id, self.num_generated)

    def open_text(self, tokenizer: Any) -> None:
        """Starts looking for stop strings, in what an earlier attempt generated as well."""
        if self.request.sampling.stop:
            self.text = TextStream(tokenizer, self.request.sampling.stop)
            for i in range(self.request.num_prompt, self.num_tokens):
                self._read(self.token_ids[i], i + 1 - self.request.num_prompt)

    def _read(self, token_id: int, num_generated: int) -> None:
        if self.text is not None and num_generated >= self.request.sampling.min_new_tokens:
            self.text.push(token_id)

    def advance(self, num_computed: int) -> None:
        """The tokens up to here are in the pool; islands that this reaches are too."""
        self.num_computed = num_computed
        while self.islands and self.islands[0][0] <= self.num_computed:
            self.num_computed = max(self.num_computed, self.islands.pop(0)[1])

    def found(self, num_tokens: int, marks: Iterable[tuple[int, str]]) -> None:
        """The tokens [0, num_tokens) are in the pool; the chunk they end in has these marks."""
        self.num_computed = self.num_in_hbm = num_tokens
        self.known_keys.update(key for _, key in marks)
        self.cuts.update(end for end, _ in marks)

    def restorable_end(self, start: int) -> int:
        """Up to where the chunk that begins at `start` could be restored from the store; 0 if it is not there."""
        ends = (min(source.end, self.num_tokens - 1) for source in self.request.restore if source.start == start)
        return next(ends, 0) if self.failed_restore is None else 0

    def begin_again(self, table: BlockTable) -> None:
        """Nothing of it is in the pool any more, and nothing will be loaded."""
        self.table = table
        self.num_computed = self.num_in_hbm = self.num_settled_chunks = 0
        self.islands, self.stored = [], set()
        self.saving = self.keeping = self.request.save
        self.move_to(SequenceState.QUEUED)

    def adopt(self, spans: Iterable[tuple[int, int]], marks: Iterable[tuple[int, str]]) -> None:
        """These spans were restored, from chunks with these marks."""
        self.islands = list(spans)
        self.known_keys.update(key for _, key in marks)
        last = self.islands[-1][1] if self.islands else 0
        self.cuts.update(end for end, _ in marks if end <= last)
        self.advance(self.num_computed)

    def sampling_row(self, eos_token_ids: tuple[int, ...]) -> SamplingRow:
        return SamplingRow(
            params=self.request.sampling,
            token_ids=self.token_ids,
            num_prompt=self.request.num_prompt,
            num_generated=self.num_generated,
            eos_token_ids=eos_token_ids,
            fallback_seed=self._fallback_seed,
        )

    def finish_reason(self, eos_token_ids: tuple[int, ...], max_tokens: int) -> FinishReason | None:
        """Whether the turn ends with its last token. `max_tokens`: prompt and answer together."""
        params, last = self.request.sampling, self.token_ids[-1]
        may_stop = self.num_generated >= params.min_new_tokens
        if may_stop and (last in params.stop_token_ids or (last in eos_token_ids and not params.ignore_eos)):
            return FinishReason.STOP
        if may_stop and self.text is not None and self.text.stopped:
            return FinishReason.STOP
        if self.num_generated >= params.max_new_tokens or self.num_tokens >= max_tokens:
            return FinishReason.LENGTH
        return None

    def chunk_span(self, index: int, end: int) -> ChunkSpan:
        """Chunk `index` up to the token `end` (exclusive), with a mark at every cut inside."""
        start = index * self.chunk_tokens
        parent = self.key_before(index)
        tokens = tuple(self.token_ids[start:end])
        cuts = [cut - start for cut in self.cuts if start < cut < end]
        marks = chain(parent, tokens, self.chunk_tokens, cuts)
        return ChunkSpan(
            start=start,
            token_ids=tokens,
            parent=parent if index else None,
            marks=tuple((start + offset, key) for offset, key in marks),
        )

    def begins_with(self, marks: Set[str]) -> bool:
        """Whether a prefix of it has one of these keys, as far as its chunks and cuts tell."""
        root = self.request.root
        return root in marks or any(
            key in marks for _, key in chain(root, self.token_ids, self.chunk_tokens, self.cuts)
        )

    def pieces(self, start: int) -> tuple[Piece, ...]:
        """What can be restored from `start` on (the beginning of a chunk, or the end of all sources): all sources,
        except that the last token is always computed, for its logits."""
        if self.failed_restore is not None:
            return ()
        pieces = []
        for source in self.request.restore:
            if source.start < start:
                continue
            tokens = tuple(self.token_ids[source.start : min(source.end, self.num_tokens - 1)])
            if tokens:
                index = source.start // self.chunk_tokens
                parent = self.key_before(index) if index else None
                pieces.append(Piece(source=source, token_ids=tokens, parent=parent))
        return tuple(pieces)

    def key_before(self, index: int) -> str:
        """Key of the prefix in front of chunk `index`."""
        for i in range(len(self._keys) - 1, index):
            tokens = self.token_ids[i * self.chunk_tokens : (i + 1) * self.chunk_tokens]
            self._keys.append(chain(self._keys[-1], tokens, self.chunk_tokens)[-1][1])
        return self._keys[index]
