"""From logits to the next token of every row of a batch.

The order of the filters and their meaning are those of transformers' `generate`: repetition penalty, ban of end
tokens (`min_new_tokens`), temperature, top-k, top-p, min-p; before the ban come OpenAI's presence and frequency
penalties and bias of logits. Log-probabilities are the model's own, before all of that.

Randomness is counter-based: the uniform number of a draw is a hash of (seed, num_generated). It does not depend on the
batch, on earlier draws or on the process: a turn that was preempted, moved or re-batched goes on with the same tokens.

This file does not know when a turn ends: it bans end tokens where asked, it does not act on them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.params import SampledToken, SamplingParams


class LogitsError(RuntimeError):
    """The model gave logits no token can be chosen from. `rows` are their batch indices; the other rows are sound."""

    def __init__(self, rows: Sequence[int], reason: str) -> None:
        super().__init__(f"no token can be chosen for batch row(s) {list(rows)}: {reason}")
        self.rows = tuple(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What one row of the batch brings to the choice of its next token."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and answer so far; read for the penalties only."""
    num_prompt: int
    num_generated: int
    """Tokens of this answer so far, those of earlier attempts included: the counter of the draw."""
    eos_token_ids: Sequence[int] = ()
    fallback_seed: int
    """Used when `params.seed` is None. Must stay the same for the whole turn: `seed_of(turn_id)`."""


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (53 random bits)."""
    digest = hashlib.sha256(f"{seed}/{counter}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Chooses one token per row. `logits` is [batch, vocab], any float type, any device; it is not changed.

    A batch of plain greedy rows costs one argmax; equal logits go to the lowest id. Raises LogitsError where a row has
    a NaN, a +inf or nothing above -inf (a single -inf is a masked token and fine).
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows: expected [rows, vocab]")
    if not rows:
        return []
    tops, best = logits.max(dim=-1)  # a NaN anywhere in a row becomes its maximum
    packed = torch.stack([tops.double(), best.double()]).tolist()  # one transfer from the device
    _raise_bad(packed[0], range(len(rows)), "NaN, +inf or only -inf in its logits (weights, overflow or corrupt KV)")
    chosen = [int(token_id) for token_id in packed[1]]
    special = [i for i, row in enumerate(rows) if _changes_logits(row)]
    if special:
        for i, token_id in zip(special, _choose(logits[special], [rows[i] for i in special], special)):
            chosen[i] = token_id
    return _with_logprobs(logits, rows, chosen)


def _changes_logits(row: SamplingRow) -> bool:
    """Whether the row is more than the argmax of its raw logits."""
    params = row.params
    adjusted = params.presence_penalty or params.frequency_penalty or params.logit_bias
    return params.temperature > 0 or params.repetition_penalty != 1.0 or bool(adjusted) or bool(_banned(row))


def _banned(row: SamplingRow) -> set[int]:
    """Tokens that may not be chosen yet, because they would end the turn before min_new_tokens."""
    if row.num_generated >= row.params.min_new_tokens:
        return set()
    eos = () if row.params.ignore_eos else row.eos_token_ids
    return {*eos, *row.params.stop_token_ids}


def _raise_bad(tops: Sequence[float], batch_rows: Sequence[int], reason: str) -> None:
    bad = [i for i, top in zip(batch_rows, tops) if not math.isfinite(top)]
    if bad:
        raise LogitsError(bad, reason)


def _choose(logits: Tensor, rows: Sequence[SamplingRow], batch_rows: Sequence[int]) -> list[int]:
    """The full way, for rows that are not plain greedy. `batch_rows` are their indices in the batch, for errors."""
    scores = logits.to(torch.float32, copy=True)
    _penalise_repetition(scores, rows)
    _adjust(scores, rows)
    _ban(scores, rows)
    tops, best = scores.max(dim=-1)
    chosen = best.tolist()
    _raise_bad(tops.tolist(), batch_rows, "every token is banned (min_new_tokens with these stop_token_ids)")
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        drawn_rows = [rows[i] for i in drawn]
        shifted = scores[drawn] - tops[drawn, None]  # the maximum is 0: no temperature can overflow it
        temperatures = [max(row.params.temperature, 1e-30) for row in drawn_rows]  # smaller ones are 0 in float32
        kept = _filter(shifted / _column(shifted, temperatures), drawn_rows)
        for i, token_id in zip(drawn, _draw(kept, drawn_rows)):
            chosen[i] = token_id
    return chosen


def _penalise_repetition(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """In place. Scores above 0 are divided by the penalty, others multiplied (CTRL, Keskar et al. 2019)."""
    vocab = scores.shape[1]
    for i, row in enumerate(rows):
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor([t for t in set(row.token_ids) if 0 <= t < vocab], dtype=torch.long).to(scores.device)
            seen_scores = scores[i, seen]
            scores[i, seen] = torch.where(seen_scores < 0, seen_scores * penalty, seen_scores / penalty)


def _adjust(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """In place: OpenAI's presence and frequency penalties, for the tokens of the answer so far, and bias of logits."""
    vocab = scores.shape[1]
    for i, row in enumerate(rows):
        params = row.params
        added: dict[int, float] = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for token_id, count in Counter(row.token_ids[row.num_prompt :]).items():
                penalty = params.presence_penalty + params.frequency_penalty * count
                added[token_id] = added.get(token_id, 0.0) - penalty
        known = {token_id: value for token_id, value in added.items() if 0 <= token_id < vocab}
        if known:
            ids = torch.tensor(list(known), device=scores.device)
            scores[i, ids] += torch.tensor(list(known.values()), dtype=scores.dtype, device=scores.device)


