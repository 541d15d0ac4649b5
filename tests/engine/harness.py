"""Runs an engine to the end and keeps what came out; plays the store and the owner that resubmits preempted turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.engine.engine import Engine
from actors.engine.free_runs import FreeRuns
from actors.engine.kept import BlockEviction
from actors.engine.loading import LoadedModel
from actors.engine.overlap import LoadOrder
from actors.engine.params import SampledToken, SamplingParams
from actors.engine.turns import EngineConfig, FinishReason, Request, RestoreSource, StartInfo, TurnOutput
from storage.format import ChunkHeader, ChunkReader, read_chunk
from storage.keys import chain

CHUNK = 16
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


def make_engine(
    loaded: LoadedModel,
    *,
    shuffle: int | None = None,
    order: LoadOrder | None = LoadOrder.LAYERS,
    eviction: BlockEviction | None = None,
    **settings: Any,
) -> Engine:
    """A small engine; `shuffle` is the seed by which its blocks come in disorder, `order` that of every load (None: as
    the engine chooses, which depends on how fast it has been).

    Fresh blocks are poisoned: whoever reads KV that was not computed or loaded gets NaN, and fails.
    """
    defaults = {
        "kv_tokens": 512,
        "block_tokens": 4,
        "chunk_tokens": CHUNK,
        "max_step_tokens": 24,
        "max_running_turns": 6,
        "write_buffer_chunks": 24,
        "keep_finished": False,
    }
    engine = Engine(EngineConfig(model="in memory", **{**defaults, **settings}), loaded, eviction)
    if shuffle is not None:
        engine._blocks._free = _ScatteredBlocks(engine._blocks.num_blocks, shuffle)
    if order is not None:
        engine._restoring._order = lambda *_: order  # type: ignore[method-assign]
    _poison_fresh_blocks(engine)
    return engine


class _ScatteredBlocks(FreeRuns):
    """Hands out blocks from all over the place."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        super().__init__(num_blocks)
        self._rng = random.Random(seed)

    def take(self, count: int, after: int | None = None, spare: int = 0) -> list[int]:
        del after, spare
        blocks = self._rng.sample([block for start, n in self.runs() for block in range(start, start + n)], count)
        for block in blocks:
            start = max(start for start, _ in self.runs() if start <= block)
            self._cut(start, block - start, 1)
        return blocks


def _poison_fresh_blocks(engine: Engine) -> None:
    take = engine._blocks.take

    def take_poisoned(count: int, after: int | None = None, spare: int = 0) -> list[int]:
        blocks = take(count, after, spare)
        for tensor in (*engine._pool.keys, *engine._pool.values):
            tensor[blocks] = float("nan")
        return blocks

    engine._blocks.take = take_poisoned  # type: ignore[method-assign]


Opener = Callable[[bytes], ChunkReader]


@dataclass
class Store:
    """Chunks by the key of every mark in them."""

    root: str
    chunks: dict[str, tuple[ChunkHeader, npt.NDArray[np.uint8]]] = field(default_factory=dict)
    by_mark: dict[str, str] = field(default_factory=dict)

    def put(self, header: ChunkHeader, data: npt.NDArray[np.uint8]) -> None:
        self.chunks[header.key] = (header, data)
        for _, key in header.marks:
            self.by_mark[key] = header.key

    def plan(self, token_ids: Sequence[int], cuts: Iterable[int] = (), limit: int | None = None) -> list[RestoreSource]:
        """The longest stored prefix: whole chunks, then the farthest mark inside one. `limit` shortens it."""
        sources: list[RestoreSource] = []
        marks = chain(self.root, token_ids, CHUNK, cuts)
        for start in range(0, len(token_ids), CHUNK):
            inside = [(end, key) for end, key in marks if start < end <= start + CHUNK and key in self.by_mark]
            if not inside:
                break
            end, key = inside[-1]
            end = min(end, limit) if limit is not None else end
            if end <= start:
                break
            sources.append(self.source(self.by_mark[key], end - start))
            if end < start + CHUNK:
                break
        return sources

    def source(self, key: str, num_tokens: int) -> RestoreSource:
        header, data = self.chunks[key]
        return RestoreSource(key=key, start=header.start, num_tokens=num_tokens, open=lambda: read_chunk(data))


@dataclass
class Result:
    """Everything the engine said about one turn, over all its attempts."""

    tokens: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    started: list[StartInfo] = field(default_factory=list)
    first_token_at: float | None = None
    num_preemptions: int = 0

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class Owner:
    """Drives one engine, takes every chunk into its store, and resubmits preempted turns from there."""

    def __init__(self, engine: Engine, store: Store | None = None) -> None:
        self.engine = engine
        self.store = store or Store(engine.loaded.key_space().root())
        self.results: dict[str, Result] = {}
        self.requests: dict[str, Request] = {}

    def add(self, turn_id: str, token_ids: Sequence[int], sampling: SamplingParams = GREEDY, **more: object) -> None:
        request = Request(
            turn_id=turn_id,
            token_ids=tuple(token_ids),
            sampling=sampling,
            root=self.store.root,
            **more,  # type: ignore[arg-type]
        )
        self.results[turn_id] = Result()
        self.requests[turn_id] = request
        self.engine.add(request)

    def step(self) -> list[TurnOutput]:
        outputs = self.step_without_taking()
        self.take_chunks()
        return outputs

    def take_chunks(self) -> None:
        for ready in self.engine.ready_chunks():
            data = self.engine.take_chunk(ready.header.key)
            assert data.nbytes == ready.num_bytes
            self.store.put(ready.header, data)

    def step_without_taking(self) -> list[TurnOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self._hear(output)
        self.engine.check()
        return outputs

    def run(self, max_steps: int = 3000) -> dict[str, Result]:
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to rest"
        self.engine.check()
        return self.results

    def _hear(self, output: TurnOutput) -> None:
        result = self.results[output.turn_id]
        assert result.finish is None, "an output after the end"
        result.tokens += output.tokens
        if output.started is not None:
            result.started.append(output.started)
        if output.first_token_at is not None and result.first_token_at is None:
            result.first_token_at = output.first_token_at
        if output.finish_reason is FinishReason.PREEMPTED:
            result.num_preemptions += 1
            self._resubmit(output.turn_id)
        else:
            result.finish, result.error = output.finish_reason, output.error

    def _resubmit(self, turn_id: str) -> None:
        first, done = self.requests[turn_id], self.results[turn_id].token_ids
        token_ids = first.token_ids + tuple(done[first.num_prior :] if first.num_prior else done)
        again = replace(
            first, token_ids=token_ids, num_prior=len(done), restore=tuple(self.store.plan(token_ids, first.cuts))
        )
        self.engine.add(again)
