"""One restore on its way: what is wanted, how far it is, and what came of it. Shared by a loader thread and the engine.

    tokens   [start ..... computed_to)[ ........ )[claimed_from ... frontier)[frontier ...... end)
             the engine computes here  nobody yet  the loader writes here     in place, all layers

A chunk that fails while a load goes from the tail leaves a hole: what is in place behind it becomes an island.
A row has one writer at a time: the loader claims the tokens of a chunk before it writes them, the engine those of a
step before it computes them. This file reads no chunk, touches no tensor and decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition

from torch import Tensor

from actors.engine.overlap import LoadOrder, TailLoad
from actors.engine.sequence import Piece
from actors.engine.transfer import Fence
from actors.engine.turns import FailedRestore
from storage.format import CorruptChunk

_SMOOTHING = 0.3  # weight of the newest measurement


@dataclass(frozen=True, kw_only=True)
class RestoreJob:
    """What one turn restores."""

    turn_id: str
    root: str
    pieces: tuple[Piece, ...]
    rows: Tensor
    """Pool rows (CPU) of the tokens [0, end)."""
    blocks: tuple[int, ...]
    tail_slot: int | None
    """Where the raw keys of the part-filled last chunk go, to be extended later."""
    order: LoadOrder

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def end(self) -> int:
        return self.pieces[-1].end


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a load brought: the tokens of these spans (start, end), ascending, are in the pool, in all layers."""

    spans: tuple[tuple[int, int], ...]
    failed: tuple[FailedRestore, ...]
    marks: tuple[tuple[int, str], ...]
    """All marks of the chunks used, of which some may lie beyond what was wanted of them."""
    finished_at: float


