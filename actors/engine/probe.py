"""Finds out, by watching, how each layer of a model rotates its queries and keys. No per-model code.

The model runs twice with an attention that returns zeros, so that no hidden state depends on positions: once with
identity rotary modules (raw q and k), once with the real ones at known positions. Per layer, the rotation that takes
the one to the other is looked for among all combinations of: the model's rotary modules and layer types, half-split or
interleaved pairs, leading or trailing channels, three ways to write a table. Or none at all (NoPE layers).

What fits here is still only a candidate: loading compares the finished engine with the stock model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.engine.hooks import AttentionArgs, IdentityRotary, KeyValueTap, installed, rotary_identity
from actors.engine.rope import PairLayout, PhaseForm, PhaseTable, Rotation, layer_types, module_phases

_TOLERANCE = 0.02  # relative; bfloat16 rounds q, k, cos and sin to about 0.004 each
_NEAR, _FAR = (1, 2, 3, 5, 8, 13, 21, 34), (89, 377, 987)


class ProbeError(Exception):
    """The model cannot be run by the engine; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What was seen of one layer. `rotation` is None where it does not rotate."""

    rotation: Rotation | None
    num_kv_heads: int
    k_dim: int
    v_dim: int
    args: AttentionArgs


@dataclass
class _Recorder:
    """ForwardHooks that keep the raw q and k of every layer and answer zeros."""

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    value_shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    args: dict[int, AttentionArgs] = field(default_factory=dict)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if layer in self.keys:
            raise ProbeError(f"layer {layer} writes its keys twice in one forward")
        self.keys[layer] = keys[0].transpose(0, 1).float().cpu().clone()
        self.value_shapes[layer] = tuple(values.shape)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> Tensor:
        del keys  # recorded raw by update
        self.queries[layer] = queries[0].transpose(0, 1).float().cpu().clone()
        self.args[layer] = args
        shape = (queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])
        return torch.zeros(shape, dtype=queries.dtype, device=queries.device)


def probe(model: Any, rotaries: list[IdentityRotary], context_window: int) -> list[LayerFacts]:
    """Facts of every layer, by index. The model must already use the engine's attention. Raises ProbeError."""
    positions = torch.tensor([p for p in _NEAR + _FAR if p < context_window])
    raw = _record(model, rotaries, positions, identity=True)
    turned = _record(model, rotaries, positions, identity=False)
    if not raw.queries:
        raise ProbeError("its attention does not go through transformers' AttentionInterface")
    if sorted(raw.keys) != sorted(raw.queries) or sorted(raw.keys) != list(range(len(raw.keys))):
        raise ProbeError("some of its layers keep no keys of their own (shared KV, or a recurrent state)")
    candidates = list(_tables(rotaries, positions, model.device))
    rotations: dict[tuple[object, ...], Rotation] = {}
    return [_fit(layer, raw, turned, candidates, rotations, model.device) for layer in sorted(raw.keys)]


def _record(model: Any, rotaries: list[IdentityRotary], positions: Tensor, *, identity: bool) -> _Recorder:
    recorder = _Recorder()
    vocab = model.config.get_text_config().vocab_size
    token_ids = torch.arange(5, 5 + len(positions), device=model.device) % vocab
    with installed(recorder), rotary_identity(rotaries, identity):
        model(
            input_ids=token_ids[None],
            position_ids=positions[None].to(model.device),
            past_key_values=KeyValueTap(),
            use_cache=True,
        )
    return recorder


@dataclass(frozen=True, slots=True)
class _Candidate:
    rotary: IdentityRotary
    layer_type: str | None
    form: PhaseForm
    phases: Tensor


def _tables(rotaries: list[IdentityRotary], positions: Tensor, device: torch.device) -> Iterator[_Candidate]:
    forms: tuple[PhaseForm, ...] = ("first_half", "every_second", "as_is")
    for rotary in rotaries:
        for layer_type in layer_types(rotary):
            for form in forms:
                phases = module_phases(rotary, layer_type, positions.to(device), form)
                if phases is not None:
                    yield _Candidate(rotary, layer_type, form, phases)


def _layouts(rotary_dim: int, head_dim: int) -> Iterator[PairLayout]:
    if 0 < rotary_dim <= head_dim and rotary_dim % 2 == 0:
        for kind in ("half", "interleaved"):
            for place in ("leading",) if rotary_dim == head_dim else ("leading", "trailing"):
                yield PairLayout(kind=kind, place=place, rotary_dim=rotary_dim, head_dim=head_dim)  # type: ignore[arg-type]


def _fit(
    layer: int,
    raw: _Recorder,
    turned: _Recorder,
    candidates: list[_Candidate],
    rotations: dict[tuple[object, ...], Rotation],
    device: torch.device,
) -> LayerFacts:
    keys, head_dim = raw.keys[layer], raw.keys[layer].shape[-1]
    best_error = max(_error(keys, turned.keys[layer]), _error(raw.queries[layer], turned.queries[layer]))
    best: tuple[_Candidate, PairLayout] | None = None
    for candidate in candidates:
        for layout in _layouts(2 * candidate.phases.shape[-1], head_dim):
            error = _misfit(layout, candidate.phases, layer, raw, turned)
            if error < 0.9 * best_error:  # of equally good ones the first
                best_error, best = error, (candidate, layout)
    if not best_error < _TOLERANCE:
        raise ProbeError(f"layer {layer} rotates its keys in a way that is not known here (error {best_error:.0%})")
    rotation = _rotation(*best, rotations, device) if best is not None else None
    values = raw.value_shapes[layer]
    return LayerFacts(
        rotation=rotation, num_kv_heads=keys.shape[1], k_dim=head_dim, v_dim=values[-1], args=raw.args[layer]
    )


def _rotation(
    candidate: _Candidate, layout: PairLayout, rotations: dict[tuple[object, ...], Rotation], device: torch.device
) -> Rotation:
    """Layers that rotate alike share one object: the engine looks up phases once per object and step."""
    key = (id(candidate.rotary), candidate.layer_type, candidate.form, layout)
    if key not in rotations:
        table = PhaseTable(candidate.rotary, candidate.layer_type, candidate.form)
        rotations[key] = Rotation(layout, table, device)
    return rotations[key]


def _misfit(layout: PairLayout, phases: Tensor, layer: int, raw: _Recorder, turned: _Recorder) -> float:
    """Relative error of this rotation on the layer's keys and queries, the larger of the two."""
    order = torch.tensor(layout.permutation())
    d = layout.rotary_dim
    worst = 0.0
    for before, after in ((raw.keys, turned.keys), (raw.queries, turned.queries)):
        x, y = before[layer][..., order], after[layer][..., order]
        pairs = torch.view_as_complex(x[..., :d].unflatten(-1, (-1, 2)).contiguous()) * phases[:, None]
        predicted = torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., d:]), dim=-1)
        worst = max(worst, _error(predicted, y))
    return worst


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))
