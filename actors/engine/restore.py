"""From chunks to blocks: loader threads open, verify, rotate and write what a turn can restore.

Layer by layer across all chunks of the turn, so that a layer is complete before the next begins: `layers_ready` counts
them. A chunk that cannot be opened, fails a checksum or holds other tokens than the turn's ends the reuse at its start;
the rest is recomputed and the reason reported. Nothing that was not verified is ever counted as restored.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.blocks import KVPool
from actors.engine.rope import Rotation
from actors.engine.save import WriteBuffer
from actors.engine.sequence import Piece
from actors.engine.turns import FailedRestore
from storage.format import ChunkHeader, ChunkReader, CorruptChunk, LayerShape

log = logging.getLogger(__name__)

# Chunk arrays are read-only views of shared memory; they are only ever read here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a loader managed: the tokens [0, num_tokens) are in the pool, in all layers."""

    num_tokens: int
    failed: tuple[FailedRestore, ...]
    marks: tuple[tuple[int, str], ...]
    """All marks of the chunks used, of which some may lie beyond num_tokens."""
    finished_at: float


@dataclass(kw_only=True)
class RestoreJob:
    """One turn's restore. `tail_slot`: where the raw keys of its part-filled last chunk go, to be extended later."""

    turn_id: str
    root: str
    pieces: tuple[Piece, ...]
    rows: Tensor
    """Pool rows (CPU) of the tokens [0, end of the last piece)."""
    tail_slot: int | None
    cancelled: Event = field(default_factory=Event)
    layers_ready: int = 0
    """Layers that are complete for all chunks that were good so far."""


class Loader:
    """A few threads that run restores, each restore on one of them."""

    def __init__(
        self,
        pool: KVPool,
        buffer: WriteBuffer,
        rotations: Sequence[Rotation | None],
        layers: tuple[LayerShape, ...],
        dtype: torch.dtype,
        num_threads: int,
        wake: Callable[[], None],
    ) -> None:
        self._pool, self._buffer, self._rotations = pool, buffer, rotations
        self._layers, self._dtype, self._wake = layers, dtype, wake
        self._executor = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="loader")
        self._running: dict[str, tuple[RestoreJob, Future[Restored]]] = {}

    def submit(self, job: RestoreJob) -> None:
        """Starts a restore; `settled` tells when it is over. Until then its rows and slot are the loader's."""
        future = self._executor.submit(self._restore, job)
        self._running[job.turn_id] = (job, future)
        future.add_done_callback(lambda _: self._wake())

    def cancel(self, turn_id: str) -> bool:
        """Asks a running restore to end soon, with nothing restored; False if there is none."""
        running = self._running.get(turn_id)
        if running is not None:
            running[0].cancelled.set()
        return running is not None

    def settled(self) -> list[tuple[str, Restored]]:
        """Restores that are over since the last call, by turn."""
        done = [(job, future) for job, future in self._running.values() if future.done()]
        for job, _ in done:
            del self._running[job.turn_id]
        return [(job.turn_id, _restored_or_nothing(job, future)) for job, future in done]

    def close(self) -> None:
        for turn_id in self._running:
            self.cancel(turn_id)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _restore(self, job: RestoreJob) -> Restored:
        failures: dict[int, Exception] = {}
        with ExitStack() as stack, torch.inference_mode():
            readers = self._open_all(job, stack, failures)
            num_good = len(readers)
            rows = job.rows.to(self._pool.device)
            for layer in range(len(self._layers)):
                num_good = self._load_layer(job, layer, readers[:num_good], rows, failures)
                job.layers_ready = layer + 1
            marks = tuple(mark for reader in readers[:num_good] for mark in reader.header.marks)
        return Restored(
            num_tokens=job.pieces[num_good - 1].end if num_good else 0,
            failed=_report(job, failures),
            marks=marks,
            finished_at=time.monotonic(),
        )

    def _open_all(self, job: RestoreJob, stack: ExitStack, failures: dict[int, Exception]) -> list[ChunkReader]:
        """Readers of the leading pieces that are what they should be; why the next one is not goes to `failures`."""
        readers: list[ChunkReader] = []
        for i, piece in enumerate(job.pieces):
            if job.cancelled.is_set():
                break
            try:
                reader = piece.source.open()
                stack.callback(reader.close)
                _check_header(reader.header, piece, job.root, self._layers, self._dtype)
            except Exception as error:
                log.warning("turn %s: cannot use chunk %s", job.turn_id, piece.source.key, exc_info=True)
                failures[i] = error  # a source may be anything: a file, an actor, a bucket
                break
            readers.append(reader)
        return readers

    def _load_layer(
        self,
        job: RestoreJob,
        layer: int,
        readers: Sequence[ChunkReader],
        rows: Tensor,
        failures: dict[int, Exception],
    ) -> int:
        """Writes one layer of every chunk; how many were good. Why the next one was not goes to `failures`."""
        for i, (piece, reader) in enumerate(zip(job.pieces, readers)):
            if job.cancelled.is_set():
                return 0
            try:
                self._write(job, layer, piece, rows[piece.start : piece.end], *reader.layer(layer))
            except Exception as error:
                log.warning("turn %s: cannot read chunk %s", job.turn_id, piece.source.key, exc_info=True)
                failures[i] = error  # as above: reading a layer goes to the source
                return i
        return len(readers)

    def _write(
        self,
        job: RestoreJob,
        layer: int,
        piece: Piece,
        rows: Tensor,
        keys: npt.NDArray[np.generic],
        values: npt.NDArray[np.generic],
    ) -> None:
        """One layer of one chunk: keys and values [H, n, D] as stored, of which this turn wants the first tokens."""
        raw_keys, plain_values = (
            _to_tensor(array, self._dtype)[:, : len(piece.token_ids)].to(self._pool.device).transpose(0, 1)
            for array in (keys, values)
        )
        rotation = self._rotations[layer]
        turned = raw_keys
        if rotation is not None:
            turned = rotation.rotate(raw_keys, rotation.table.upto(piece.end)[piece.start : piece.end])
        self._pool.write(layer, rows, turned, plain_values)
        if job.tail_slot is not None and piece is job.pieces[-1]:
            self._buffer.put(layer, job.tail_slot, raw_keys)


