"""What goes into the engine and what comes out of it: requests, outputs, chunks on offer, and the engine's settings.

Plain frozen values; nothing here knows how a step works. Times are `time.monotonic()` seconds of the engine's process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from actors.engine.params import SampledToken, SamplingParams

if TYPE_CHECKING:
    from storage.format import ChunkHeader, ChunkReader


class FinishReason(StrEnum):
    """Why a turn left the engine."""

    STOP = "stop"
    """The model ended its answer: an end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_new_tokens`, the context window or the engine's whole KV capacity is reached."""
    ABORTED = "aborted"
    """The owner asked for it."""
    PREEMPTED = "preempted"
    """Its blocks were needed. Submit again with the answer so far appended and counted in `num_prior`."""
    FAILED = "failed"
    """An error; `TurnOutput.error` says which. The engine goes on with the other turns."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's settings. Sizes are in tokens, so that they mean the same for every model."""

    model: str
    """A local folder or a hub id."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: as the checkpoint says."""
    device: str = "auto"
    """A torch device, or auto: cuda where present."""
    kv_tokens: int
    """Capacity of the block pool (HBM): tokens of all running turns together."""
    block_tokens: int = 16
    chunk_tokens: int = 256
    """Tokens of a full chunk; the same for everybody who exchanges chunks."""
    max_step_tokens: int = 512
    """Tokens of one forward: decodes first, prefill chunks in what is left."""
    max_running_turns: int = 16
    write_buffer_chunks: int = 32
    """Slots for raw keys, one per chunk being written. Without a free slot a chunk is not saved; nothing waits."""
    max_ready_chunks: int = 256
    """Chunks on offer at a time; further ones are dropped."""
    keep_finished: bool = True
    """HBM as a tier: blocks of finished turns stay, and are shared, until their space is needed."""
    num_loaders: int = 2
    """Threads that restore chunks, one restore on each."""
    read_ahead_chunks: int = 8
    """Chunks whose bytes one restore has asked for beyond the one it writes."""
    staging_buffers: int = 16
    """On a GPU: pinned buffers, of one layer of one chunk each, through which loads go; more hide more unevenness."""
    load_deadline_s: float = 30.0
    """A restore that is not over after this time is given up; what it did not bring is computed."""
    num_threads: int | None = None
    """torch's threads for one operation; None leaves them as they are."""

    def __post_init__(self) -> None:
        for name in (
            "kv_tokens",
            "block_tokens",
            "chunk_tokens",
            "max_step_tokens",
            "max_running_turns",
            "num_loaders",
            "read_ahead_chunks",
            "staging_buffers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("write_buffer_chunks", "max_ready_chunks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; 0 switches saving off")
        if self.load_deadline_s <= 0:
            raise ValueError(f"load_deadline_s must be above 0, not {self.load_deadline_s}")
        if self.keep_finished and self.chunk_tokens % self.block_tokens:
            raise ValueError(
                f"chunk_tokens ({self.chunk_tokens}) must be a multiple of block_tokens ({self.block_tokens}), or turns"
                " cannot share blocks; choose other sizes or set keep_finished=False"
            )
        if self.max_step_tokens < self.max_running_turns:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_running_turns ({self.max_running_turns}): a"
                " step must hold one token of every running turn; raise the one or lower the other"
            )
        if self.kv_tokens < 2 * self.block_tokens:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must hold two blocks of {self.block_tokens}; raise it")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError("num_threads must be at least 1, or None")

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block_tokens


@dataclass(frozen=True, kw_only=True)
class RestoreSource:
    """Tokens [start, start + num_tokens) of a turn lie in the chunk `key` (its first `num_tokens` tokens)."""

    key: str
    start: int
    num_tokens: int
    open: Callable[[], ChunkReader]
    """Called on a loader thread. Whatever it raises counts as the chunk being lost, CorruptChunk as corrupt."""
    place: str = ""
    """Where it lies (a tier's name): loads from one place are expected to be as fast as they were."""
    num_bytes: int = 0
    """Of the whole chunk."""
    buffered: bool = False
    """Opening it brings the whole chunk into memory of this process: not many are opened at a time."""
    prefetch: Callable[[], None] | None = None
    """Starts bringing the bytes near, without waiting for them; called some time before `open`, on a loader thread.
    Never raises."""
    forget: Callable[[], None] | None = None
    """The chunk will not be opened after all: drops what `prefetch` started."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """One turn: the whole prompt as token ids, how to sample, and what can be restored of it."""

    turn_id: str
    token_ids: tuple[int, ...]
    """The prompt; after a preemption followed by the `num_prior` tokens generated before it."""
    sampling: SamplingParams
    num_prior: int = 0
    """How many of the last `token_ids` an earlier attempt generated: counters and limits go on from there."""
    cuts: tuple[int, ...] = ()
    """Where prompts that share a part may end (earlier answers, a system prompt): chunks carry a mark there."""
    restore: tuple[RestoreSource, ...] = ()
    """Ascending from token 0 without a gap."""
    root: str
    """`storage.keys.KeySpace.root()`: the key of the empty prefix."""
    save: bool = True
    """Offer the chunks of this turn, and share blocks with other turns."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"turn {self.turn_id}: a turn needs at least one prompt token")
        if not 0 <= self.num_prior < len(self.token_ids):
            raise ValueError(
                f"turn {self.turn_id}: num_prior ({self.num_prior}) must be below the number of token ids"
                f" ({len(self.token_ids)}), which include the prompt"
            )
        if self.num_prior >= self.sampling.max_new_tokens:
            raise ValueError(
                f"turn {self.turn_id}: {self.num_prior} of max_new_tokens={self.sampling.max_new_tokens} tokens are"
                " generated already, nothing is left to do"
            )
        end = 0
        for source in self.restore:
            if source.start != end or source.num_tokens < 1:
                raise ValueError(
                    f"turn {self.turn_id}: restore must cover tokens from 0 on without a gap; chunk {source.key} starts"
                    f" at {source.start}, expected {end}"
                )
            end = source.end
        if end > len(self.token_ids):
            raise ValueError(f"turn {self.turn_id}: restore covers {end} tokens of {len(self.token_ids)}")

    @property
    def num_prompt(self) -> int:
        return len(self.token_ids) - self.num_prior


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one engine can take."""

    context_window: int
    pool_tokens: int
    """Tokens that fit into the block pool."""
    chunk_tokens: int
    vocab_size: int
    has_tokenizer: bool

    @property
    def max_turn_tokens(self) -> int:
        """Prompt and answer of one turn together."""
        return min(self.context_window, self.pool_tokens)

    def check(self, request: Request) -> None:
        """ValueError, with advice, for a request that can never run here."""
        turn, num_tokens = f"turn {request.turn_id}", len(request.token_ids)
        if num_tokens >= self.max_turn_tokens:
            raise ValueError(
                f"{turn}: {num_tokens} tokens leave no room for an answer (context window {self.context_window}, block"
                f" pool {self.pool_tokens} tokens): shorten the prompt, or raise kv_tokens if the pool is the smaller"
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self.vocab_size:
            raise ValueError(f"{turn}: token ids must be in [0, {self.vocab_size}); are they another tokenizer's?")
        if request.sampling.stop and not self.has_tokenizer:
            raise ValueError(f"{turn}: stop strings need a tokenizer; use stop_token_ids")
        for source in request.restore:
            if source.start % self.chunk_tokens or source.num_tokens > self.chunk_tokens:
                raise ValueError(
                    f"{turn}: chunk {source.key} at token {source.start} ({source.num_tokens} tokens) does not fit"
                    f" chunk_tokens={self.chunk_tokens}: the store was written with another setting"
                )


@dataclass(frozen=True, kw_only=True)
class FailedRestore:
    """A chunk that could not be used; `num_tokens` of the plan are recomputed because of it."""

    key: str
    reason: str
    """"corrupt" (checksum, or not the tokens it should hold), "lost" (could not be opened or read) or "late"."""
    num_tokens: int
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class StartInfo:
    """A turn's restore is over; its sources are not read any more."""

    num_in_hbm: int = 0
    """Leading tokens whose blocks were there."""
    loaded: tuple[tuple[int, int], ...] = ()
    """Spans (start, end) of tokens that were loaded, ascending. What lies between was computed meanwhile, or failed."""
    failed: tuple[FailedRestore, ...] = ()
    restore_s: float = 0.0
    """From the moment its blocks were there until the last layer was in place."""
    queued_s: float = 0.0
    """From `add` until it held blocks."""

    @property
    def num_loaded(self) -> int:
        return sum(end - start for start, end in self.loaded)

    @property
    def num_reused(self) -> int:
        return self.num_in_hbm + self.num_loaded


@dataclass(frozen=True, kw_only=True)
class TurnOutput:
    """What one step brought for one turn."""

    turn_id: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    """One line, with FAILED only."""
    is_refused: bool = False
    """With FAILED: it can never run here, however often it is tried."""
    started: StartInfo | None = None
    """Once per turn, as soon as its restore is over (also when there was nothing to restore)."""
    first_token_at: float | None = None
    """Monotonic seconds, with the output that carries the turn's first token."""

    def followed_by(self, later: TurnOutput) -> TurnOutput:
        """Both as one."""
        return TurnOutput(
            turn_id=self.turn_id,
            tokens=self.tokens + later.tokens,
            finish_reason=later.finish_reason or self.finish_reason,
            error=later.error or self.error,
            is_refused=later.is_refused or self.is_refused,
            started=later.started or self.started,
            first_token_at=self.first_token_at if self.first_token_at is not None else later.first_token_at,
        )


@dataclass(frozen=True, kw_only=True)
class ReadyChunk:
    """A chunk on offer: `Engine.take_chunk(header.key)` gives its bytes once encoded, `drop_chunk` forgets them."""

    turn_id: str
    header: ChunkHeader
    num_bytes: int