class Load:
    """Progress of one restore. Every method may be called from both threads, and holds the lock for a moment only."""

    def __init__(self, job: RestoreJob, num_layers: int, wake: Callable[[], None]) -> None:
        self.job, self.num_layers = job, num_layers
        self.began_at = time.monotonic()
        self.frontier = job.end
        self._frontier_at = self.began_at
        self.layers_ready = 0
        """Layers of the claimed tokens that are in place."""
        self.lead_s: float | None = None
        """From its beginning until it began to write."""
        self.result: Restored | None = None
        self.is_abandoned = False
        self.fences: list[Fence] = []
        """By layer (LAYERS) or chunk (TAIL), there before what it is behind counts as in place. The last one is behind
        everything that was written."""
        self._islands: tuple[tuple[int, int], ...] = ()
        self._end = job.end  # of what lies before the islands
        self._failures: dict[int, Exception] = {}  # by piece
        self._marks: tuple[tuple[int, str], ...] = ()
        self._wake = wake
        self._changed = Condition()
        self._claimed_from: int | None = None
        self._claimed_at = 0.0
        self._computed_to = job.start
        self._is_computing = False

    # --- the loader's side --------------------------------------------------------------------------------------------

    def claim(self, start: int) -> int | None:
        """From where on the loader may write, up to the frontier: not what the engine has computed, or is about to.

        Waits for a step that computes beyond `start`. None: there is nothing left to write.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.is_abandoned or not (self._is_computing and self._computed_to > start),
            )
            start = max(start, self._computed_to)
            if self.is_abandoned or start >= self.frontier:
                return None
            self._claimed_from, self._claimed_at, self.layers_ready = start, time.monotonic(), 0
            self.lead_s = self.lead_s or self._claimed_at - self.began_at
            return start

    def layer_done(self) -> None:
        """One more layer of the claimed tokens is in place."""
        with self._changed:
            self.layers_ready += 1
            self._changed.notify_all()
        self._wake()

    def piece_done(self, marks: tuple[tuple[int, str], ...]) -> None:
        """The claimed tokens are in place, from a chunk with these marks."""
        with self._changed:
            assert self._claimed_from is not None
            self._marks += marks
            self.frontier, self._claimed_from = self._claimed_from, None
            self._frontier_at = time.monotonic()
            self._changed.notify_all()
        self._wake()

    @property
    def is_met(self) -> bool:
        """The engine computes all that is not in place."""
        with self._changed:
            return self._computed_to >= self.frontier

    def skip_piece(self, i: int, error: Exception) -> None:
        """The tokens of piece `i`, up to the frontier, will not come: the load goes on before them."""
        with self._changed:
            self._claimed_from = None
            self._failures[i] = error
            self._islands = self._spans()
            self.frontier = self._end = self.job.pieces[i].start
            self._frontier_at = time.monotonic()
            self._changed.notify_all()
        self._wake()

    def so_far(self) -> Restored:
        """What a load from the tail has brought, and what failed."""
        with self._changed:
            return restored(self.job, self._spans(), self._failures, self._marks)

    def finish(self, result: Restored) -> None:
        """The load is over; nothing more is written. Of one that was abandoned the result counts for nothing."""
        with self._changed:
            self._claimed_from = None
            if self.is_abandoned:
                return
            is_whole = result.spans == ((self.job.start, self.job.end),)
            self.layers_ready = self.num_layers if is_whole else 0
            self.result = result
            self._changed.notify_all()
        self._wake()

    def _spans(self) -> tuple[tuple[int, int], ...]:
        """What is in place, ascending."""
        current = ((self.frontier, self._end),) if self.frontier < self._end else ()
        return (*current, *self._islands)

    # --- the engine's side --------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        return self.job.end

    def reserve_front(self, start: int, num_tokens: int) -> int:
        """The engine is about to compute from `start` on; how many of the tokens it wants it may. Then `end_front`."""
        with self._changed:
            num_tokens = max(0, min(num_tokens, self._gap_end() - start))
            if num_tokens:
                self._computed_to, self._is_computing = start + num_tokens, True
            return num_tokens

    def _gap_end(self) -> int:
        return self.frontier if self._claimed_from is None else self._claimed_from

    def end_front(self) -> None:
        """The step is over."""
        with self._changed:
            self._is_computing = False
            self._changed.notify_all()

    def layer_pace(self, now: float) -> float | None:
        """Seconds a layer of the claimed tokens took so far; None while none is there."""
        with self._changed:
            if self._claimed_from is None or not self.layers_ready:
                return None
            return (now - self._claimed_at) / self.layers_ready

    def tail(self, now: float, expected_s_per_token: float) -> TailLoad:
        """How far it is from the tail. A token takes as long as expected; longer if it turned out so, or if the chunk
        that is under way came only now."""
        with self._changed:
            num_tokens, under_way_s = self.job.end - self.frontier, now - self._frontier_at
            starts = [piece.start for piece in self.job.pieces if piece.start < self.frontier]
            paces = [expected_s_per_token]
            if num_tokens:
                paces.append((self._frontier_at - self.began_at) / num_tokens)
            if starts:
                paces.append(under_way_s / (self.frontier - starts[-1]))
            return TailLoad(
                frontier=self.frontier,
                gap_end=self._gap_end(),
                starts=starts,
                s_per_token=max(paces),
                under_way_s=under_way_s,
            )

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Waits until `layer` is in place; False if it will not be, or not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.layers_ready > layer or self.result is not None, timeout_s)
            return self.layers_ready > layer

    def abandon(self) -> bool:
        """Nobody wants it any more. True if a write is under way, which nobody can stop: its rows cannot be used until
        the load is settled."""
        with self._changed:
            self.is_abandoned = True
            self._changed.notify_all()
            return self._claimed_from is not None


class LoadRates:
    """Seconds per byte of each place, as measured lately, and those before the first byte. Loaders write, the engine
    reads."""

    def __init__(self) -> None:
        self._s_per_byte: dict[str, float] = {}
        self._lead_s: dict[str, float] = {}  # per chunk

    def measured(self, piece: Piece, seconds: float) -> None:
        self.measured_together([piece], seconds)

    def measured_together(self, pieces: Sequence[Piece], seconds: float, lead_s: float | None = None) -> None:
        """Only where all lie in one place is it clear who took the time. `lead_s`, if it was measured: how long the
        first layer was not even being loaded."""
        places = {piece.source.place for piece in pieces}
        num_bytes = sum(piece.num_bytes for piece in pieces)
        if len(places) == 1 and num_bytes:
            [place] = places
            _smooth(self._s_per_byte, place, seconds / num_bytes)
            if lead_s is not None:
                _smooth(self._lead_s, place, lead_s / len(pieces))

    def load_s(self, pieces: Sequence[Piece]) -> float | None:
        """How long these would take; None if one of their places has never been measured."""
        total_s = 0.0
        for piece in pieces:
            s_per_byte = self._s_per_byte.get(piece.source.place)
            if s_per_byte is None:
                return None
            total_s += s_per_byte * piece.num_bytes
        return total_s

    def lead_s(self, pieces: Sequence[Piece]) -> float | None:
        """How long it takes until the first layer of these begins to come; None if that was never measured."""
        leads_s = [self._lead_s.get(piece.source.place) for piece in pieces]
        return sum(lead_s or 0.0 for lead_s in leads_s) if None not in leads_s else None

    def bytes_per_s(self) -> dict[str, float]:
        """By place."""
        return {place: 1.0 / s_per_byte for place, s_per_byte in self._s_per_byte.items() if s_per_byte > 0}


def _smooth(averages: dict[str, float], place: str, new: float) -> None:
    old = averages.get(place, new)
    averages[place] = old + _SMOOTHING * (new - old)


def restored(
    job: RestoreJob,
    spans: tuple[tuple[int, int], ...],
    failures: Mapping[int, Exception],
    marks: Sequence[tuple[int, str]] = (),
) -> Restored:
    """The outcome of a load that brought `spans`, without the pieces in `failures` (by number)."""
    return Restored(spans=spans, failed=_report(job, failures), marks=tuple(marks), finished_at=time.monotonic())


def _report(job: RestoreJob, failures: Mapping[int, Exception]) -> tuple[FailedRestore, ...]:
    """From the tail a failed chunk answers for itself; layer by layer for all up to the next failed one, as nothing
    behind it is used."""
    order = sorted(failures)
    starts = [job.pieces[i].start for i in order]
    ends = [*starts[1:], job.end] if job.order is LoadOrder.LAYERS else [job.pieces[i].end for i in order]
    return tuple(
        FailedRestore(
            key=job.pieces[i].source.key,
            reason="corrupt" if isinstance(failures[i], CorruptChunk) else "lost",
            num_tokens=end - start,
            detail=f"{type(failures[i]).__name__}: {failures[i]}",
        )
        for i, start, end in zip(order, starts, ends)
    )