def _check_header(
    header: ChunkHeader, piece: Piece, root: str, layers: tuple[LayerShape, ...], dtype: torch.dtype
) -> None:
    """Raises CorruptChunk unless the chunk holds this turn's tokens after this turn's prefix, made by this model."""
    found = (header.root, header.dtype, header.layers)
    if found != (root, str(dtype).removeprefix("torch."), layers):
        raise CorruptChunk(f"chunk {header.key} was made by another model, or for another tenant")
    tokens = header.token_ids[: len(piece.token_ids)]
    if (header.start, header.parent, tokens) != (piece.start, piece.parent, piece.token_ids):
        raise CorruptChunk(f"chunk {header.key} holds other tokens than this turn's, or follows another prefix")


def _report(job: RestoreJob, failures: dict[int, Exception]) -> tuple[FailedRestore, ...]:
    """Each failed chunk answers for the tokens up to the next failed one: together, all that was not restored."""
    order = sorted(failures)
    ends = [job.pieces[i].start for i in order[1:]] + [job.pieces[-1].end]
    return tuple(
        FailedRestore(
            key=job.pieces[i].source.key,
            reason="corrupt" if isinstance(failures[i], CorruptChunk) else "lost",
            num_tokens=end - job.pieces[i].start,
            detail=f"{type(failures[i]).__name__}: {failures[i]}",
        )
        for i, end in zip(order, ends)
    )


def _restored_or_nothing(job: RestoreJob, future: Future[Restored]) -> Restored:
    """The result of a finished restore. If the loader itself failed, nothing is, and every chunk is to blame."""
    error = future.exception()
    if error is None:
        return future.result()
    log.error("turn %s: its restore failed", job.turn_id, exc_info=error)
    failed = tuple(
        FailedRestore(
            key=p.source.key, reason="lost", num_tokens=len(p.token_ids), detail=f"{type(error).__name__}: {error}"
        )
        for p in job.pieces
    )
    return Restored(num_tokens=0, failed=failed, marks=(), finished_at=time.monotonic())


def _to_tensor(array: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """A view of [H, n, D] as the pool's type; 16-bit floats arrive as bit patterns."""
    if dtype == torch.float32:
        return torch.from_numpy(array.view(np.float32))
    return torch.from_numpy(array.view(np.int16)).view(dtype)
