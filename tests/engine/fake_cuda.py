"""Streams and events that run nothing, and a detector of races between what is queued on them.

Vector clocks: an access is in order if it comes after every conflicting access before it, by streams and events alone.
The threads of the host are taken as one, in the order of real time (locks are other tests' business); what a stream is
given comes after all that the host did before. So a race that is reported is one that some timing of the device shows;
that the CPU runs the operations at once does not hide it. Nothing is assumed about how long the device takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import AttentionBackend, Span
from actors.engine.engine import Engine
from actors.engine.runner import Batch
from actors.engine.transfer import KV, CudaTransfer, TokenRows

Clock = dict[str, int]
Place = tuple[Any, ...]


def _join(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        clock[name] = max(tick, clock.get(name, 0))


class FakeStream:
    def __init__(self, name: str, host: Clock) -> None:
        self.name, self.clock, self._host = name, Clock(), host

    def wait_event(self, event: FakeEvent) -> None:
        _join(self.clock, event.clock)


class FakeEvent:
    def __init__(self, host: Clock) -> None:
        self.clock, self._host = Clock(), host

    def record(self, stream: FakeStream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        time.sleep(0.003)  # a device that is behind: the others do not learn of it by chance
        _join(self._host, self.clock)


@dataclass
class _Accesses:
    """The last write of a place, and the reads since: who, and at which tick."""

    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict)


class FakeCuda:
    """Stands in for the module torch.cuda."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.num_accesses: dict[str, int] = {}
        self._host = Clock()
        self._model = FakeStream("model", self._host)
        self._names = iter(["loading", "saving"])
        self._places: dict[Place, _Accesses] = {}
        self._local = threading.local()
        self._lock = threading.RLock()

    # --- what CudaTransfer uses ---------------------------------------------------------------------------------------

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream(next(self._names), self._host)

    def Event(self, blocking: bool) -> FakeEvent:  # noqa: N802 - torch's name
        return FakeEvent(self._host)

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return getattr(self._local, "stream", self._model)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, device: torch.device) -> None:
        assert not self._places, "the whole device is waited for when it is set up, and never again"

    # --- accesses -----------------------------------------------------------------------------------------------------

    def queue(self, kind: str, places: Iterable[Place]) -> None:
        """The current stream reads or writes these."""
        stream = self.current_stream()
        with self._lock:
            _join(stream.clock, self._host)
            self._access(stream.name, stream.clock, kind, places)

    def run(self, kind: str, places: Iterable[Place]) -> None:
        """The host does, now."""
        with self._lock:
            self._access("host", self._host, kind, places)

    def _access(self, name: str, clock: Clock, kind: str, places: Iterable[Place]) -> None:
        tick = clock[name] = clock.get(name, 0) + 1
        for place in places:
            label = f"{name} {kind}s {place[0]}"
            self.num_accesses[label] = self.num_accesses.get(label, 0) + 1
            seen = self._places.setdefault(place, _Accesses())
            if seen.write is not None and clock.get(seen.write[0], 0) < seen.write[1]:
                self.races.append(f"{label} {place[1:]} before {seen.write[0]} has written it")
            if kind == "read":
                seen.reads[name] = tick
                continue
            for reader, read_at in seen.reads.items():
                if clock.get(reader, 0) < read_at:
                    self.races.append(f"{label} {place[1:]} before {reader} has read it")
            self._places[place] = _Accesses(write=(name, tick))


