"""The engine: turns go in, tokens and chunks come out, one step at a time. Runs without Ray.

    step:  settle what loaders and savers finished -> plan -> one forward -> sample -> settle the tokens

Ragged continuous batching: the tokens of a step, prefill chunks and decodes of all turns, are one flattened forward
over paged KV. `add`, `abort`, `wait_for_work`, `ready_chunks`, `take_chunk` and `drop_chunk` may be called from any
thread; everything else belongs to the one thread that calls `step`.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.attention import SdpaAttention
from actors.engine.batching import Room, StepPlan, plan_step
from actors.engine.blocks import BlockPool, BlockTable, KVPool
from actors.engine.capture import Capture
from actors.engine.loading import LoadedModel
from actors.engine.mailbox import Mailbox
from actors.engine.meter import Meter
from actors.engine.params import SampledToken
from actors.engine.restore import Loader, RestoreJob
from actors.engine.runner import Batch, BatchPart, ModelRunner, build_batch
from actors.engine.sampling import LogitsError, sample
from actors.engine.save import ReadyChunks, Saver, WriteBuffer
from actors.engine.sequence import Sequence, SequenceState
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

    def __init__(self, config: EngineConfig, loaded: LoadedModel | None = None) -> None:
        """Loads the model (ModelError) unless one is given; several engines may share one."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
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
        self._build(self.loaded)
        self._sequences: dict[str, Sequence] = {}
        self._outputs: dict[str, TurnOutput] = {}
        self._num_arrivals = 0

    def _build(self, loaded: LoadedModel) -> None:
        config, where = self.config, (loaded.torch_dtype, loaded.device)
        self._blocks = BlockPool(config.num_blocks)
        self._pool = KVPool(loaded.layers, config.num_blocks, config.block_tokens, *where)
        self._buffer = WriteBuffer(loaded.layers, config.write_buffer_chunks, config.chunk_tokens, *where)
        self._ready = ReadyChunks(config.max_ready_chunks)
        saver = Saver(self._pool, self._buffer, self._ready, loaded.layers, loaded.dtype, self._mailbox.wake)
        self._saver = saver
        self._capture = Capture(self._blocks, self._buffer, saver, self._ready)
        self._loader = Loader(
            self._pool,
            self._buffer,
            loaded.rotations,
            loaded.layers,
            loaded.torch_dtype,
            config.num_loaders,
            self._mailbox.wake,
        )
        self._runner = ModelRunner(loaded.model, loaded.rotations, self._pool, self._buffer, SdpaAttention())

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

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do, or will have as soon as a loader or saver is done."""
        return bool(self._mailbox.num_waiting or self._sequences or self._capture.num_saving)

    def wait_for_work(self, timeout_s: float) -> bool:
        """Waits until there is work, at most `timeout_s`; whether there is."""
        return self._mailbox.wait_for(lambda: self.has_work, timeout_s)

    # --- the loop -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TurnOutput]:
        """One iteration; what it brought, at most one output per turn. Waits a moment if only helpers are at work."""
        num_changes = self._mailbox.num_changes
        self._take_requests()
        self._settle_loads()
        self._capture.settle()
        self._settle_aborts()
        plan = plan_step([sequence.demand() for sequence in self._sequences.values()], self._room())
        self._follow(plan)
        if plan.work:
            self._compute(plan)
        elif not self._outputs and not plan.admit and self.has_work:
            self._mailbox.wait_for_change(num_changes, _IDLE_WAIT_S)
        outputs, self._outputs = list(self._outputs.values()), {}
        return outputs

    def _take_requests(self) -> None:
        for request in self._mailbox.take_requests():
            self._num_arrivals += 1
            table = BlockTable(self.config.block_tokens)
            self._sequences[request.turn_id] = Sequence(request, self._num_arrivals, table, self.config.chunk_tokens)

    def _settle_loads(self) -> None:
        for turn_id, restored in self._loader.settled():
            sequence = self._sequences[turn_id]
            sequence.adopt(restored.num_tokens, restored.marks)
            self._capture.forget_other_slots(sequence)
            restore_s = restored.finished_at - sequence.admitted_at
            self._start(sequence, restored.num_tokens, restored.failed, restore_s)

    def _settle_aborts(self) -> None:
        for turn_id in self._mailbox.aborts(self._sequences.keys()):
            if not self._loader.cancel(turn_id):  # blocks that a loader writes to are given back when it has let go
                self._finish(self._sequences[turn_id], FinishReason.ABORTED)

    def _room(self) -> Room:
        num_held = sum(len(sequence.table.blocks) for sequence in self._sequences.values())
        return Room(
            num_free_blocks=self._blocks.num_free,
            num_pending_blocks=self.config.num_blocks - self._blocks.num_free - num_held,
            block_tokens=self.config.block_tokens,
            max_step_tokens=self.config.max_step_tokens,
            max_running_turns=self.config.max_running_turns,
        )

    def _follow(self, plan: StepPlan) -> None:
        """Everything in a plan but the forward itself."""
        for turn_id in plan.preempt:
            self._finish(self._sequences[turn_id], FinishReason.PREEMPTED)
        for work in plan.work:
            sequence = self._sequences[work.turn_id]
            sequence.table.append(self._blocks.take(work.num_new_blocks))
            self._capture.reserve(sequence, sequence.num_computed, sequence.num_computed + work.num_tokens)
        for turn_id in plan.admit:
            self._admit(self._sequences[turn_id])

    def _admit(self, sequence: Sequence) -> None:
        """Blocks for all its tokens; what can be restored starts loading."""
        sequence.table.append(self._blocks.take(-(-sequence.num_tokens // self.config.block_tokens)))
        sequence.admitted_at = time.monotonic()
        pieces = sequence.pieces()
        if not pieces:
            self._start(sequence, 0)
            return
        sequence.move_to(SequenceState.RESTORING)
        end = pieces[-1].end
        self._loader.submit(
            RestoreJob(
                turn_id=sequence.turn_id,
                root=sequence.request.root,
                pieces=pieces,
                rows=sequence.table.rows(0, end),
                tail_slot=self._capture.reserve_tail(sequence, end),
            )
        )

    def _start(
        self, sequence: Sequence, num_reused: int, failed: tuple[FailedRestore, ...] = (), restore_s: float = 0.0
    ) -> None:
        """Everything that could be restored is in place."""
        sequence.move_to(SequenceState.WAITING)
        sequence.open_text(self.loaded.tokenizer)
        queued_s = sequence.admitted_at - sequence.added_at
        info = StartInfo(num_reused=num_reused, failed=failed, restore_s=restore_s, queued_s=queued_s)
        self._tell(TurnOutput(turn_id=sequence.turn_id, started=info))

    def _compute(self, plan: StepPlan) -> None:
        """The forward of a plan, and one token for every turn whose known tokens it completes."""
        began = time.monotonic()
        work = [(self._sequences[w.turn_id], w.num_tokens) for w in plan.work]
        try:
            logits = self._runner.forward(self._batch(work))
        except Exception as error:
            log.exception("a forward of %d tokens for %d turns failed", plan.num_tokens, len(work))
            for sequence, _ in work:  # foreign code, or out of memory: the turns of this step fail, the engine lives on
                self._finish(sequence, FinishReason.FAILED, f"{type(error).__name__}: {error}")
            return
        complete = []
        for sequence, num_tokens in work:
            if sequence.state is SequenceState.WAITING:
                sequence.move_to(SequenceState.RUNNING)
            sequence.num_computed += num_tokens
            if sequence.num_computed == sequence.num_tokens:
                complete.append(sequence)
        self._sample(complete, logits)
        for sequence, _ in work:
            if (
                sequence.state is SequenceState.RUNNING
            ):  # not for turns that failed: their KV may be as bad as their logits
                self._capture.hand_over_full(sequence)
        num_decodes = sum(num_tokens == 1 for _, num_tokens in work)
        self.meter.record(plan.num_tokens - num_decodes, num_decodes, time.monotonic() - began)

    def _batch(self, work: list[tuple[Sequence, int]]) -> Batch:
        parts = []
        for sequence, num_tokens in work:
            start, end = sequence.num_computed, sequence.num_computed + num_tokens
            parts.append(
                BatchPart(
                    token_ids=sequence.token_ids[start:end],
                    start=start,
                    table=sequence.table,
                    save_rows=self._capture.rows(sequence, start, end) if sequence.slots else None,
                    wants_logits=end == sequence.num_tokens,
                )
            )
        return build_batch(parts, self._buffer.unsaved_row, self.loaded.device)

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
        self._capture.close(sequence, keep=reason is not FinishReason.FAILED)
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
        return {
            "steps": self.meter.num_steps,
            "step_s": self.meter.step_s,
            "prefill_tokens": self.meter.num_prefill_tokens,
            "decode_tokens": self.meter.num_decode_tokens,
            "prefill_tokens_per_s": self.meter.prefill_tokens_per_s,
            "decode_tokens_per_s": self.meter.decode_tokens_per_s,
            "turns_queued": states.count(SequenceState.QUEUED) + self._mailbox.num_waiting,
            "turns_restoring": states.count(SequenceState.RESTORING),
            "turns_running": states.count(SequenceState.WAITING) + states.count(SequenceState.RUNNING),
            "blocks": self._blocks.num_blocks,
            "blocks_free": self._blocks.num_free,
            "slots": self._buffer.num_slots,
            "slots_free": self._buffer.num_free,
            "saves_running": self._capture.num_saving,
            "turns_not_saved": self._capture.num_skipped,
            "ready_chunks": self._ready.num_chunks,
            "ready_bytes": self._ready.num_bytes,
            "ready_dropped": self._ready.num_dropped,
        }

    def check(self) -> None:
        """AssertionError unless blocks and slots add up: every one free, or held by a turn or a save job."""
        self._blocks.check()
        num_open = sum(len(sequence.slots) for sequence in self._sequences.values())
        assert self._buffer.num_free + num_open + self._capture.num_saving == self._buffer.num_slots, "a slot is lost"
        if not self.has_work:
            assert self._blocks.num_free == self._blocks.num_blocks, "a block is lost"

    def close(self) -> None:
        """Stops the helper threads. Running turns are dropped without a word; ready chunks can still be taken."""
        self._loader.close()
        self._saver.close()
