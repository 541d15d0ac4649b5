"""One forward: a ragged batch of tokens through the model, reading and writing the pool.

    model layer ── raw K, V ──> update: pair, capture raw K for saving, rotate, write to the pool
                └─ raw Q ─────> attend: pair, rotate, AttentionBackend over the pool's pages

It does not know turns, states or why a token is in the batch. Shapes: T tokens of the step, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.engine.attention import AttentionBackend, Span
from actors.engine.blocks import BlockTable, KVPool
from actors.engine.hooks import AttentionArgs, KeyValueTap, installed
from actors.engine.rope import Rotation
from actors.engine.save import WriteBuffer


class Gate(Protocol):
    """Keeps a forward from reading a layer's KV too early."""

    def wait(self, layer: int) -> None:
        """Returns when the KV of `layer` is in place, or will never be used."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of one step, turn after turn, on the model's device."""

    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T]"""
    num_positions: int
    """Above every position."""
    pool_rows: Tensor
    """[T] where each token's KV goes; distinct."""
    save_rows: Tensor | None
    """[T] where its raw key goes in the write buffer; None: nothing is saved in this step."""
    spans: tuple[Span, ...]
    logit_rows: Tensor
    """Rows of the batch whose logits are wanted."""
    gates: tuple[Gate, ...] = ()
    """To be passed before a layer's attention: parts of the history may still be on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPart:
    """One turn's tokens in a step: positions [start, start + len(token_ids))."""

    token_ids: Sequence[int]
    start: int
    table: BlockTable
    save_rows: Tensor | None
    """Write-buffer rows (CPU), one per token; None: none of them is saved."""
    wants_logits: bool
    """Of its last token."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


def build_batch(
    parts: Sequence[BatchPart], unsaved_row: int, device: torch.device, gates: tuple[Gate, ...] = ()
) -> Batch:
    """Flattens the parts in their order; logits come in that order too, for the parts that want them."""
    spans: list[Span] = []
    for part in parts:
        first = spans[-1].end if spans else 0
        spans.append(Span(first, first + len(part.token_ids), part.end, part.table))
    save_rows = None
    if any(part.save_rows is not None for part in parts):
        rows = [torch.full((len(p.token_ids),), unsaved_row) if p.save_rows is None else p.save_rows for p in parts]
        save_rows = torch.cat(rows).to(device)
    logit_rows = [span.end - 1 for part, span in zip(parts, spans) if part.wants_logits]
    return Batch(
        token_ids=torch.tensor([token_id for part in parts for token_id in part.token_ids]).to(device),
        positions=torch.cat([torch.arange(part.start, part.end) for part in parts]).to(device),
        num_positions=max(part.end for part in parts),
        pool_rows=torch.cat([part.table.rows(part.start, part.end) for part in parts]).to(device),
        save_rows=save_rows,
        spans=tuple(spans),
        logit_rows=torch.tensor(logit_rows, dtype=torch.long).to(device),
        gates=gates,
    )


class ModelRunner:
    """The model on its pool. One batch at a time; the hooks of the running batch live on this object."""

    def __init__(
        self,
        model: Any,
        rotations: Sequence[Rotation | None],
        pool: KVPool,
        buffer: WriteBuffer | None,
        attention: AttentionBackend,
    ) -> None:
        self._model, self._rotations = model, rotations
        self._pool, self._buffer, self._attention = pool, buffer, attention
        self._tap = KeyValueTap()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [len(logit_rows), vocab]. What the model raises passes through; other rows keep their KV."""
        phases = {
            rotation: rotation.phases(batch.positions, batch.num_positions)
            for rotation in set(self._rotations)
            if rotation is not None
        }
        hooks = _StepHooks(self._rotations, self._pool, self._buffer, self._attention, batch, phases)
        with installed(hooks):
            out = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                past_key_values=self._tap,
                use_cache=True,
                logits_to_keep=batch.logit_rows,
            )
        return out.logits[0]


@dataclass
class _StepHooks:
    """ForwardHooks of one batch."""

    rotations: Sequence[Rotation | None]
    pool: KVPool
    buffer: WriteBuffer | None
    attention: AttentionBackend
    batch: Batch
    phases: dict[Rotation, Tensor] = field(default_factory=dict)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        rotation = self.rotations[layer]
        k = keys[0].transpose(0, 1)  # [T, H, D]
        if rotation is not None:
            k = rotation.pair(k)
        if self.buffer is not None and self.batch.save_rows is not None:
            self.buffer.capture(layer, self.batch.save_rows, k)
        if rotation is not None:
            k = rotation.rotate(k, self.phases[rotation])
        self.pool.write(layer, self.batch.pool_rows, k, values[0].transpose(0, 1))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> Tensor:
        del keys, values  # they are in the pool
        for gate in self.batch.gates:
            gate.wait(layer)
        rotation = self.rotations[layer]
        q = queries[0].transpose(0, 1)  # [T, H, D]
        if rotation is not None:
            q = rotation.rotate(rotation.pair(q), self.phases[rotation])
        return self.attention.attend(q, self.pool.keys[layer], self.pool.values[layer], self.batch.spans, args)[None]
