"""The engine: turns go in, tokens and chunks come out, one step at a time. Runs without Ray.

    step:  settle what loaders and savers finished -> plan -> one forward -> sample -> settle the tokens

Ragged continuous batching: the tokens of a step, prefill chunks and decodes of all turns, are one flattened forward
over paged KV. Turns whose restore is under way are `actors.engine.restoring`'s. `add`, `abort`, `forget`,
`wait_for_work`, `ready_chunks`, `take_chunk`, `drop_chunk` and `kept` may be called from any thread; everything else
belongs to the one thread that calls `step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.attention import SdpaAttention
from actors.engine.batching import Demand, Room, StepPlan, plan_step
from actors.engine.blocks import BlockPool, BlockState, BlockTable, KVPool
from actors.engine.capture import Capture
from actors.engine.kept import BlockEviction, KeptChunks, Match, OldestFirst
from actors.engine.load import LoadRates
from actors.engine.loading import LoadedModel
from actors.engine.mailbox import Mailbox
from actors.engine.meter import Meter
from actors.engine.params import SampledToken
from actors.engine.restore import Loader
from actors.engine.restoring import Part, Restoring
from actors.engine.runner import Batch, BatchPart, ModelRunner, build_batch
from actors.engine.sampling import LogitsError, sample
from actors.engine.save import ReadyChunks, Saver, WriteBuffer
from actors.engine.sequence import Sequence, SequenceState
from actors.engine.transfer import KVMemory, transfer_for
from actors.engine.turns import (
    EngineConfig,
    FailedRestore,
    FinishReason,
    Limits,
    ReadyChunk,
    Request,
    RestoreSource,
    StartInfo,
    TurnOutput,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "FailedRestore",
    "FinishReason",
    "ReadyChunk",
    "Request",
    "RestoreSource",
    "StartInfo",
    "TurnOutput",
]

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05  # a step with nothing to compute waits this long for a loader or saver, then returns


class Engine:
    """One model on one device. See the module's docstring for who may call what."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel | None = None,
        eviction: BlockEviction | None = None,
    ) -> None:
        """Loads the model (ModelError) unless one is given; several engines may share one.

        `eviction`: the order in which kept chunks leave the pool; any `policies.eviction.EvictionPolicy` will do.
        """
        self.config = config
        self._num_threads = config.num_threads or torch.get_num_threads()
        self._use_threads()
        self.loaded = loaded or LoadedModel.load(config.model, dtype=config.dtype, device=config.device)
        self._limits = Limits(
            context_window=self.loaded.context_window,
            pool_tokens=config.num_blocks * config.block_tokens,
            chunk_tokens=config.chunk_tokens,
            vocab_size=self.loaded.vocab_size,
            has_tokenizer=self.loaded.tokenizer is not None,
        )
        self.meter = Meter()
        self._mailbox = Mailbox()
        self._build(self.loaded, eviction or OldestFirst())
        self._sequences: dict[str, Sequence] = {}
        self._outputs: dict[str, TurnOutput] = {}
        self._num_arrivals = 0
        self._stepping_since: float | None = None

    def _build(self, loaded: LoadedModel, eviction: BlockEviction) -> None:
        config, where = self.config, (loaded.torch_dtype, loaded.device)
        self._blocks = BlockPool(config.num_blocks)
        self._pool = KVPool(loaded.layers, config.num_blocks, config.block_tokens, *where)
        self._buffer = WriteBuffer(loaded.layers, config.write_buffer_chunks, config.chunk_tokens, *where)
        self._ready = ReadyChunks(config.max_ready_chunks)
        transfer = transfer_for(
            KVMemory(self._pool, self._buffer, loaded.rotations),
            loaded.layers,
            config.chunk_tokens,
            num_buffers=config.staging_buffers,
            max_positions=self._limits.max_turn_tokens,
        )
        saver = Saver(transfer, self._ready, loaded.layers, loaded.dtype, self._mailbox.wake)
        self._saver = saver
        self._kept: KeptChunks | None = None
        if config.keep_finished:
            self._kept = KeptChunks(self._blocks, self._buffer, eviction, loaded.kv_bytes_per_token)
        self._capture = Capture(self._blocks, self._buffer, saver, self._ready, self._kept)
        self._rates = LoadRates()
        self._loader = Loader(
            transfer,
            loaded.layers,
            loaded.torch_dtype,
            self._rates,
            self._mailbox.wake,
            num_threads=config.num_loaders,
            read_ahead=config.read_ahead_chunks,
        )
        self._restoring = Restoring(
            config, self._blocks, self._buffer, self._capture, self._loader, self._rates, self.meter
        )
        self._runner = ModelRunner(loaded.model, loaded.rotations, self._pool, self._buffer, SdpaAttention())

    def _use_threads(self) -> None:
        """torch counts threads per thread, and new threads start with what any of them set last (loaders: 1): whoever
        builds or steps the engine says how many."""
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)

    # --- from any thread ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A turn joins the queue. ValueError, with advice, for one that can never run here."""
        self._limits.check(request)
        self._mailbox.add(request)

    def abort(self, turn_id: str) -> None:
        """The turn ends with ABORTED at one of the next steps. Unknown turns (finished ones, say) are ignored."""
        self._mailbox.abort(turn_id)

    def take_chunk(self, key: str) -> npt.NDArray[np.uint8]:
        """The bytes of a chunk on offer; waits until it is encoded. KeyError if it is not here (any more)."""
        return self._ready.take(key)

    def drop_chunk(self, key: str) -> None:
        """Forgets a ready chunk; unknown keys are ignored."""
        self._ready.drop(key)

    def forget(self, marks: Iterable[str]) -> None:
        """What begins with one of these prefixes (keys of marks) is found by no later turn and offered to nobody: in
        the pool and the write buffer at the next step, on offer at once. Turns that run go on."""
        self._mailbox.doom(marks)

    def kept(self, keys: Iterable[str]) -> list[str]:
        """Which of these chunks are in the pool. The answer may be old by the time it is read."""
        return [key for key in keys if self._kept is not None and key in self._kept]

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do, or will have as soon as a loader or saver is done."""
        mailbox = self._mailbox
        is_told = mailbox.num_waiting or mailbox.num_doomed
        return bool(is_told or self._sequences or self._capture.num_saving or self._restoring.num_unsettled)

    def wait_for_work(self, timeout_s: float) -> bool:
        """Waits until there is work, at most `timeout_s`; whether there is."""
        return self._mailbox.wait_for(lambda: self.has_work, timeout_s)

    # --- the loop -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TurnOutput]:
        """One iteration; what it brought, at most one output per turn. Waits a moment if only helpers are at work."""
        self._stepping_since = time.monotonic()
        try:
            return self._step()
        finally:
            self._stepping_since = None

    def _step(self) -> list[TurnOutput]:
        self._use_threads()
        num_changes = self._mailbox.num_changes
        self._take_requests()
        self._forget_doomed()
        self._settle_loads()
        self._capture.settle()
        self._settle_aborts()
        work = self._planned_work(self._plan_and_admit())
        if work:
            self._compute(work)
        elif not self._outputs and self.has_work:
            self._mailbox.wait_for_change(num_changes, self._restoring.patience_s(_IDLE_WAIT_S))
        outputs, self._outputs = list(self._outputs.values()), {}
        return outputs

    def _plan_and_admit(self) -> StepPlan:
        """The plan of this step, in which those whom it admits take part: with them it is made anew."""
        while True:
            matches = self._match_queued()
            beside_s = self._expected_s()
            demands = [self._demand(sequence, matches, beside_s) for sequence in self._sequences.values()]
            plan = plan_step(demands, self._room())
            self._follow(plan)
            if not plan.admit:
                return plan

    def _take_requests(self) -> None:
        for request in self._mailbox.take_requests():
            self._num_arrivals += 1
            table = BlockTable(self.config.block_tokens)
            self._sequences[request.turn_id] = Sequence(request, self._num_arrivals, table, self.config.chunk_tokens)

    def _forget_doomed(self) -> None:
        marks = self._mailbox.take_doomed()
        if not marks:
            return
        for sequence in self._sequences.values():
            sequence.doomed = sequence.doomed or sequence.begins_with(marks)
        self._ready.drop_marked(marks)
        if self._kept is not None:
            self._kept.drop_marked(marks)

    def _settle_loads(self) -> None:
        """Turns whose load is over, or was waited for long enough, go on."""
        self._restoring.settle()
        for sequence in self._restoring.overdue():
            if self._restoring.give_up(sequence):
                self._requeue(sequence)
        for sequence in self._restoring.finished():
            self._adopt(sequence)

    def _adopt(self, sequence: Sequence) -> None:
        info = self._restoring.adopt(sequence)
        sequence.move_to(SequenceState.WAITING)
        self._start(sequence, info)

    def _requeue(self, sequence: Sequence) -> None:
        """Its loader may still write into its blocks, nobody knows for how long: it gets others."""
        self._capture.close(sequence, is_sound=True)
        self._blocks.release(sequence.table.blocks)
        sequence.begin_again(BlockTable(self.config.block_tokens))

    def _settle_aborts(self) -> None:
        for turn_id in self._mailbox.aborts(self._sequences.keys()):
            self._finish(self._sequences[turn_id], FinishReason.ABORTED)

    def _match_queued(self) -> dict[str, Match]:
        """What the waiting turns would find in the pool."""
        if self._kept is None:
            return {}
        queued = [s for s in self._sequences.values() if s.state is SequenceState.QUEUED and s.request.save]
        matches = {sequence.turn_id: self._kept.match(sequence) for sequence in queued}
        self._kept.note_waiting((sequence.arrival, matches[sequence.turn_id]) for sequence in queued)
        return matches

    def _expected_s(self) -> float:
        """What a step should take for the turns that compute already."""
        computing = [s for s in self._sequences.values() if s.state in (SequenceState.WAITING, SequenceState.RUNNING)]
        remaining = [sequence.num_tokens - sequence.num_computed for sequence in computing]
        num_decodes = remaining.count(1)
        return self.meter.expected_s(min(sum(remaining) - num_decodes, self.config.max_step_tokens), num_decodes)

    def _demand(self, sequence: Sequence, matches: dict[str, Match], beside_s: float) -> Demand:
        if sequence.state is SequenceState.RESTORING:
            return self._restoring.demand(sequence, beside_s)
        match = matches.get(sequence.turn_id)
        return sequence.demand(match.num_held_blocks if match is not None else None)

    def _room(self) -> Room:
        count = self._blocks.count
        return Room(
            num_free_blocks=count(BlockState.FREE) + count(BlockState.KEPT),
            num_pending_blocks=count(BlockState.PENDING),
            block_tokens=self.config.block_tokens,
            max_step_tokens=self.config.max_step_tokens,
            max_running_turns=self.config.max_running_turns,
        )

    def _follow(self, plan: StepPlan) -> None:
        """Everything in a plan but the forward itself."""
        for turn_id in plan.preempt:
            self._finish(self._sequences[turn_id], FinishReason.PREEMPTED)
        for work in plan.work:
            self._give_blocks(self._sequences[work.turn_id], work.num_new_blocks)
        for turn_id in plan.admit:
            self._admit(self._sequences[turn_id])

    def _give_blocks(self, sequence: Sequence, count: int) -> None:
        if count > self._blocks.num_free and self._kept is not None:
            self._kept.make_room(count)
        table = sequence.table
        spare = sequence.expected_growth // self.config.block_tokens
        table.append(self._blocks.take(count, after=table.blocks[-1] if table.blocks else None, spare=spare))

    def _admit(self, sequence: Sequence) -> None:
        """Blocks for all its tokens, shared ones first; what else can be restored starts loading."""
        sequence.admitted_at = time.monotonic()
        if self._kept is not None and sequence.request.save:
            self._share(sequence, self._kept.match(sequence))
        num_blocks = -(-sequence.num_tokens // self.config.block_tokens)
        self._give_blocks(sequence, num_blocks - len(sequence.table.blocks))
        if self._restoring.begin(sequence):
            sequence.move_to(SequenceState.RESTORING)
        else:
            sequence.move_to(SequenceState.WAITING)
            self._start(sequence, self._restoring.nothing_loaded(sequence))

    def _share(self, sequence: Sequence, match: Match) -> None:
        """The beginning of its prompt is in the pool."""
        assert self._kept is not None
        self._capture.use(sequence, match.chunks)
        for chunk in match.chunks:
            sequence.table.append(chunk.blocks)
        if match.tail is not None and match.tail.end >= sequence.restorable_end(match.tail.start):
            sequence.slots[match.tail.start // sequence.chunk_tokens] = self._kept.take_tail(match.tail)
            sequence.table.append(match.tail.blocks)
            sequence.found(match.tail.end, match.tail.marks)
        elif match.chunks:
            sequence.found(match.chunks[-1].end, ())

    def _start(self, sequence: Sequence, info: StartInfo) -> None:
        """Everything that could be restored is in place."""
        sequence.open_text(self.loaded.tokenizer)
        self._tell(TurnOutput(turn_id=sequence.turn_id, started=info))

    def _planned_work(self, plan: StepPlan) -> list[Part]:
        """The plan's work, as far as loaders leave it to us; slots for what will be saved."""
        parts = []
        for work in plan.work:
            sequence = self._sequences[work.turn_id]
            if sequence.state is SequenceState.RESTORING:
                part = self._restoring.part(sequence, work)
                if part is None:
                    continue
            else:
                part = Part(sequence, work.start, work.num_tokens)
            if not part.is_front:
                self._capture.reserve(sequence, part.start, part.end)
            parts.append(part)
        return parts

    def _compute(self, parts: list[Part]) -> None:
        """The forward of a plan, and one token for every turn whose known tokens it completes."""
        began = time.monotonic()
        error: Exception | None = None
        try:
            logits = self._runner.forward(self._batch(parts))
        except Exception as failure:  # foreign code, or out of memory: the turns of this step fail, the engine lives on
            log.exception("a forward of %d tokens for %d turns failed", sum(p.num_tokens for p in parts), len(parts))
            error = failure
        self._restoring.end_step(parts)
        if error is not None:
            for part in parts:
                self._finish(part.sequence, FinishReason.FAILED, f"{type(error).__name__}: {error}")
            return
        rows = [part for part in parts if part.is_last]
        complete = [(part.sequence, row) for row, part in enumerate(rows) if self._is_good(part)]
        for part in parts:
            if self._is_good(part):
                self._advance(part)
        self._sample([sequence for sequence, _ in complete], logits[[row for _, row in complete]])
        for part in parts:
            if part.sequence.state is SequenceState.RUNNING:  # not for turns that failed: their KV may be bad
                self._capture.settle_chunks(part.sequence)
        num_decodes = sum(part.num_tokens == 1 for part in parts)
        num_tokens = sum(part.num_tokens for part in parts)
        self.meter.record(num_tokens - num_decodes, num_decodes, time.monotonic() - began)

    @staticmethod
    def _is_good(part: Part) -> bool:
        """Not for a turn that joined ahead of its load when the load did not come: its part of the step is void."""
        return part.gate is None or part.gate.is_open

    def _advance(self, part: Part) -> None:
        sequence = part.sequence
        if part.gate is not None:
            self._adopt(sequence)
        if sequence.state is SequenceState.WAITING:
            sequence.move_to(SequenceState.RUNNING)
        sequence.advance(part.end)

    def _batch(self, parts: list[Part]) -> Batch:
        batch_parts = [
            BatchPart(
                token_ids=part.sequence.token_ids[part.start : part.end],
                start=part.start,
                table=part.sequence.table,
                save_rows=self._capture.rows(part.sequence, part.start, part.end) if part.sequence.slots else None,
                wants_logits=part.is_last,
            )
            for part in parts
        ]
        gates = tuple(part.gate for part in parts if part.gate is not None)
        return build_batch(batch_parts, self._buffer.unsaved_row, self.loaded.device, gates)

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> None:
        """The next token of every turn, from its row of logits; turns whose row is unusable fail alone."""
        rows = [sequence.sampling_row(self.loaded.eos_token_ids) for sequence in sequences]
        try:
            tokens = sample(logits, rows)
        except LogitsError as error:
            for row in error.rows:
                self._finish(sequences[row], FinishReason.FAILED, str(error))
            sound = [i for i in range(len(sequences)) if i not in error.rows]
            self._sample([sequences[i] for i in sound], logits[sound])
            return
        now = time.monotonic()
        for sequence, token in zip(sequences, tokens):
            self._settle_token(sequence, token, now)

    def _settle_token(self, sequence: Sequence, token: SampledToken, now: float) -> None:
        first = sequence.num_tokens == len(sequence.request.token_ids)
        sequence.push(token.token_id)
        output = TurnOutput(turn_id=sequence.turn_id, tokens=(token,), first_token_at=now if first else None)
        self._tell(output)
        reason = sequence.finish_reason(self.loaded.eos_token_ids, self._limits.max_turn_tokens)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The turn leaves: its last chunk goes to the saver, its blocks and slots are given back."""
        if sequence.state is SequenceState.RESTORING:
            self._restoring.abandon(sequence)
        self._capture.close(sequence, is_sound=reason is not FinishReason.FAILED)
        self._blocks.release(sequence.table.blocks)
        sequence.move_to(SequenceState.FINISHED)
        del self._sequences[sequence.turn_id]
        self._mailbox.forget(sequence.turn_id)
        self._tell(TurnOutput(turn_id=sequence.turn_id, finish_reason=reason, error=error))

    def _tell(self, output: TurnOutput) -> None:
        """Joins what this step has for a turn into one output."""
        before = self._outputs.get(output.turn_id)
        self._outputs[output.turn_id] = output if before is None else before.followed_by(output)

    # --- looking in ---------------------------------------------------------------------------------------------------

    def ready_chunks(self) -> list[ReadyChunk]:
        """Chunks that came on offer since the last call: fetch them with take_chunk, or drop_chunk them."""
        return self._ready.news()

    def stats(self) -> dict[str, float]:
        """Plain numbers, for metrics. From any thread."""
        states = [sequence.state for sequence in list(self._sequences.values())]  # another thread may ask
        since = self._stepping_since
        return {
            "stalled_s": time.monotonic() - since if since is not None else 0.0,  # how long the present step has taken
            "steps": self.meter.num_steps,
            "step_s": self.meter.step_s,
            "prefill_tokens": self.meter.num_prefill_tokens,
            "decode_tokens": self.meter.num_decode_tokens,
            "prefill_s": self.meter.prefill_s,
            "decode_s": self.meter.decode_s,
            "prefill_tokens_per_s": self.meter.prefill_tokens_per_s,
            "decode_tokens_per_s": self.meter.decode_tokens_per_s,
            "turns_queued": states.count(SequenceState.QUEUED) + self._mailbox.num_waiting,
            "turns_restoring": states.count(SequenceState.RESTORING),
            "turns_running": states.count(SequenceState.WAITING) + states.count(SequenceState.RUNNING),
            "blocks": self._blocks.num_blocks,
            "blocks_free": self._blocks.num_free,
            "blocks_kept": self._blocks.count(BlockState.KEPT),
            "blocks_pending": self._blocks.count(BlockState.PENDING),
            "chunks_kept": len(self._kept) if self._kept is not None else 0,
            "chunks_kept_evicted": self._kept.num_evicted if self._kept is not None else 0,
            "slots": self._buffer.num_slots,
            "slots_free": self._buffer.num_free,
            "saves_running": self._capture.num_saving,
            "loads_running": self._restoring.num_unsettled,
            "turns_not_saved": self._capture.num_skipped,
            "ready_chunks": self._ready.num_chunks,
            "ready_bytes": self._ready.num_bytes,
            "ready_dropped": self._ready.num_dropped,
            **{f"load_bytes_per_s_{place}": rate for place, rate in self._rates.bytes_per_s().items()},
        }

    def forget_kept(self) -> None:
        """Empties the tier: blocks that no running turn uses are free. For the thread that steps."""
        if self._kept is not None:
            self._kept.clear()

    def check(self) -> None:
        """AssertionError unless blocks and slots add up: every one free, or held by a turn, a helper, or kept."""
        self._blocks.check()
        self._buffer.check()
        if self._kept is not None:
            self._kept.check()
        if not self.has_work:
            count = self._blocks.count
            assert count(BlockState.FREE) + count(BlockState.KEPT) == self._blocks.num_blocks, "a block is lost"
            num_tails = self._kept.num_tails if self._kept is not None else 0
            assert self._buffer.num_free + num_tails == self._buffer.num_slots, "a slot is lost"

    def close(self) -> None:
        """Stops the helper threads. Running turns are dropped without a word; ready chunks can still be taken."""
        self._loader.close()
        self._saver.close()