class FakeCudaTransfer(CudaTransfer):
    """On the CPU; staging and the chunk to save are watched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.fake = kwargs["cuda"] = FakeCuda()
        super().__init__(*args, **kwargs)
        ring = self._ring
        lend = ring.lend

        @contextmanager
        def watched(stream: Any) -> Iterator[Tensor]:
            with lend(stream) as buffer:
                self.fake.run("write", [("staging", buffer.data_ptr())])
                yield buffer
                self.fake.queue("read", [("staging", buffer.data_ptr())])

        ring.lend = watched  # type: ignore[method-assign]

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def read(self, at: TokenRows) -> list[KV]:
        with self.fake.stream(self._saving):
            self.fake.queue("write", [("saved",)])
        arrays = super().read(at)
        self.fake.run("read", [("saved",)])
        return arrays


def watch(engine: Engine, fake: FakeCuda) -> None:
    """Every access of the engine to its pool and its write buffer goes through the detector."""
    _watch_pool(engine, fake)
    _watch_buffer(engine, fake)
    take, size = engine._blocks.take, engine.config.block_tokens

    def take_poisoned(count: int, after: int | None = None, spare: int = 0) -> list[int]:
        blocks = take(count, after, spare)
        rows = [block * size + i for block in blocks for i in range(size)]
        for layer in range(len(engine.loaded.layers)):
            fake.queue("write", [("pool", layer, row) for row in rows])
        return blocks

    engine._blocks.take = take_poisoned  # type: ignore[method-assign]
    watched = _WatchedAttention(engine, fake, engine._runner._attention)
    engine._runner._attention = watched
    forward = engine._runner.forward

    def forward_batch(batch: Batch) -> Tensor:
        watched.batch = batch
        return forward(batch)

    engine._runner.forward = forward_batch  # type: ignore[method-assign]


def _watch_pool(engine: Engine, fake: FakeCuda) -> None:
    pool = engine._pool
    write, cut, read_values = pool.write, pool.slice, pool.read_values

    def watched_write(layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        fake.queue("write", [("pool", layer, row) for row in rows.tolist()])
        write(layer, rows, keys, values)

    def watched_slice(layer: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        kind = {"loading": "write", "saving": "read"}[fake.current_stream().name]
        fake.queue(kind, [("pool", layer, row) for row in range(first, first + count)])
        return cut(layer, first, count)

    def watched_read(layer: int, rows: Tensor) -> Tensor:
        fake.queue("read", [("pool", layer, row) for row in rows.tolist()])
        return read_values(layer, rows)

    pool.write, pool.slice, pool.read_values = watched_write, watched_slice, watched_read  # type: ignore[method-assign]


def _watch_buffer(engine: Engine, fake: FakeCuda) -> None:
    buffer = engine._buffer
    capture, put, get = buffer.capture, buffer.put, buffer.get

    def places(layer: int, rows: Iterable[int]) -> list[Place]:
        return [("slot", layer, row) for row in rows if row != buffer.unsaved_row]

    def watched_capture(layer: int, rows: Tensor, keys: Tensor) -> None:
        fake.queue("write", places(layer, rows.tolist()))
        capture(layer, rows, keys)

    def watched_put(layer: int, slot: int, keys: Tensor, offset: int = 0) -> None:
        first = buffer.row(slot, offset)
        fake.queue("write", places(layer, range(first, first + len(keys))))
        put(layer, slot, keys, offset)

    def watched_get(layer: int, slot: int, count: int) -> Tensor:
        first = buffer.row(slot, 0)
        fake.queue("read", places(layer, range(first, first + count)))
        return get(layer, slot, count)

    buffer.capture, buffer.put, buffer.get = watched_capture, watched_put, watched_get  # type: ignore[method-assign]


class _WatchedAttention:
    def __init__(self, engine: Engine, fake: FakeCuda, stock: AttentionBackend) -> None:
        self._engine, self._fake, self._stock = engine, fake, stock
        self.batch: Batch | None = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, spans: tuple[Span, ...], args: Any) -> Tensor:
        assert self.batch is not None
        [layer] = [i for i, pages in enumerate(self._engine._pool.keys) if pages is keys]
        void = [gate._load.job.blocks for gate in self.batch.gates if not gate.is_open]  # type: ignore[attr-defined]
        for span in spans:
            if not any(set(blocks) <= set(span.table.blocks) for blocks in void):
                rows = span.table.rows(0, span.num_kv).tolist()
                self._fake.queue("read", [("pool", layer, row) for row in rows])
        return self._stock.attend(q, keys, values, spans, args)
