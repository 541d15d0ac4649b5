"""What becomes of computed chunks: which have a slot in the write buffer, when one goes to the saver, what stays here.

A chunk that is computed, or restored to be extended, has a slot in the write buffer from its first token on. When it is
full, or its turn ends, the saver gets it, together with the blocks that hold its values, and it may stay in the pool
for later turns. A turn that finds no free slot stops saving: the chunks behind a missing one could never be reached.
"""

from __future__ import annotations

import time

from torch import Tensor, arange, cat, full

from actors.engine.blocks import BlockPool
from actors.engine.kept import KeptChunk, KeptChunks
from actors.engine.save import ReadyChunks, SaveJob, Saver, WriteBuffer
from actors.engine.sequence import ChunkSpan, Sequence, SequenceState


class Capture:
    """Slots, save jobs and kept chunks of all turns. Belongs to the engine's thread; never waits."""

    def __init__(
        self, blocks: BlockPool, buffer: WriteBuffer, saver: Saver, ready: ReadyChunks, kept: KeptChunks | None
    ) -> None:
        self._blocks, self._buffer, self._saver, self._ready, self._kept = blocks, buffer, saver, ready, kept
        self._used: dict[str, list[KeptChunk]] = {}  # by turn
        self.num_skipped = 0
        """Turns that stopped saving for want of a slot."""

    @property
    def num_saving(self) -> int:
        return self._saver.num_running

    # --- slots --------------------------------------------------------------------------------------------------------

    def reserve(self, sequence: Sequence, start: int, end: int) -> None:
        """Slots for the chunks that the tokens [start, end) lie in, as far as there are any."""
        size = sequence.chunk_tokens
        for index in range(start // size, -(-end // size)):
            if index in sequence.slots or index in sequence.stored:
                continue
            if not sequence.saving:
                return
            slot = self._take_slot() if start <= index * size else None
            if slot is None:
                sequence.saving = False
                self.num_skipped += 1
                return
            sequence.slots[index] = slot

    def reserve_tail(self, sequence: Sequence, end: int) -> int | None:
        """A slot for the part-filled chunk that a restore up to `end` ends in. None: it ends with a full chunk, or no
        slot is free."""
        index, num_tokens = divmod(end, sequence.chunk_tokens)
        if num_tokens:
            self.reserve(sequence, index * sequence.chunk_tokens, end)
        return sequence.slots.get(index)

    def keep_slot(self, sequence: Sequence, index: int) -> None:
        """The turn goes on with this chunk, not where its restore was to end: later ones give their slots back."""
        for other in [i for i in sequence.slots if i != index]:
            self._buffer.release(sequence.slots.pop(other))

    def rows(self, sequence: Sequence, start: int, end: int) -> Tensor:
        """Write-buffer row (CPU) of each token of [start, end); tokens that nobody saves share one row."""
        size = sequence.chunk_tokens
        parts = []
        for index in range(start // size, -(-end // size)):
            low, high = max(start, index * size), min(end, (index + 1) * size)
            if index in sequence.slots:
                first = self._buffer.row(sequence.slots[index], low - index * size)
                parts.append(arange(first, first + high - low))
            else:
                parts.append(full((high - low,), self._buffer.unsaved_row))
        return parts[0] if len(parts) == 1 else cat(parts)

    def _take_slot(self) -> int | None:
        slot = self._buffer.take()
        if slot is None and self._kept is not None and self._kept.give_slot():
            slot = self._buffer.take()
        return slot

    # --- chunks -------------------------------------------------------------------------------------------------------

    def use(self, sequence: Sequence, chunks: tuple[KeptChunk, ...]) -> None:
        """The turn shares these kept chunks until it is closed."""
        assert self._kept is not None
        self._kept.share(chunks, time.monotonic())
        self._used.setdefault(sequence.turn_id, []).extend(chunks)
        sequence.num_settled_chunks = len(chunks)

    def settle_chunks(self, sequence: Sequence) -> None:
        """Chunks that are complete go to the saver, and stay in the pool from now on."""
        size = sequence.chunk_tokens
        while (sequence.num_settled_chunks + 1) * size <= sequence.num_computed:
            index = sequence.num_settled_chunks
            sequence.num_settled_chunks += 1
            slot = sequence.slots.pop(index, None)
            wanted = self._kept is not None and sequence.keeping and not sequence.doomed
            if slot is None and not wanted:
                continue
            span = sequence.chunk_span(index, (index + 1) * size)
            if slot is not None:
                self._offer(sequence, span, slot)
                self._buffer.release(slot)
            if wanted:
                self._keep(sequence, span)

    def close(self, sequence: Sequence, *, is_sound: bool) -> None:
        """The turn ends: what it has of its last chunk goes to the saver and stays; its slots are free.

        Not `is_sound`: its KV may be bad; what it shared or offered to share is found by nobody any more.
        """
        if is_sound:
            self.settle_chunks(sequence)
            if sequence.state is not SequenceState.RESTORING:
                self._close_tail(sequence)
        used = self._used.pop(sequence.turn_id, [])
        if not is_sound and self._kept is not None:
            self._kept.drop(used)
        for slot in sequence.slots.values():
            self._buffer.release(slot)
        sequence.slots.clear()
        if self._kept is not None:
            self._kept.release(used, time.monotonic())

    def settle(self) -> None:
        """Slots and blocks of finished save jobs are free again."""
        for job in self._saver.settled():
            self._buffer.release(job.slot)
            self._blocks.unpin(job.blocks)

    def _close_tail(self, sequence: Sequence) -> None:
        index, num_tokens = divmod(sequence.num_computed, sequence.chunk_tokens)
        if not num_tokens or index not in sequence.slots:
            return
        slot = sequence.slots.pop(index)
        span = sequence.chunk_span(index, sequence.num_computed)
        self._offer(sequence, span, slot)
        used = self._used.get(sequence.turn_id)
        is_torn = used and self._kept is not None and not self._kept.holds(used[-1])
        wanted = self._kept is not None and sequence.keeping and not sequence.doomed and not is_torn
        if self._kept is None or not wanted or span.key in self._kept:
            self._buffer.release(slot)
        else:
            parent = sequence.key_before(index)
            self._kept.add(span, parent, self._blocks_of(sequence, span), time.monotonic(), slot)

    def _keep(self, sequence: Sequence, span: ChunkSpan) -> None:
        """The turn uses every chunk in front of one that it adds. A chunk that another has computed at the same time
        ends that, and so does one that was dropped: what follows is not kept."""
        assert self._kept is not None
        used = self._used.setdefault(sequence.turn_id, [])
        if span.key in self._kept or (used and not self._kept.holds(used[-1])):
            sequence.keeping = False
            return
        parent = sequence.key_before(span.start // sequence.chunk_tokens)
        chunk = self._kept.add(span, parent, self._blocks_of(sequence, span), time.monotonic())
        used.append(chunk)

    def _offer(self, sequence: Sequence, span: ChunkSpan, slot: int) -> None:
        """The saver encodes it, unless the store has it, or may not have it, or nobody takes more."""
        if sequence.doomed or span.key in sequence.known_keys or span.key in self._ready or not self._ready.has_room():
            return
        blocks = self._blocks_of(sequence, span)
        self._blocks.pin(blocks)
        self._buffer.hold(slot)
        rows = sequence.table.rows(span.start, span.end)
        root = sequence.request.root
        self._saver.submit(SaveJob(turn_id=sequence.turn_id, root=root, span=span, slot=slot, blocks=blocks, rows=rows))

    @staticmethod
    def _blocks_of(sequence: Sequence, span: ChunkSpan) -> tuple[int, ...]:
        size = sequence.table.block_tokens
        return tuple(sequence.table.blocks[span.start // size : -(-span.end // size)])