def _ban(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    pairs = [(i, t) for i, row in enumerate(rows) for t in sorted(_banned(row)) if t < scores.shape[1]]
    if pairs:
        index = torch.tensor(pairs).to(scores.device)
        scores[index[:, 0], index[:, 1]] = -math.inf


def _filter(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Removes (to -inf) what top-k, top-p and min-p remove. `scores` [rows, vocab] have their maximum at 0."""
    vocab = scores.shape[1]
    top_k = [min(row.params.top_k, vocab) or vocab for row in rows]
    limited = [k for k in top_k if k < vocab]
    if limited:
        best = scores.topk(max(limited), dim=-1).values
        last_kept = [min(k, best.shape[1]) - 1 for k in top_k]
        threshold = best.gather(1, torch.tensor(last_kept).to(scores.device)[:, None])
        off = torch.tensor([k >= vocab for k in top_k]).to(scores.device)[:, None]
        scores = scores.masked_fill((scores < threshold) & ~off, -math.inf)
    if any(row.params.top_p < 1 for row in rows):
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)  # equal scores: lowest id first
        probs = ordered.double().softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        top_p = _column(before, [row.params.top_p if row.params.top_p < 1 else math.inf for row in rows])
        remove = before >= top_p
        remove[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(remove).scatter(1, order, remove), -math.inf)
    if any(row.params.min_p > 0 for row in rows):
        logs = [math.log(row.params.min_p) if row.params.min_p > 0 else -math.inf for row in rows]
        scores = scores.masked_fill(scores < _column(scores, logs), -math.inf)
    return scores


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Inverts the cumulative distribution at each row's uniform number. Never draws a removed token."""
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    seeds = [row.params.seed if row.params.seed is not None else row.fallback_seed for row in rows]
    numbers = _column(cumulative, [uniform(seed, row.num_generated) for seed, row in zip(seeds, rows)])
    total = cumulative[:, -1:]
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    # the first token whose cumulative probability exceeds the target: one of probability 0 never does
    picks: list[int] = torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()
    return picks


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """[rows, 1] of `like`'s type and device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device)[:, None]


def _with_logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]) -> list[SampledToken]:
    tokens = [SampledToken(token_id=token_id) for token_id in chosen]
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return tokens
    logprobs = logits[asked].float().log_softmax(dim=-1)
    picked = torch.tensor([chosen[i] for i in asked]).to(logits.device)[:, None]
    of_chosen = logprobs.gather(1, picked)[:, 0].tolist()
    num_top = min(max(rows[i].params.logprobs or 0 for i in asked), logits.shape[1])
    values, ids = (part.tolist() for part in logprobs.topk(num_top, dim=-1))
    for j, i in enumerate(asked):
        top = sorted(zip(ids[j], values[j]), key=lambda pair: (-pair[1], pair[0]))[: rows[i].params.logprobs]
        tokens[i] = SampledToken(token_id=chosen[i], logprob=of_chosen[j], top_logprobs=tuple(top))
    return tokens
