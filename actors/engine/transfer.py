"""Between host memory and the pool: HostTransfer, everything at once; CudaTransfer, on streams of its own.

    loader   chunk ── memcpy ──> pinned buffer ── loading stream: copy, rotate, write ──> KVPool, WriteBuffer
    saver    KVPool, WriteBuffer ── saving stream: copy ──> pinned chunk ── encode ──> chunk

On a device a call returns when its work is queued. A Fence is a moment in a queue: streams hold for each other's, and
only a helper's own thread waits for one. Three rules make this safe, which Loader, Saver, Gate and Restoring keep:

    what the model had queued when blocks and slots were handed out comes before a helper touches them (begin_*)
    the model's stream holds for what a load has written before it computes with it (Fence.hold)
    a helper gives nothing back before the device is done with it (Fence.wait)

Shapes: n tokens, H heads, D head dim. Keys in chunks and in the write buffer are raw and paired, in the pool rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.format import LayerShape

if TYPE_CHECKING:
    from actors.engine.blocks import KVPool
    from actors.engine.rope import Rotation
    from actors.engine.save import WriteBuffer

KV = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class Fence(Protocol):
    """All that was queued on a stream up to some moment."""

    def hold(self) -> None:
        """What the calling thread queues from now on comes after it. Returns at once."""

    def wait(self) -> None:
        """Returns when it is done."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Where the tokens [start, end) of a turn lie, in every layer."""

    start: int
    end: int
    rows: Tensor | int
    """[n] in the pool; of neighbours the first: they are a slice of the pool."""
    slot: int | None
    """Of their raw keys in the write buffer, from `offset` on."""
    offset: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What one chunk has for one layer: raw keys and values [n, H, D] in host memory, and where they go."""

    at: TokenRows
    keys: Tensor
    values: Tensor


class Transfer(Protocol):
    """`computed` is for the engine's thread, the rest for loaders and for the one saver."""

    def computed(self) -> Fence:
        """What the model has queued so far."""

    def locate(self, rows: Tensor, start: int, slot: int | None, offset: int = 0) -> TokenRows:
        """Pool rows [n] (CPU) of the tokens from `start` on, ready to be used by the calls below."""

    def begin_load(self, after: Fence) -> None:
        """What this thread writes from now on comes after the fence."""

    def write(self, layer: int, parts: Sequence[LayerPart]) -> None:
        """From host memory to the pool, keys to the slots too. On return the given memory may go."""

    def written(self) -> Fence:
        """What was written so far, by whatever loader."""

    def begin_save(self, after: Fence) -> None:
        """What is read from now on comes after the fence."""

    def read(self, at: TokenRows) -> list[KV]:
        """Raw keys and values [H, n, D] of all layers as chunks have them; good until the next `read`."""


@dataclass(frozen=True, slots=True)
class KVMemory:
    """The pool and the write buffer, and what lies between a key in the one and in the other."""

    pool: KVPool
    buffer: WriteBuffer
    rotations: Sequence[Rotation | None]

    def write(self, layer: int, parts: Sequence[LayerPart]) -> None:
        """As `Transfer.write`, from the pool's device. Neighbours are written in place and together, others scattered:
        a few calls for a whole layer take a third less time than a few for every chunk of it."""
        for run in _runs(parts):
            if isinstance(run[0].at.rows, int):
                self._fill(layer, run)
            else:
                self._scatter(layer, run[0])
        for part in parts:
            if part.at.slot is not None:
                self.buffer.put(layer, part.at.slot, part.keys, part.at.offset)

    def _fill(self, layer: int, run: Sequence[LayerPart]) -> None:
        """Parts that follow one another, in rows that do so too."""
        start, end, first_row = run[0].at.start, run[-1].at.end, run[0].at.rows
        assert isinstance(first_row, int)
        to_keys, to_values = self.pool.slice(layer, first_row, end - start)
        rotation = self.rotations[layer]
        if rotation is None:
            _join([part.keys for part in run], to_keys)
        elif rotation.multiplies_in_place(to_keys):  # straight from the chunk: one pass less
            for part in run:
                into = to_keys[part.at.start - start : part.at.end - start]
                rotation.rotate_into(into, part.keys, _phases(rotation, part.at.start, part.at.end))
        else:
            _join([part.keys for part in run], to_keys)
            rotation.rotate_into(to_keys, to_keys, _phases(rotation, start, end))
        _join([part.values for part in run], to_values)

    def _scatter(self, layer: int, part: LayerPart) -> None:
        rotation, rows = self.rotations[layer], part.at.rows
        assert isinstance(rows, Tensor)
        keys = part.keys
        if rotation is not None:
            keys = rotation.rotate(keys, _phases(rotation, part.at.start, part.at.end))
        self.pool.write(layer, rows, keys, part.values)

    def read(self, layer: int, at: TokenRows) -> tuple[Tensor, Tensor]:
        """Raw keys and values [n, H, D], as views where they can be had."""
        assert at.slot is not None
        assert not at.offset
        keys = self.buffer.get(layer, at.slot, at.num_tokens)
        if isinstance(at.rows, Tensor):
            return keys, self.pool.read_values(layer, at.rows)
        return keys, self.pool.slice(layer, at.rows, at.num_tokens)[1]


