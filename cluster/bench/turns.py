"""Single turns on an engine of this process, timed: a conversation's history, where it comes from, and its next turn.

Knows sources as the shard does (objects of Ray's store, files), and throttled ones that stand for a slower tier.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine.engine import Engine
from actors.engine.loading import LoadedModel
from actors.engine.params import SamplingParams
from actors.engine.turns import EngineConfig, Request, RestoreSource, StartInfo
from storage.format import ChunkHeader, ChunkReader, RangeSource
from storage.header import Bytes, byte_view

CHUNK_TOKENS, STEP_TOKENS = 128, 512
ONE_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One turn that ran alone, or the one that is looked at."""

    ttft_s: float
    started: StartInfo
    token_id: int


@dataclass(frozen=True)
class StoredChunk:
    header: ChunkHeader
    data: Bytes


class TurnBench:
    """One engine with a history of whole chunks; `history` is computed once and its chunks are kept here."""

    def __init__(self, loaded: LoadedModel, history_tokens: int, *, num_threads: int, quick: bool = False) -> None:
        self.chunk_tokens = 32 if quick else CHUNK_TOKENS
        self.engine = Engine(
            EngineConfig(
                model="in memory",
                kv_tokens=4 * history_tokens + 4096,
                chunk_tokens=self.chunk_tokens,
                max_step_tokens=STEP_TOKENS,
                write_buffer_chunks=64,
                num_threads=num_threads,
            ),
            loaded,
        )
        self.root = loaded.key_space().root()
        self._rng = random.Random(0)
        self._vocab_size = loaded.vocab_size
        self._num_turns = 0
        self.history = self.tokens(history_tokens)
        self.chunks = self._compute_history()

    def close(self) -> None:
        self.engine.close()

    def tokens(self, count: int) -> tuple[int, ...]:
        """New ones every time."""
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(count))

    def run(self, prompt: tuple[int, ...], restore: Sequence[RestoreSource] = (), *, reuse: bool = True) -> Timed:
        """One turn alone, to its first token."""
        return self.run_behind(None, prompt, restore, reuse=reuse)

    def run_behind(
        self,
        other: tuple[int, ...] | None,
        prompt: tuple[int, ...],
        restore: Sequence[RestoreSource] = (),
        *,
        reuse: bool = True,
    ) -> Timed:
        """One turn that arrives together with another one, whose whole prompt is computed first."""
        if other is not None:
            self._add(other, (), reuse=False)
        name = self._add(prompt, restore, reuse=reuse)
        began = time.monotonic()
        started, first_at, token_id = StartInfo(), 0.0, -1
        while self.engine.has_work:
            for output in self.engine.step():
                if output.turn_id != name:
                    continue
                started = output.started or started
                if output.first_token_at is not None:
                    first_at, token_id = output.first_token_at, output.tokens[0].token_id
            self._drop_offers()
        return Timed(ttft_s=first_at - began, started=started, token_id=token_id)

    def warm_hbm(self) -> None:
        """The history's blocks are in the pool, and nothing else."""
        self.engine.forget_kept()
        self.run((*self.history, 0), self.sources())

    def sources(self, throttle: Throttle | None = None) -> list[RestoreSource]:
        """The history from memory of this process, at a throttle's pace if there is one."""
        return [
            RestoreSource(
                key=chunk.header.key,
                start=chunk.header.start,
                num_tokens=chunk.header.num_tokens,
                open=lambda chunk=chunk: _PacedReader(chunk.data, throttle),  # type: ignore[misc]
                place="memory" if throttle is None else throttle.place,
                num_bytes=len(chunk.data),
            )
            for chunk in self.chunks
        ]

    @property
    def history_bytes(self) -> int:
        return sum(len(chunk.data) for chunk in self.chunks)

    def _add(self, prompt: tuple[int, ...], restore: Sequence[RestoreSource], *, reuse: bool) -> str:
        self._num_turns += 1
        name = f"turn-{self._num_turns}"
        request = Request(
            turn_id=name, token_ids=prompt, sampling=ONE_TOKEN, restore=tuple(restore), root=self.root, save=reuse
        )
        self.engine.add(request)
        return name

    def _compute_history(self) -> list[StoredChunk]:
        self._add((*self.history, 0), (), reuse=True)
        while self.engine.has_work:
            self.engine.step()
        chunks = []
        for ready in self.engine.ready_chunks():
            data = self.engine.take_chunk(ready.header.key)
            if ready.header.end <= len(self.history):
                chunks.append(StoredChunk(ready.header, data))
        return sorted(chunks, key=lambda chunk: chunk.header.start)

    def _drop_offers(self) -> None:
        for ready in self.engine.ready_chunks():
            self.engine.drop_chunk(ready.header.key)


class Throttle:
    """A link of so many bytes a second, shared by all who read through it; whoever comes early sleeps."""

    def __init__(self, bytes_per_s: float, place: str = "throttled") -> None:
        self.bytes_per_s, self.place = bytes_per_s, place
        self._free_at = 0.0

    def wait(self, num_bytes: float) -> None:
        self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.bytes_per_s
        time.sleep(max(0.0, self._free_at - time.monotonic()))


class _PacedReader(ChunkReader):
    """Layers over the throttled link, each one as long as its share of the chunk's bytes takes."""

    def __init__(self, data: Bytes, throttle: Throttle | None) -> None:
        view = byte_view(data)
        super().__init__(RangeSource(read=lambda offset, length: view[offset : offset + length], num_bytes=len(view)))
        self._throttle = throttle

    def layer(self, i: int) -> Any:
        if self._throttle is not None:
            self._throttle.wait(self.num_bytes / len(self.header.layers))
        return super().layer(i)
