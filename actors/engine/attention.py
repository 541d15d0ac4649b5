"""Attention of a ragged batch over paged KV: the contract, and the plain implementation all are checked by.

Shapes: T tokens of the step, t of them of one turn, n its tokens in the pool; H heads, G kv heads, B block_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.blocks import BlockTable
from actors.engine.hooks import AttentionArgs

_TILE_QUERIES = 256  # on a CPU, where hidden keys cost as much as others


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

        The spans' own new keys and values are in the pool already. Query head h reads kv head h // (H // G). All layers
        of a step give the same `spans` object, whose tables do not change meanwhile. Changes nothing that it is given;
        the result belongs to the caller.
        """


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [start, end) of the batch and the keys that they may see, as their span finds them."""

    start: int
    end: int
    keys: slice
    mask: Tensor | None
    """[end - start, keys]: 0 where a query sees a key, else -inf. None: one query that sees all, or plain causal."""


@dataclass(frozen=True, slots=True)
class _SpanPlan:
    """Where a span finds its keys, and how its queries go through them."""

    blocks: Tensor | None
    """To be gathered. None: they are neighbours, and the tiles' keys are rows of the pool."""
    tiles: tuple[_Tile, ...]


class SdpaAttention:
    """Span by span with torch's scaled_dot_product_attention; a softmax by hand only for soft-capping and sinks.

    A prefix of neighbouring blocks is a slice of the pool, anything else is gathered. A single query is given as
    [1, G, H / G, D]: the heads of a group become its rows, no key is repeated and no mask needed. The queries of a
    chunk that follows a history go in tiles, so that few of them are shown keys that the mask hides from them.
    Masks and slices are the same in all layers with the same window, and made once per step.
    """

    def __init__(self) -> None:
        self._spans: Sequence[Span] = ()
        self._plans: dict[int | None, list[_SpanPlan]] = {}
        self._gather_keys, self._gather_values = _Gather(), _Gather()

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], args: AttentionArgs
    ) -> Tensor:
        out = queries.new_empty(*queries.shape[:2], values.shape[-1])
        key_pages, value_pages = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)  # [G, blocks, B, D]
        key_rows, value_rows = key_pages.flatten(1, 2), value_pages.flatten(1, 2)
        for plan in self._plan(queries, spans, args.sliding_window):
            k, v = key_rows, value_rows
            if plan.blocks is not None:
                k, v = self._gather_keys(key_pages, plan.blocks), self._gather_values(value_pages, plan.blocks)
            for tile in plan.tiles:
                q = queries[tile.start : tile.end]
                out[tile.start : tile.end] = _attend_one(q, k[:, tile.keys], v[:, tile.keys], tile.mask, args)
        return out

    def _plan(self, queries: Tensor, spans: Sequence[Span], window: int | None) -> list[_SpanPlan]:
        if spans is not self._spans:
            self._spans, self._plans = spans, {}
        if window not in self._plans:
            self._plans[window] = [_plan_span(span, window, queries) for span in spans]
        return self._plans[window]


def _plan_span(span: Span, window: int | None, like: Tensor) -> _SpanPlan:
    """`like` has the type and device of the queries."""
    first = _first_visible(span.num_kv - span.num_new, window)
    blocks, at = _find_keys(span, first, like.device)
    is_windowed = window is not None and span.num_kv - first > window
    if span.num_new == 1 or (span.num_new == span.num_kv and not is_windowed):
        return _SpanPlan(blocks, (_Tile(span.start, span.end, slice(at + first, at + span.num_kv), None),))
    size = _TILE_QUERIES if like.device.type == "cpu" else span.num_new
    tiles = []
    for start in range(span.start, span.end, size):
        end = min(start + size, span.end)
        num_seen = span.num_kv - (span.end - end)
        low = _first_visible(num_seen - (end - start), window)
        mask = _mask(end - start, num_seen - low, window, like)
        tiles.append(_Tile(start, end, slice(at + low, at + num_seen), mask))
    return _SpanPlan(blocks, tuple(tiles))


def _find_keys(span: Span, first: int, device: torch.device) -> tuple[Tensor | None, int]:
    """The blocks to gather for the tokens from `first` on (None: neighbours), and where token 0 of the span is, or
    would be, among them (or among the rows of the pool)."""
    block_tokens = span.table.block_tokens
    contiguous = span.table.first_if_contiguous
    if contiguous is not None:
        return None, contiguous * block_tokens
    low, high = first // block_tokens, -(-span.num_kv // block_tokens)
    return span.table.pages(device)[low:high], -low * block_tokens


def _first_visible(position: int, window: int | None) -> int:
    """The earliest token that a query at `position` sees."""
    return max(0, position + 1 - window) if window else 0


def _mask(t: int, n: int, window: int | None, like: Tensor) -> Tensor:
    """[t, n]: the queries are the last t of n tokens."""
    query_at = torch.arange(n - t, n, device=like.device)[:, None]
    key_at = torch.arange(n, device=like.device)[None]
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    return like.new_zeros(t, n).masked_fill_(hidden, float("-inf"))


class _Gather:
    """Copies blocks into one buffer that is used again and again.

    Fresh memory for every copy would cost more than the copy: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, pages: Tensor, blocks: Tensor) -> Tensor:
        """Blocks [b] of pages [G, blocks, B, D] as tokens [G, b * B, D], valid until the next call."""
        num_heads, _, block_tokens, dim = pages.shape
        shape = (num_heads, blocks.shape[0], block_tokens, dim)
        size = math.prod(shape)
        fits = self._buffer.dtype == pages.dtype and self._buffer.device == pages.device
        if not fits or self._buffer.shape[0] < size:
            self._buffer = pages.new_empty(2 * size)
        out = self._buffer[:size].view(shape)
        torch.index_select(pages, 1, blocks, out=out)
        return out.flatten(1, 2)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """q [t, H, D], k [G, n, D], v [G, n, Dv] -> [t, H, Dv]. Without a mask: one query, or t = n causal ones."""
    t, num_heads = q.shape[:2]
    num_groups = k.shape[0]
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


def _softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """Like `_attend_one`; soft-capping before the mask, sinks into the softmax."""
    t, n = q.shape[0], k.shape[1]
    num_groups = k.shape[0]
    grouped = q.transpose(0, 1).unflatten(0, (num_groups, -1))  # [G, H/G, t, D]
    scores = (grouped @ k[:, None].transpose(-1, -2)) * args.scaling
    if args.softcap is not None:
        scores = torch.tanh(scores / args.softcap) * args.softcap
    if mask is None and t > 1:
        mask = _mask(t, n, None, q)
    scores = scores.float()
    if mask is not None:
        scores += mask
    if args.sinks is not None:
        sinks = args.sinks.float().reshape(num_groups, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.to(v.dtype) @ v[:, None]).flatten(0, 1).transpose(0, 1)