def _phases(rotation: Rotation, start: int, end: int) -> Tensor:
    return rotation.table.upto(end)[start:end]


def _runs(parts: Sequence[LayerPart]) -> list[list[LayerPart]]:
    """Parts that follow one another in tokens and in rows, together."""
    runs: list[list[LayerPart]] = []
    for part in parts:
        if runs and _follows(part.at, runs[-1][-1].at):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _follows(at: TokenRows, before: TokenRows) -> bool:
    if not isinstance(at.rows, int) or not isinstance(before.rows, int):
        return False
    return at.start == before.end and at.rows == before.rows + before.num_tokens


def _join(parts: Sequence[Tensor], out: Tensor) -> None:
    """Parts [n_i, H, D] one after the other into `out` [n, H, D]. Both lie in memory with the heads first."""
    torch.cat([part.transpose(0, 1) for part in parts], dim=1, out=out.transpose(0, 1))


# --- everything at once -----------------------------------------------------------------------------------------------


class _Passed:
    """The fence where nothing is queued."""

    def hold(self) -> None:
        """Everything is done."""

    def wait(self) -> None:
        """Everything is done."""


PASSED = _Passed()


class HostTransfer:
    """For a pool in host memory: what is asked for is done on return. (And, slowly, for devices without streams.)"""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._device = memory.pool.device
        self._layers = range(len(memory.rotations))

    def computed(self) -> Fence:
        return PASSED

    def locate(self, rows: Tensor, start: int, slot: int | None, offset: int = 0) -> TokenRows:
        return TokenRows(start, start + len(rows), _sliced(rows, lambda: rows.to(self._device)), slot, offset)

    def begin_load(self, after: Fence) -> None:
        after.hold()

    def write(self, layer: int, parts: Sequence[LayerPart]) -> None:
        if self._device.type != "cpu":
            parts = [LayerPart(p.at, p.keys.to(self._device), p.values.to(self._device)) for p in parts]
        self._memory.write(layer, parts)

    def written(self) -> Fence:
        return PASSED

    def begin_save(self, after: Fence) -> None:
        after.hold()

    def read(self, at: TokenRows) -> list[KV]:
        pairs = (self._memory.read(layer, at) for layer in self._layers)
        return [
            (_to_numpy(keys.transpose(0, 1).cpu()), _to_numpy(values.transpose(0, 1).cpu())) for keys, values in pairs
        ]


def _sliced(rows: Tensor, scattered: Callable[[], Tensor]) -> Tensor | int:
    """The first row where all are neighbours."""
    return int(rows[0]) if bool((rows.diff() == 1).all()) else scattered()


