"""Attention of a ragged batch over paged KV: the contract, and the plain implementation all are checked by.

Shapes: T tokens of the step, t of them of one turn, n its tokens in the pool; H heads, G kv heads, B block_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.blocks import BlockTable
from actors.engine.hooks import AttentionArgs


@dataclass(frozen=True, slots=True)
class Span:
    """One turn's part of a step: rows [start, end) of the flattened batch are the last of its `num_kv` tokens."""

    start: int
    end: int
    num_kv: int
    table: BlockTable

    @property
    def num_new(self) -> int:
        return self.end - self.start


class AttentionBackend(Protocol):
    """Causal attention of every span over its own pages."""

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], args: AttentionArgs
    ) -> Tensor:
        """Rotated queries [T, H, D]; one layer's pool K [blocks, B, G, D], V [blocks, B, G, Dv] -> [T, H, Dv].

        The spans' own new keys and values are in the pool already. Query head h reads kv head h // (H // G). Changes
        nothing; the result belongs to the caller.
        """


class SdpaAttention:
    """Span by span with torch's scaled_dot_product_attention; a softmax by hand only for soft-capping and sinks.

    A prefix of neighbouring blocks is a slice of the pool, anything else is gathered. A single query is given as
    [1, G, H / G, D]: the heads of a group become its rows, no key is repeated and no mask needed.
    """

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], args: AttentionArgs
    ) -> Tensor:
        out = queries.new_empty(*queries.shape[:2], values.shape[-1])
        for span in spans:
            first = self._first_visible(span, args.sliding_window)
            k, v = _gather(keys, span, first), _gather(values, span, first)
            q = queries[span.start : span.end]
            out[span.start : span.end] = self._attend_one(q, k, v, _mask(span, first, args, q.device), args)
        return out

    @staticmethod
    def _first_visible(span: Span, window: int | None) -> int:
        """The earliest token that any query of the span sees."""
        oldest_query = span.num_kv - span.num_new
        return max(0, oldest_query + 1 - window) if window else 0

    @staticmethod
    def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
        """q [t, H, D], k [n, G, D], v [n, G, Dv] -> [t, H, Dv]."""
        t, num_heads = q.shape[:2]
        num_groups = k.shape[1]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if args.softcap is not None or args.sinks is not None:
            return _softmax_by_hand(q, k, v, mask, args)
        if t == 1:
            grouped = q.reshape(1, num_groups, num_heads // num_groups, -1)
            out = F.scaled_dot_product_attention(grouped, k[None], v[None], scale=args.scaling)
            return out.reshape(1, num_heads, -1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=args.scaling,
            enable_gqa=num_groups != num_heads,
        )
        return out[0].transpose(0, 1)


def _gather(pages: Tensor, span: Span, first: int) -> Tensor:
    """Tokens [first, num_kv) of a span from pages [blocks, B, G, D] as [n, G, D]; a view where they are neighbours."""
    block_tokens = pages.shape[1]
    contiguous = span.table.first_if_contiguous
    if contiguous is not None:
        base = contiguous * block_tokens
        return pages.flatten(0, 1)[base + first : base + span.num_kv]
    low, high = first // block_tokens, -(-span.num_kv // block_tokens)
    blocks = span.table.pages(pages.device)[low:high]
    gathered = pages.index_select(0, blocks).flatten(0, 1)
    return gathered[first - low * block_tokens : span.num_kv - low * block_tokens]


def _mask(span: Span, first: int, args: AttentionArgs, device: torch.device) -> Tensor | None:
    """Boolean [t, n], true where a query sees a key. None: one query that sees all, or plain causal without a past."""
    if span.num_new == 1:
        return None  # keys before the window were not gathered
    num_past = span.num_kv - span.num_new
    windowed = args.sliding_window is not None and span.num_kv - first > args.sliding_window
    if num_past == 0 and not windowed:
        return None
    query_at = torch.arange(num_past, span.num_kv, device=device)[:, None]
    key_at = torch.arange(first, span.num_kv, device=device)[None]
    mask = key_at <= query_at
    if windowed and args.sliding_window is not None:
        mask &= key_at > query_at - args.sliding_window
    return mask


def _softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """q [t, H, D], k [G, n, D], v [G, n, Dv] -> [t, H, Dv]; soft-capping before the mask, sinks into the softmax."""
    t = q.shape[0]
    num_groups, n, _ = k.shape
    grouped = q.transpose(0, 1).unflatten(0, (num_groups, -1))  # [G, H/G, t, D]
    scores = (grouped @ k[:, None].transpose(-1, -2)) * args.scaling
    if args.softcap is not None:
        scores = torch.tanh(scores / args.softcap) * args.softcap
    if mask is None and t > 1:
        mask = torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t)
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if args.sinks is not None:
        sinks = args.sinks.float().reshape(num_groups, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.to(v.dtype) @ v[:, None]).flatten(0, 1).transpose(0, 1)
