"""From the forward to a chunk on offer: WriteBuffer (raw keys as they are computed), Saver (encodes), ReadyChunks.

    forward ── raw K, one scatter per layer ──> WriteBuffer slot ─┐
                                                                  ├─ saver thread: encode ──> ReadyChunks ── take_chunk
    KVPool blocks (V, held until copied) ─────────────────────────┘

Values are not captured: they lie in the pool as they are. Saving never waits and is never waited for: without a free
slot a chunk is not captured, without room on offer the newest chunk is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.pending import Pending
from actors.engine.sequence import ChunkSpan
from actors.engine.transfer import Fence, Transfer
from actors.engine.turns import ReadyChunk
from storage.format import ChunkHeader, LayerShape, Layout, encode

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


class WriteBuffer:
    """Slots of `chunk_tokens` raw, paired keys per layer. The slot ids belong to the engine's thread."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_slots: int,
        chunk_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots, self.chunk_tokens = num_slots, chunk_tokens
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders = [0] * num_slots
        # One row more than the slots need: tokens that nobody saves go there, so that one scatter serves all.
        self._keys = [
            torch.zeros(num_slots * chunk_tokens + 1, shape.num_kv_heads, shape.k_dim, dtype=dtype, device=device)
            for shape in layers
        ]

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def unsaved_row(self) -> int:
        return self.num_slots * self.chunk_tokens

    def take(self) -> int | None:
        """A slot with one holder; None if none is free."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._holders[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """One more holder: a loader that fills it, a saver that reads it, a tail that is kept."""
        assert self._holders[slot], "a free slot cannot be held"
        self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """One holder less; without any the slot is free. ValueError if it is so already."""
        if not self._holders[slot]:
            raise ValueError(f"write-buffer slot {slot} is free already")
        self._holders[slot] -= 1
        if not self._holders[slot]:
            self._free.append(slot)

    def check(self) -> None:
        """AssertionError unless free list and holders agree."""
        assert {slot for slot, n in enumerate(self._holders) if n == 0} == set(self._free), "a slot is lost"

    def row(self, slot: int, offset: int) -> int:
        return slot * self.chunk_tokens + offset

    def capture(self, layer: int, rows: Tensor, keys: Tensor) -> None:
        """Raw paired keys [T, H, D] to `rows` [T] (on the buffer's device)."""
        self._keys[layer].index_copy_(0, rows, keys)

    def put(self, layer: int, slot: int, keys: Tensor, offset: int = 0) -> None:
        """The slot's tokens from `offset` on: raw paired keys [n, H, D]."""
        first = self.row(slot, offset)
        self._keys[layer][first : first + keys.shape[0]].copy_(keys)

    def get(self, layer: int, slot: int, num_tokens: int) -> Tensor:
        """View [num_tokens, H, D] of the slot's first tokens."""
        first = self.row(slot, 0)
        return self._keys[layer][first : first + num_tokens]


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """A chunk to encode. It holds its slot and pins its blocks until the future is done."""

    turn_id: str
    root: str
    span: ChunkSpan
    slot: int
    blocks: tuple[int, ...]
    rows: Tensor
    """Pool rows (CPU) of the chunk's tokens."""


class ReadyChunks:
    """Chunks on offer, each with the future of its bytes. Thread-safe; at most `limit` at a time.

    A chunk is announced when its turn hands it over, not when it is encoded: whoever hears of a finished turn has heard
    of its chunks, and waits a moment in `take` at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_dropped = 0
        self._lock = Lock()
        self._offers: dict[str, tuple[ReadyChunk, Future[Bytes]]] = {}
        self._news: list[ReadyChunk] = []

    def has_room(self) -> bool:
        """Whether one more may be announced; counts a drop if not."""
        with self._lock:
            if len(self._offers) < self.limit:
                return True
            self.num_dropped += 1
            return False

    def announce(self, chunk: ReadyChunk, data: Future[Bytes]) -> None:
        with self._lock:
            self._offers[chunk.header.key] = (chunk, data)
            self._news.append(chunk)

    def news(self) -> list[ReadyChunk]:
        """What was announced since the last call and is still here."""
        with self._lock:
            news, self._news = self._news, []
            return [chunk for chunk in news if chunk.header.key in self._offers]

    def take(self, key: str) -> Bytes:
        """The chunk's bytes, as soon as they are encoded; they leave the buffer. KeyError if they are not here."""
        with self._lock:
            _, data = self._offers.pop(key)
        return data.result()

    def drop(self, key: str) -> None:
        """Forgets a chunk; unknown keys are fine."""
        with self._lock:
            self._offers.pop(key, None)

    def drop_marked(self, marks: Set[str]) -> None:
        """Forgets the chunks that hold one of these marks, and what goes on from them."""
        with self._lock:
            doomed = set(marks)
            headers = sorted((chunk.header for chunk, _ in self._offers.values()), key=lambda header: header.start)
            for header in headers:
                parent = header.parent if header.start else header.root
                if parent in doomed or any(key in doomed for _, key in header.marks):
                    doomed.add(header.key)
                    del self._offers[header.key]

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._offers

    @property
    def num_chunks(self) -> int:
        with self._lock:
            return len(self._offers)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(chunk.num_bytes for chunk, _ in self._offers.values())


class Saver:
    """One thread that turns captured chunks into bytes, in the order they were handed over."""

    def __init__(
        self,
        transfer: Transfer,
        ready: ReadyChunks,
        layers: tuple[LayerShape, ...],
        dtype_name: str,
        wake: Callable[[], None],
    ) -> None:
        self._transfer, self._ready = transfer, ready
        self._layers, self._dtype_name, self._wake = layers, dtype_name, wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._running = Pending[SaveJob]()

    def submit(self, job: SaveJob) -> None:
        """Announces the chunk and encodes it in the background."""
        header = ChunkHeader(
            key=job.span.key,
            parent=job.span.parent,
            root=job.root,
            start=job.span.start,
            token_ids=job.span.token_ids,
            marks=job.span.marks,
            dtype=self._dtype_name,
            layers=self._layers,
        )
        layout = Layout.of(header)
        future = self._executor.submit(self._save, job, layout, self._transfer.computed())
        self._ready.announce(ReadyChunk(turn_id=job.turn_id, header=header, num_bytes=layout.num_bytes), future)
        self._running.add(job, future)
        future.add_done_callback(lambda _: self._wake())

    @property
    def num_running(self) -> int:
        return len(self._running)

    def settled(self) -> list[SaveJob]:
        """Jobs that are over since the last call: what they held may go. A failed one has left a line in the log."""
        done = self._running.take_done()
        for job, future in done:
            error = future.exception()
            if error is not None:
                log.error("chunk %s of turn %s was not saved", job.span.key, job.turn_id, exc_info=error)
                self._ready.drop(job.span.key)
        return [job for job, _ in done]

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _save(self, job: SaveJob, layout: Layout, computed: Fence) -> Bytes:
        self._transfer.begin_save(computed)
        return self._encode(job, layout)

    def _encode(self, job: SaveJob, layout: Layout) -> Bytes:
        at = self._transfer.locate(job.rows, job.span.start, job.slot)
        with torch.inference_mode():
            return encode(layout.header, self._transfer.read(at), layout)
