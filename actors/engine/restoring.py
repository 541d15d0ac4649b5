"""Turns between their blocks and their first step of their own: what is loading, what may be computed meanwhile.

    begin ──> Load (a loader thread) ──> finished ──> adopt
                │ TAIL: the engine computes the front, `Part.is_front`
                └ LAYERS: the turn joins a step behind the load, layer by layer, `Part.gate`

The numbers behind it are decided in `actors.engine.overlap`; the waiting is done by the forward (Gate).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from actors.engine.batching import Demand, Phase, Work
from actors.engine.blocks import BlockPool
from actors.engine.capture import Capture
from actors.engine.load import Load, LoadRates, RestoreJob
from actors.engine.meter import Meter
from actors.engine.overlap import LoadOrder, choose_order, front_tokens, may_join
from actors.engine.restore import Loader
from actors.engine.save import WriteBuffer
from actors.engine.sequence import Piece, Sequence
from actors.engine.turns import EngineConfig, FailedRestore, StartInfo

_MIN_STALL_S = 0.05  # a joined step waits for a late layer at least that long, and at most ...
_STALL_STEPS = 1.0  # ... so many times what the step should take
_LOOK_AGAIN_S = 0.005


class Gate:
    """Lets a step that has joined a load go on to a layer when that layer is in place. One step's; not reused."""

    def __init__(self, load: Load, patience_s: float) -> None:
        self._load, self._patience_s = load, patience_s
        self.is_open = True
        """False once a layer did not come: what the step computes for this turn is void."""
        self.stalled_s = 0.0

    def wait(self, layer: int) -> None:
        if self.is_open and self._load.layers_ready <= layer:
            began = time.monotonic()
            self.is_open = self._load.wait_layer(layer, self._patience_s - self.stalled_s)
            self.stalled_s += time.monotonic() - began
        if self.is_open:
            self._load.fences[layer].hold()


@dataclass(frozen=True, slots=True)
class Part:
    """One turn's share of a step: the tokens [start, end)."""

    sequence: Sequence
    start: int
    num_tokens: int
    gate: Gate | None = None
    """Set where the turn's history is still being loaded, layer by layer."""
    is_front: bool = False
    """Tokens that a load comes to meet."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether its last token's logits are wanted."""
        return self.end == self.sequence.num_tokens


@dataclass(slots=True)
class _Restore:
    sequence: Sequence
    load: Load
    may_join: bool = True
    """Not again after a step has waited for it in vain."""
    stall_s: float = 0.0
    """What a step that joins it knows that it will wait."""


