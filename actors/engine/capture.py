"""Which chunks of which turn are being written, and when one goes to the saver.

A chunk that is computed, or restored to be extended, has a slot in the write buffer from its first token on. When it is
full, or its turn ends, the saver gets it, together with the blocks that hold its values. A turn that finds no free slot
stops saving: the chunks behind a missing one could never be reached.
"""

from __future__ import annotations

from torch import Tensor, arange, cat, full

from actors.engine.blocks import BlockPool
from actors.engine.save import ReadyChunks, SaveJob, Saver, WriteBuffer
from actors.engine.sequence import Sequence


class Capture:
    """Slots and save jobs of all turns. Belongs to the engine's thread; never waits."""

    def __init__(self, blocks: BlockPool, buffer: WriteBuffer, saver: Saver, ready: ReadyChunks) -> None:
        self._blocks, self._buffer, self._saver, self._ready = blocks, buffer, saver, ready
        self.num_skipped = 0
        """Turns that stopped saving for want of a slot."""

    @property
    def num_saving(self) -> int:
        return self._saver.num_running

    def reserve(self, sequence: Sequence, start: int, end: int) -> None:
        """Slots for the chunks that the tokens [start, end) lie in, as far as there are any."""
        size = sequence.chunk_tokens
        for index in range(start // size, -(-end // size)):
            if index in sequence.slots:
                continue
            if not sequence.saving:
                return
            slot = self._buffer.take() if start <= index * size else None
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

    def forget_other_slots(self, sequence: Sequence) -> None:
        """After a restore: only the chunk that the next token belongs to keeps its slot."""
        current = sequence.num_computed // sequence.chunk_tokens
        for index in [i for i in sequence.slots if i != current]:
            self._buffer.release(sequence.slots.pop(index))

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

    def hand_over_full(self, sequence: Sequence) -> None:
        """Chunks that are complete go to the saver."""
        size = sequence.chunk_tokens
        for index in sorted(sequence.slots):
            if (index + 1) * size <= sequence.num_computed:
                self._hand_over(sequence, index, (index + 1) * size)

    def close(self, sequence: Sequence, *, keep: bool) -> None:
        """The turn ends: what it has of its last chunk goes to the saver (with `keep`), its slots are free."""
        if keep:
            self.hand_over_full(sequence)
            index, num_tokens = divmod(sequence.num_computed, sequence.chunk_tokens)
            if num_tokens and index in sequence.slots:
                self._hand_over(sequence, index, sequence.num_computed)
        for slot in sequence.slots.values():
            self._buffer.release(slot)
        sequence.slots.clear()

    def settle(self) -> None:
        """Slots and blocks of finished save jobs are free again."""
        for job in self._saver.settled():
            self._buffer.release(job.slot)
            self._blocks.release(job.blocks)

    def _hand_over(self, sequence: Sequence, index: int, end: int) -> None:
        slot = sequence.slots.pop(index)
        span = sequence.chunk_span(index, end)
        if span.key in sequence.known_keys or span.key in self._ready or not self._ready.has_room():
            self._buffer.release(slot)
            return
        size = sequence.table.block_tokens
        blocks = tuple(sequence.table.blocks[span.start // size : -(-end // size)])
        self._blocks.hold(blocks)
        rows = sequence.table.rows(span.start, end)
        root = sequence.request.root
        self._saver.submit(SaveJob(turn_id=sequence.turn_id, root=root, span=span, slot=slot, blocks=blocks, rows=rows))
