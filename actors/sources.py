"""From the steps of a restore plan to sources the engine can read: objects of Ray's store, files, objects of a bucket.

Opens nothing itself: the engine's loader does, when it comes to a chunk, after asking some time before for its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.engine.turns import RestoreSource
from policies import messages as m
from storage.format import ChunkReader, read_chunk
from storage.parts import whole
from storage.tier import ChunkOpener


def restore_sources(
    steps: Sequence[m.RestoreStep],
    refs: Sequence[Any],
    readers: Mapping[m.Tier, ChunkOpener],
    deadline_s: float,
) -> tuple[RestoreSource, ...]:
    """One source per step. `refs` has an object reference for every step in DRAM, None where the object is gone."""
    start_pulls = _once(lambda: _pull([ref for ref in refs if ref is not None]))
    return tuple(
        _in_dram(step, ref, start_pulls, deadline_s)
        if step.tier == m.Tier.DRAM
        else _below_dram(step, readers[step.tier])
        for step, ref in zip(steps, refs)
    )


def _in_dram(step: m.RestoreStep, ref: Any, start_pulls: Callable[[], None], deadline_s: float) -> RestoreSource:
    """Shared memory of this node, or of another one: the turn's objects are all asked for with the first of them."""
    return RestoreSource(
        key=step.chunk,
        start=step.start,
        num_tokens=step.num_tokens,
        open=lambda: read_chunk(whole(ray.get(ref, timeout=deadline_s))),
        place=step.tier,
        num_bytes=step.num_bytes,
        prefetch=start_pulls,
    )


def _below_dram(step: m.RestoreStep, reader: ChunkOpener) -> RestoreSource:
    reading = _Reading(reader, step)
    return RestoreSource(
        key=step.chunk,
        start=step.start,
        num_tokens=step.num_tokens,
        open=reading.open,
        place=step.tier,
        num_bytes=step.num_bytes,
        buffered=step.tier == m.Tier.OBJECT,
        prefetch=reading.prefetch,
        forget=reading.forget,
    )


class _Reading:
    """One turn's use of a chunk: what it prefetched it opens or forgets once, so that it never forgets for others."""

    def __init__(self, reader: ChunkOpener, step: m.RestoreStep) -> None:
        self._reader, self._key, self._num_bytes = reader, step.chunk, step.num_bytes
        self._is_prefetched = False

    def prefetch(self) -> None:
        if not self._is_prefetched:
            self._is_prefetched = True
            self._reader.prefetch(self._key, self._num_bytes)

    def open(self) -> ChunkReader:
        self._is_prefetched = False
        return self._reader.open(self._key, self._num_bytes)

    def forget(self) -> None:
        if self._is_prefetched:
            self._is_prefetched = False
            self._reader.forget(self._key)


def _pull(refs: list[Any]) -> None:
    """Starts bringing objects to this node and returns at once; those that are here cost nothing."""
    wanted = list(dict.fromkeys(refs))
    if wanted:
        with suppress(RayError):  # opening tells
            ray.wait(wanted, num_returns=len(wanted), timeout=0, fetch_local=True)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """Called again, it does nothing. For one thread at a time."""
    is_done = False

    def call() -> None:
        nonlocal is_done
        if not is_done:
            is_done = True
            function()

    return call
