"""What travels with a turn between client, replica and shard: requests, streamed pieces and the closing account.

Plain frozen values; tokens travel here and nowhere near the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.engine.params import SampledToken, SamplingParams
from actors.engine.turns import FinishReason, ReadyChunk, TurnOutput
from policies.messages import Cause, RestoreStep, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One attempt of a turn. `token_ids` is the prompt and, after an earlier attempt, what that attempt generated."""

    turn_id: str
    session_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_prior: int = 0  # how many of the last token_ids an earlier attempt generated
    cuts: tuple[int, ...] = ()  # positions where prompts may be shared or cut: they become marks
    drift_at: int | None = None
    priority: int = 0
    reuse: bool = True  # False: neither restored nor saved
    affinity: str | None = None  # a hint: turns of the same one are placed together (policies.messages.Turn)
    root: str | None = None  # key of the empty prefix (a tenant has its own); None: the model's


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens as they are generated, and the text that has become certain with them."""

    tokens: tuple[SampledToken, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAccount:
    """Where each prompt token's KV came from. Sums of both maps together are the prompt's tokens."""

    reused: dict[Tier, int] = field(default_factory=dict)
    recomputed: dict[Cause, int] = field(default_factory=dict)
    restore_s: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.reused.values()) + sum(self.recomputed.values())


@dataclass(frozen=True, slots=True)
class Started:
    """The first piece: what could be restored is in place. The account is final, whatever becomes of the turn."""

    account: TurnAccount


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """The last piece of an attempt. With PREEMPTED the client submits the turn again; FAILED says why in `error`."""

    finish_reason: FinishReason
    tokens: tuple[SampledToken, ...] = ()  # the last ones
    text: str = ""  # the rest of the text
    num_tokens_kept: int | None = None  # tokens wholly before a stop string, when one ended the turn
    error: str = ""
    may_retry: bool = False  # with FAILED: the step failed (memory, a device), not the request


Piece = Started | Delta | TurnEnd


@dataclass(frozen=True, slots=True)
class AddTurn:
    """From replica to shard: run this attempt, restoring by these steps."""

    request: TurnRequest
    steps: tuple[RestoreStep, ...]


@dataclass(frozen=True, slots=True)
class AbortTurn:
    """From replica to shard: this attempt is not wanted any more."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Harvest:
    """From shard to replica: what happened in the engine, outputs and chunks now offered to the store."""

    outputs: list[TurnOutput]
    chunks: list[ReadyChunk]
