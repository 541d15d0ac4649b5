"""One engine of a comparison: does its turns block by block, hands its chunks to a thread, and keeps its times."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from actors.engine.engine import Engine
from actors.engine.params import SamplingParams
from actors.engine.turns import Request


@dataclass(frozen=True, kw_only=True)
class Load:
    """One kind of work, done with saving and without."""

    name: str
    words: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    block_steps: int
    """Steps of one engine before the other's turn comes."""

    @property
    def is_prefill(self) -> bool:
        return self.new_tokens == 1


@dataclass
class Sample:
    """One run of a load: its blocks of steps, each with what it left to wait for, and the CPU time of all threads."""

    blocks_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def steps_s(self) -> float:
        return sum(self.blocks_s)


def prompts(load: Load, vocab_size: int, chance: random.Random) -> list[tuple[int, ...]]:
    """New ones each time: nothing is shared, nothing known."""
    return [tuple(chance.randrange(vocab_size) for _ in range(load.prompt_tokens)) for _ in range(load.batch)]


class Side:
    """One engine, saving or not, and the thread that takes its chunks."""

    def __init__(self, engine: Engine, *, save: bool, takes: bool) -> None:
        self.engine = engine
        self.sample = Sample()
        self.peak_slots, self.peak_ready_bytes = 0, 0
        self._save, self._takes = save, takes
        self._root = engine.loaded.key_space().root()
        self._numbers = count()
        self._taken: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._take, name="exports", daemon=True).start()

    def begin(self, load: Load, texts: list[tuple[int, ...]]) -> None:
        """Turns join; a decode load is brought to its first step without prefill, which does not count."""
        self.sample = Sample()
        for tokens in texts:
            self.engine.add(
                Request(
                    turn_id=f"{load.name}-{next(self._numbers)}",
                    token_ids=tokens,
                    sampling=SamplingParams(max_new_tokens=load.new_tokens, ignore_eos=True),
                    root=self._root,
                    save=self._save,
                )
            )
        meter = self.engine.meter
        while not load.is_prefill:
            num_decoded, num_prefilled = meter.num_decode_tokens, meter.num_prefill_tokens
            self._step()
            if meter.num_decode_tokens > num_decoded and meter.num_prefill_tokens == num_prefilled:
                break
        self._taken.join()

    def run_block(self, load: Load) -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(load.block_steps):
            if not self.engine.has_work:
                break
            self._step()
        self._taken.join()
        self.sample.blocks_s.append(time.perf_counter() - began)
        self.sample.cpu_s += time.process_time() - cpu_began

    def _step(self) -> None:
        self.engine.step()
        stats = self.engine.stats()
        self.peak_slots = max(self.peak_slots, int(stats["slots"] - stats["slots_free"]))
        self.peak_ready_bytes = max(self.peak_ready_bytes, int(stats["ready_bytes"]))
        for chunk in self.engine.ready_chunks() if self._takes else ():
            self._taken.put(chunk.header.key)

    def _take(self) -> None:
        """Waits for each chunk to be encoded and copies it, as an export into Ray's object store does."""
        shelf = np.empty(0, np.uint8)
        while key := self._taken.get():
            data = self.engine.take_chunk(key)
            if data.nbytes > shelf.nbytes:
                shelf = np.zeros(data.nbytes, np.uint8)
            np.copyto(shelf[: data.nbytes], data)
            self._taken.task_done()

    def close(self) -> None:
        self._taken.put("")
        self.engine.close()


@contextmanager
def running_side(engine: Engine, *, save: bool, takes: bool = True) -> Iterator[Side]:
    side = Side(engine, save=save, takes=takes)
    try:
        yield side
    finally:
        side.close()