def _to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A view; 16-bit floats as uint16 bit patterns."""
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


# --- on streams of its own --------------------------------------------------------------------------------------------


class CudaTransfer:
    """One stream for loading, one for saving. Pinned memory: the ring of one-layer buffers, and one chunk to save.

    Loaders queue at most as much as the ring holds, then wait, on their own thread, for the oldest. Nothing waits for
    the device as a whole, and the engine's thread waits for nothing at all.
    """

    def __init__(
        self,
        memory: KVMemory,
        layers: Sequence[LayerShape],
        chunk_tokens: int,
        *,
        num_buffers: int,
        max_positions: int,
        cuda: Any = torch.cuda,
    ) -> None:
        """`max_positions`: above every position that will be asked for. `cuda`: another one for tests."""
        self._memory, self._cuda = memory, cuda
        self._device, self._dtype = memory.pool.keys[0].device, memory.pool.keys[0].dtype
        self._layers = range(len(layers))
        self._loading, self._saving = cuda.Stream(self._device), cuda.Stream(self._device)
        sizes = [chunk_tokens * shape.num_kv_heads * (shape.k_dim + shape.v_dim) for shape in layers]
        self._ring = _StagingRing([self._pinned(max(sizes), self._dtype) for _ in range(num_buffers)], cuda)
        self._saved = self._pinned(sum(sizes), self._dtype)
        for rotation in memory.rotations:
            if rotation is not None:
                rotation.table.upto(max_positions)  # all of it, now: a table that grows is not for several streams
        cuda.synchronize(self._device)  # this once

    def computed(self) -> Fence:
        return self._fence(self._cuda.current_stream(self._device))

    def locate(self, rows: Tensor, start: int, slot: int | None, offset: int = 0) -> TokenRows:
        return TokenRows(start, start + len(rows), _sliced(rows, lambda: self._pin(rows)), slot, offset)

    def begin_load(self, after: Fence) -> None:
        with self._cuda.stream(self._loading):
            after.hold()

    def write(self, layer: int, parts: Sequence[LayerPart]) -> None:
        with self._cuda.stream(self._loading):
            self._memory.write(layer, [self._carry(part) for part in parts])

    def _carry(self, part: LayerPart) -> LayerPart:
        """To the device, on the current stream, through one of the pinned buffers."""
        size = part.keys.numel() + part.values.numel()
        with self._ring.lend(self._loading) as pinned:
            for staged, given in zip(_unpack(pinned, part.keys, part.values), (part.keys, part.values)):
                staged.copy_(given)  # by this thread
            on_device = torch.empty(size, dtype=self._dtype, device=self._device)
            on_device.copy_(pinned[:size], non_blocking=True)
        return LayerPart(self._on_device(part.at), *_unpack(on_device, part.keys, part.values))

    def written(self) -> Fence:
        return self._fence(self._loading)

    def begin_save(self, after: Fence) -> None:
        with self._cuda.stream(self._saving):
            after.hold()

    def read(self, at: TokenRows) -> list[KV]:
        pairs, rest = list[tuple[Tensor, Tensor]](), self._saved
        with self._cuda.stream(self._saving):
            there = self._on_device(at)
            for layer in self._layers:
                keys, values = self._memory.read(layer, there)
                pair = _unpack(rest, keys, values)
                rest = rest[keys.numel() + values.numel() :]
                for staged, wanted in zip(pair, (keys, values)):
                    staged.transpose(0, 1).copy_(wanted.transpose(0, 1).contiguous(), non_blocking=True)
                pairs.append(pair)
        self._fence(self._saving).wait()
        return [(_to_numpy(keys.transpose(0, 1)), _to_numpy(values.transpose(0, 1))) for keys, values in pairs]

    def _fence(self, stream: Any) -> _CudaFence:
        event = self._cuda.Event(blocking=True)  # a thread that waits for it sleeps
        event.record(stream)
        return _CudaFence(event, self._device, self._cuda)

    def _on_device(self, at: TokenRows) -> TokenRows:
        """For the current stream."""
        if isinstance(at.rows, int):
            return at
        return replace(at, rows=at.rows.to(self._device, non_blocking=True))

    def _pin(self, rows: Tensor) -> Tensor:
        return self._pinned(len(rows), rows.dtype).copy_(rows)

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)


@dataclass(frozen=True, slots=True)
class _CudaFence:
    _event: Any
    _device: torch.device
    _cuda: Any

    def hold(self) -> None:
        self._cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class _StagingRing:
    """Pinned buffers, lent in turn, again when the device is done with what was queued while they were lent."""

    def __init__(self, buffers: Sequence[Tensor], cuda: Any) -> None:
        self._free: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for buffer in buffers:
            self._free.put((buffer, cuda.Event(blocking=True)))

    @contextmanager
    def lend(self, stream: Any) -> Iterator[Tensor]:
        buffer, used = self._free.get()
        try:
            used.synchronize()
            yield buffer
        finally:
            try:
                used.record(stream)
            finally:
                self._free.put((buffer, used))


def _unpack(flat: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The beginning of a flat buffer as [n, H, D] twice, shaped like these, with heads first in memory like a chunk."""
    at, views = 0, list[Tensor]()
    for like in (keys, values):
        n, num_heads, dim = like.shape
        views.append(flat[at : at + like.numel()].view(num_heads, n, dim).transpose(0, 1))
        at += like.numel()
    return views[0], views[1]


def transfer_for(
    memory: KVMemory, layers: Sequence[LayerShape], chunk_tokens: int, *, num_buffers: int, max_positions: int
) -> Transfer:
    """The one for the pool's device."""
    if memory.pool.device.type == "cuda":
        return CudaTransfer(memory, layers, chunk_tokens, num_buffers=num_buffers, max_positions=max_positions)
    return HostTransfer(memory)
