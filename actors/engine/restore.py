"""From chunks to blocks: loader threads open, verify, rotate and write what a turn can restore.

    LAYERS   all chunks at once, layer by layer: `Load.layers_ready` counts them, and a step may follow on their heels
    TAIL     the last chunk first, each in all layers: what lies before `Load.frontier` may be computed meanwhile

A chunk that cannot be opened, fails a checksum or holds other tokens than the turn's ends a LAYERS load at its start
and leaves a hole in a TAIL load; what is missing is computed and the reason reported. Nothing that was not verified is
ever counted as restored. How far a load is stands in `actors.engine.load`; when a turn goes on is decided elsewhere.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.load import Load, LoadRates, RestoreJob, restored
from actors.engine.overlap import LoadOrder
from actors.engine.pending import Pending
from actors.engine.sequence import Piece
from actors.engine.transfer import KV, Fence, LayerPart, TokenRows, Transfer
from storage.format import ChunkHeader, ChunkReader, CorruptChunk, LayerShape

log = logging.getLogger(__name__)

# Chunk arrays are read-only views of shared memory; they are only ever read here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Loader:
    """A few threads that run restores, each restore on one of them, each operation on one core."""

    def __init__(
        self,
        transfer: Transfer,
        layers: tuple[LayerShape, ...],
        dtype: torch.dtype,
        rates: LoadRates,
        wake: Callable[[], None],
        *,
        num_threads: int,
        read_ahead: int,
    ) -> None:
        self._transfer = transfer
        self._layers, self._dtype = layers, dtype
        self._rates, self._wake, self._read_ahead = rates, wake, read_ahead
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(
            max_workers=num_threads, thread_name_prefix="loader", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._running = Pending[Load]()

    def submit(self, job: RestoreJob) -> Load:
        """Starts a restore. Its blocks and its slot are held until `settled` names it; what the model has queued until
        now may still use them."""
        load = Load(job, len(self._layers), self._wake)
        future = self._executor.submit(self._restore, load, self._transfer.computed())
        self._running.add(load, future)
        future.add_done_callback(lambda _: self._wake())
        return load

    @property
    def is_crowded(self) -> bool:
        """Whether the restore submitted last may have to wait for a thread."""
        return len(self._running) > self._num_threads

    def settled(self) -> list[Load]:
        """Loads whose thread has let go of everything since the last call, the abandoned ones too."""
        return [load for load, _ in self._running.take_done()]

    def close(self) -> None:
        for load, _ in self._running:
            load.abandon()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _restore(self, load: Load, handed_out: Fence) -> None:
        job = load.job
        try:
            self._transfer.begin_load(handed_out)
            with torch.inference_mode():
                if job.order is LoadOrder.LAYERS:
                    self._load_layers(load)
                else:
                    self._load_tail(load)
        except Exception as error:  # a fault of this file: nothing counts as loaded
            log.exception("turn %s: its restore failed", job.turn_id)
            load.fences.append(self._transfer.written())
            load.finish(restored(job, (), dict.fromkeys(range(len(job.pieces)), error)))
        for piece in job.pieces:
            if piece.source.forget is not None:
                piece.source.forget()
        self._transfer.written().wait()  # so long are its blocks in use

    # --- layer by layer -----------------------------------------------------------------------------------------------

    def _load_layers(self, load: Load) -> None:
        job, failures = load.job, dict[int, Exception]()
        for piece in job.pieces:
            _prefetch(piece)
        with ExitStack() as stack:
            began = time.monotonic()
            readers = self._open_leading(load, stack, failures)
            num_good = len(readers)
            if num_good and load.claim(job.start) is None:
                num_good = 0  # nobody wants it any more: nothing is written, nothing counts
            if num_good:
                places = [self._locate(job, i, job.pieces[i].start) for i in range(num_good)]
                for layer in range(len(self._layers)):
                    num_good = self._load_layer(load, layer, readers[:num_good], places, failures)
                    load.fences.append(self._transfer.written())
                    if not num_good:
                        break
                    if layer + 1 < len(self._layers):
                        load.layer_done()
            if num_good == len(job.pieces):
                self._rates.measured_together(job.pieces, time.monotonic() - began, load.lead_s)
            marks = tuple(mark for reader in readers[:num_good] for mark in reader.header.marks)
            spans = ((job.start, job.pieces[num_good - 1].end),) if num_good else ()
            load.finish(restored(job, spans, failures, marks))

    def _open_leading(self, load: Load, stack: ExitStack, failures: dict[int, Exception]) -> list[ChunkReader]:
        """Readers of the leading pieces that are what they should be; why the next one is not goes to `failures`."""
        readers: list[ChunkReader] = []
        for i in range(len(load.job.pieces)):
            reader = None if load.is_abandoned else self._open(load.job, i, stack, failures)
            if reader is None:
                break
            readers.append(reader)
        return readers

    def _load_layer(
        self,
        load: Load,
        layer: int,
        readers: Sequence[ChunkReader],
        places: Sequence[TokenRows],
        failures: dict[int, Exception],
    ) -> int:
        """Writes one layer of every chunk; how many were good. Why the next one was not goes to `failures`.

        Reads them all before it writes: beside a model on the same cores, one burst of work takes half the cycles of
        many small ones, each of which finds the caches full of something else.
        """
        arrays: list[KV] = []
        for i, reader in enumerate(readers):
            found = None if load.is_abandoned else self._read(load.job, i, layer, reader, failures)
            if found is None:
                break
            arrays.append(found)
        if load.is_abandoned:
            return 0
        self._write(load.job, layer, list(zip(range(len(arrays)), arrays, places)))
        return 0 if load.is_abandoned else len(arrays)

    # --- from the tail ------------------------------------------------------------------------------------------------

    def _load_tail(self, load: Load) -> None:
        job, failures = load.job, dict[int, Exception]()
        order = range(len(job.pieces) - 1, -1, -1)
        num_asked = 0
        for done, i in enumerate(order):
            while num_asked <= min(done + self._read_ahead, len(order) - 1):
                _prefetch(job.pieces[order[num_asked]])
                num_asked += 1
            if load.is_abandoned or load.is_met:
                break
            brought = self._load_piece(load, i, failures)
            load.fences.append(self._transfer.written())
            if brought is not None:
                load.piece_done(brought)
            elif i in failures:
                load.skip_piece(i, failures[i])
        load.finish(load.so_far())

    def _load_piece(self, load: Load, i: int, failures: dict[int, Exception]) -> tuple[tuple[int, str], ...] | None:
        """One chunk, or what of it nobody has computed in the meantime. Its marks; None if it did not come."""
        job = load.job
        began = time.monotonic()
        with ExitStack() as stack:
            reader = self._open(job, i, stack, failures)
            start = load.claim(job.pieces[i].start) if reader is not None else None
            if reader is None or start is None:
                return None
            place = self._locate(job, i, start)
            for layer in range(len(self._layers)):
                found = None if load.is_abandoned else self._read(job, i, layer, reader, failures)
                if found is None:
                    return None
                self._write(job, layer, [(i, found, place)])
            self._rates.measured(job.pieces[i], time.monotonic() - began)
            return reader.header.marks

    # --- one chunk ----------------------------------------------------------------------------------------------------

    def _open(self, job: RestoreJob, i: int, stack: ExitStack, failures: dict[int, Exception]) -> ChunkReader | None:
        """A reader over what the piece should be. None, with the reason in `failures`, if it is not."""
        piece = job.pieces[i]
        try:
            reader = piece.source.open()
            stack.callback(reader.close)
            _check_header(reader.header, piece, job.root, self._layers, self._dtype)
        except Exception as error:
            log.warning("turn %s: cannot use chunk %s", job.turn_id, piece.source.key, exc_info=True)
            failures[i] = error  # a source may be anything: a file, an actor, a bucket
            return None
        return reader

    def _locate(self, job: RestoreJob, i: int, start: int) -> TokenRows:
        """Where the tokens from `start` on of a piece go."""
        piece = job.pieces[i]
        slot = job.tail_slot if i == len(job.pieces) - 1 else None
        return self._transfer.locate(job.rows[start : piece.end], start, slot, start - piece.start)

    def _read(
        self, job: RestoreJob, i: int, layer: int, reader: ChunkReader, failures: dict[int, Exception]
    ) -> KV | None:
        """One layer of one chunk, verified. None, with the reason in `failures`, if it is bad."""
        try:
            return reader.layer(layer)
        except Exception as error:
            log.warning("turn %s: cannot read chunk %s", job.turn_id, job.pieces[i].source.key, exc_info=True)
            failures[i] = error  # as above: reading a layer goes to the source
            return None

    def _write(self, job: RestoreJob, layer: int, found: Sequence[tuple[int, KV, TokenRows]]) -> None:
        """These tokens of one layer of some chunks: each by number, as read, and where it goes."""
        parts = []
        for i, arrays, at in found:
            keys, values = (self._to_tensor(array) for array in arrays)
            if at.num_tokens != keys.shape[1]:
                first = job.pieces[i].start
                wanted = slice(at.start - first, at.end - first)
                keys, values = keys[:, wanted], values[:, wanted]
            parts.append(LayerPart(at, keys.transpose(0, 1), values.transpose(0, 1)))
        if parts:
            self._transfer.write(layer, parts)

    def _to_tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """A view of [H, n, D] as the pool's type; 16-bit floats arrive as bit patterns."""
        if self._dtype == torch.float32:
            return torch.from_numpy(array.view(np.float32))
        return torch.from_numpy(array.view(np.int16)).view(self._dtype)


def _prefetch(piece: Piece) -> None:
    if piece.source.prefetch is not None:
        piece.source.prefetch()


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