class Restoring:
    """All restores under way. For the engine's thread."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockPool,
        buffer: WriteBuffer,
        capture: Capture,
        loader: Loader,
        rates: LoadRates,
        meter: Meter,
    ) -> None:
        self._config, self._blocks, self._buffer = config, blocks, buffer
        self._capture, self._loader, self._rates, self._meter = capture, loader, rates, meter
        self._running: dict[str, _Restore] = {}
        self._unsettled = 0

    @property
    def num_unsettled(self) -> int:
        """Loads that hold blocks, abandoned ones too."""
        return self._unsettled

    # --- a restore's way ----------------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> bool:
        """Starts loading what its blocks do not hold yet; False if there is nothing to load."""
        pieces = sequence.pieces(sequence.num_in_hbm)
        if not pieces:
            return False
        end = pieces[-1].end
        sequence.stored = _whole_chunks(pieces, sequence.chunk_tokens)
        slot = self._capture.reserve_tail(sequence, end)
        size = self._config.block_tokens
        blocks = tuple(sequence.table.blocks[pieces[0].start // size : -(-end // size)])
        self._blocks.pin(blocks)
        if slot is not None:
            self._buffer.hold(slot)
        job = RestoreJob(
            turn_id=sequence.turn_id,
            root=sequence.request.root,
            pieces=pieces,
            rows=sequence.table.rows(0, end),
            blocks=blocks,
            tail_slot=slot,
            order=self._order(sequence, pieces),
        )
        self._running[sequence.turn_id] = _Restore(sequence, self._loader.submit(job))
        self._unsettled += 1
        return True

    def settle(self) -> None:
        """What loaders have let go of is free again."""
        for load in self._loader.settled():
            self._unsettled -= 1
            self._blocks.unpin(load.job.blocks)
            if load.job.tail_slot is not None:
                self._buffer.release(load.job.tail_slot)

    def finished(self) -> list[Sequence]:
        """Turns whose load is over, or has been met by what the engine computed."""
        return [r.sequence for r in self._running.values() if r.load.result is not None or r.load.is_met]

    def overdue(self) -> list[Sequence]:
        now, limit_s = time.monotonic(), self._config.load_deadline_s
        return [r.sequence for r in self._running.values() if r.load.result is None and now - r.load.began_at > limit_s]

    def adopt(self, sequence: Sequence) -> StartInfo:
        """The turn goes on with what its load brought."""
        load = self._running.pop(sequence.turn_id).load
        load.abandon()
        for fence in load.fences[-1:]:
            fence.hold()
        result = load.result or load.so_far()  # met by what the engine computed, before its loader said that it is over
        failed_at = {failed.key for failed in result.failed}
        for piece in load.job.pieces:
            index = piece.start // sequence.chunk_tokens
            if piece.source.key in failed_at:
                sequence.stored.discard(index)
                if piece.start < sequence.num_computed < piece.end:
                    sequence.num_computed = piece.start  # captured from its first token on
        if load.job.order is LoadOrder.LAYERS:
            loaded_end = result.spans[-1][1] if result.spans else load.job.start
            sequence.stored = {i for i in sequence.stored if i < loaded_end // sequence.chunk_tokens}
            if loaded_end < load.end:  # of a whole load, a step that joined it has filled slots behind it
                self._capture.keep_slot(sequence, loaded_end // sequence.chunk_tokens)
        num_in_hbm = sequence.num_in_hbm
        sequence.adopt(result.spans, result.marks)
        return StartInfo(
            num_in_hbm=num_in_hbm,
            loaded=result.spans,
            failed=result.failed,
            restore_s=result.finished_at - sequence.admitted_at,
            queued_s=sequence.admitted_at - sequence.added_at,
        )

    def nothing_loaded(self, sequence: Sequence) -> StartInfo:
        """For a turn that had nothing to load, or was given up."""
        return StartInfo(
            num_in_hbm=sequence.num_in_hbm,
            failed=sequence.failed_restore or (),
            queued_s=sequence.admitted_at - sequence.added_at,
        )

    def give_up(self, sequence: Sequence) -> bool:
        """It has waited long enough and computes what is missing. True if its loader may still write into its blocks:
        then it must begin again with others. Otherwise it is `finished` now."""
        load = self._running[sequence.turn_id].load
        is_writing, so_far = load.abandon(), load.so_far()
        has_failed = {failed.key for failed in so_far.failed}
        late = tuple(
            FailedRestore(
                key=piece.source.key,
                reason="late",
                num_tokens=piece.end - piece.start,
                detail=f"not loaded within {self._config.load_deadline_s:g} s",
            )
            for piece in load.job.pieces
            if piece.source.key not in has_failed
            and not any(start < piece.end and piece.start < end for start, end in so_far.spans)
        )
        if is_writing:
            del self._running[sequence.turn_id]
            sequence.failed_restore = (*so_far.failed, *late)
        else:
            load.result = replace(so_far, failed=(*so_far.failed, *late))
        return is_writing

    def abandon(self, sequence: Sequence) -> None:
        """The turn leaves."""
        self._running.pop(sequence.turn_id).load.abandon()

    # --- a step -------------------------------------------------------------------------------------------------------

    def demand(self, sequence: Sequence, beside_s: float = 0.0) -> Demand:
        """What a step may compute for a turn that loads: all behind the load, if it joins; else some of the front.

        `beside_s`: what the step takes for turns that compute; 0: there are none.
        """
        restore = self._running[sequence.turn_id]
        demand, load = sequence.demand(), restore.load
        if self._joins(restore, beside_s):
            return replace(demand, phase=Phase.COMPUTING, num_computed=load.end, stop=None)
        num_front = 0
        if load.job.order is LoadOrder.TAIL:
            expected_s = (self._rates.load_s(load.job.pieces) or 0.0) / (load.end - load.job.start)
            tail = load.tail(time.monotonic(), expected_s)
            num_front = front_tokens(sequence.num_computed, tail, self._meter.prefill_s_per_token)
        return replace(demand, stop=sequence.num_computed + num_front)

    def part(self, sequence: Sequence, work: Work) -> Part | None:
        """The turn's share of a step; None if its loader has come to these tokens in the meantime."""
        restore = self._running[sequence.turn_id]
        if work.start >= restore.load.end:
            patience_s = restore.stall_s + max(_MIN_STALL_S, _STALL_STEPS * self._compute_s(work.num_tokens))
            return Part(sequence, work.start, work.num_tokens, gate=Gate(restore.load, patience_s))
        num_tokens = restore.load.reserve_front(work.start, work.num_tokens)
        return Part(sequence, work.start, num_tokens, is_front=True) if num_tokens else None

    def end_step(self, parts: SequenceOf[Part]) -> None:
        """The forward is over: loaders may go on, and turns that waited in vain will not join again."""
        for part in parts:
            if part.is_front:
                self._running[part.sequence.turn_id].load.end_front()
            elif part.gate is not None and not part.gate.is_open:
                self._running[part.sequence.turn_id].may_join = False

    def patience_s(self, longest_s: float) -> float:
        """How long the engine may wait for news before it looks at the clock again."""
        is_met_halfway = any(restore.load.job.order is LoadOrder.TAIL for restore in self._running.values())
        return min(longest_s, _LOOK_AGAIN_S) if is_met_halfway else longest_s

    # --- what overlap needs to know -----------------------------------------------------------------------------------

    def _order(self, sequence: Sequence, pieces: tuple[Piece, ...]) -> LoadOrder:
        buffered = sum(piece.source.buffered for piece in pieces)
        if buffered > self._config.read_ahead_chunks:
            return LoadOrder.TAIL
        start, end = pieces[0].start, pieces[-1].end
        if self._meter.prefill_s_per_token is None:
            return LoadOrder.LAYERS
        return choose_order(
            self._rates.load_s(pieces), self._compute_s(end - start), self._compute_s(sequence.num_tokens - end)
        )

    def _joins(self, restore: _Restore, beside_s: float) -> bool:
        load = restore.load
        if load.job.order is not LoadOrder.LAYERS or not restore.may_join:
            return False
        expected = self._layers_to_come(load)
        if expected is None:
            return False
        first_in_s, pace_s = expected
        num_tokens = min(restore.sequence.num_tokens - load.end, self._config.max_step_tokens)
        layer_s = (self._compute_s(num_tokens) + beside_s) / load.num_layers
        restore.stall_s = 0.0 if beside_s else first_in_s  # who is alone waits anyway: rather at the gate
        return may_join(
            load.layers_ready, load.num_layers, pace_s, layer_s, first_in_s=first_in_s, spare_s=restore.stall_s
        )

    def _layers_to_come(self, load: Load) -> tuple[float, float] | None:
        """Seconds until the next layer is there, and for each one behind it. As it goes so far, or, before the first
        layer is there, as it was lately in those places; None if that is not known, or is over."""
        now = time.monotonic()
        pace_s = load.layer_pace(now)
        if pace_s is not None:
            return pace_s, pace_s
        load_s, lead_s = self._rates.load_s(load.job.pieces), self._rates.lead_s(load.job.pieces)
        if load.result is not None or load.layers_ready or load_s is None or lead_s is None or self._loader.is_crowded:
            return None
        pace_s = max(0.0, load_s - lead_s) / load.num_layers
        first_in_s = lead_s + pace_s - (now - load.began_at)
        return (first_in_s, pace_s) if first_in_s > 0 else None

    def _compute_s(self, num_tokens: int) -> float:
        return num_tokens * (self._meter.prefill_s_per_token or 0.0)


def _whole_chunks(pieces: tuple[Piece, ...], chunk_tokens: int) -> set[int]:
    return {piece.start // chunk_tokens for piece in pieces if piece.end - piece.start == chunk_tokens}
