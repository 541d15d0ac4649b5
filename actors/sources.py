"""From the steps of a restore plan to sources the engine can read: objects of Ray's store, files, objects of a bucket.

Opens nothing itself: the engine's loader does, when it comes to a chunk, after asking some time before for its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
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
    checkout: Callable[[], Sequence[Any]],
    readers: Mapping[m.Tier, ChunkOpener],
    deadline_s: float,
) -> tuple[RestoreSource, ...]:
    """One source per step. `checkout` brings an object reference for every step in DRAM, in their order, None where
    the object is gone; it is asked once, and only if the turn loads from there."""
    pulled, numbers = _Pulled(checkout, deadline_s), count()
    return tuple(
        _in_dram(step, next(numbers), pulled) if step.tier == m.Tier.DRAM else _below_dram(step, readers[step.tier])
        for step in steps
    )


def _in_dram(step: m.RestoreStep, number: int, pulled: _Pulled) -> RestoreSource:
    """Shared memory of this node, or of another one."""
    return RestoreSource(
        key=step.chunk,
        start=step.start,
        num_tokens=step.num_tokens,
        open=lambda: read_chunk(whole(pulled.get(number))),
        place=step.tier,
        num_bytes=step.num_bytes,
        prefetch=pulled.start,
        forget=pulled.forget,
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


class _Pulled:
    """The objects of one turn: all asked for with the first of them; what is here then comes with one question of Ray,
    the rest one by one. For one thread at a time."""

    def __init__(self, checkout: Callable[[], Sequence[Any]], deadline_s: float) -> None:
        self._checkout: Callable[[], Sequence[Any]] | None = checkout  # until it was asked
        self._deadline_s = deadline_s
        self._refs: Sequence[Any] = ()
        self._failure: RayError | None = None
        self._here: list[Any] = []
        self._found: dict[Any, Any] = {}

    def start(self) -> None:
        """Starts bringing objects to this node; those that are here cost nothing. Waits for the checkout alone."""
        checkout, self._checkout = self._checkout, None
        if checkout is None:
            return
        try:
            self._refs = checkout()
            wanted = list(dict.fromkeys(ref for ref in self._refs if ref is not None))
            if wanted:
                self._here = ray.wait(wanted, num_returns=len(wanted), timeout=0, fetch_local=True)[0]
        except RayError as error:  # opening tells
            self._failure = error

    def get(self, number: int) -> Any:
        """That object. Raises what Ray raises if it is lost, or does not come within the deadline."""
        self.start()
        if self._failure is not None:
            raise self._failure
        ref = self._refs[number]
        if ref in self._here:
            here, self._here = self._here, []
            with suppress(RayError):  # each then says for itself what is wrong with it
                self._found.update(zip(here, ray.get(here, timeout=self._deadline_s)))
        return self._found[ref] if ref in self._found else ray.get(ref, timeout=self._deadline_s)

    def forget(self) -> None:
        """Lets go of the memory of what was found, for all of the turn: what is opened after that comes alone."""
        self._here, self._found = [], {}
