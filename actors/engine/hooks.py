"""The three places where the engine reaches into a transformers model, and nothing else.

    rotary modules    -> IdentityRotary: cos = 1, sin = 0, so that queries and keys arrive here unrotated; a model's
                         `apply_rotary_pos_emb` does nothing where it is given these
    Cache.update      -> KeyValueTap: the raw keys and the values of one layer
    attention function-> `attend`, found by name through AttentionInterface

Attention functions are global by name and get no word about who calls, so the running forward is found through a
ContextVar that `ForwardHooks.installed` sets around it: one per thread, any number of engines in one process.

This file does not know about pages, rotations or batches.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION_NAME = "reprise"
_IDENTITY_MARK, _SKIPS_MARK = "reprise_is_identity", "reprise_skips_identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionArgs:
    """What a layer asks of its attention, besides q, k and v."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    """[num_heads] logits that take part in the softmax and have no value."""


class ForwardHooks(Protocol):
    """What happens inside a forward. Layers are the model's own indices, called in any order, each exactly once."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Raw keys and values of this step's tokens, [1, num_kv_heads, tokens, head_dim]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> Tensor:
        """Raw queries [1, num_heads, T, head_dim] -> [1, T, num_heads, v_dim]. `keys`, `values`: of this step."""


_hooks: ContextVar[ForwardHooks] = ContextVar("reprise_forward_hooks")


@contextmanager
def installed(hooks: ForwardHooks) -> Iterator[None]:
    """Forwards inside the `with` block, on this thread, talk to `hooks`."""
    token = _hooks.set(hooks)
    try:
        yield
    finally:
        _hooks.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - named by transformers' convention, never built here
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # dropout and whatever else a model passes along; what matters shows in the comparison at load time
) -> tuple[Tensor, None]:
    layer: Any = module.layer_idx
    args = AttentionArgs(
        scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux if s_aux is not None else getattr(module, "sinks", None),
    )
    return _hooks.get().attend(layer, query, key, value, args), None


# Only the function, no mask function under this name: transformers then builds no masks at all.
AttentionInterface.register(ATTENTION_NAME, _attention)


class KeyValueTap(Cache):
    """Stands where a model expects its KV cache; hands every layer's keys and values to the hooks and keeps nothing."""

    def __init__(self) -> None:  # the base class would build a list of layers
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        _hooks.get().update(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_max_length(self, *_: Any, **__: Any) -> int:
        return -1

    def get_max_cache_shape(self, *_: Any, **__: Any) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return []

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class IdentityRotary(nn.Module):
    """Stands for a model's rotary module. With `identity` it gives cos = 1 and sin = 0, else what the original gives.

    Some rotations depend on the longest position seen (dynamic NTK, LongRoPE). `pin_position` makes the original see
    that position in every call, so that one token position always has one rotation.
    """

    def __init__(self, original: nn.Module, pin_position: int | None) -> None:
        super().__init__()
        self.original = original
        self.pin_position = pin_position
        self.identity = True

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        out = self.true_rotation(x, position_ids, *args, **kwargs)
        if not self.identity:
            return out
        if torch.is_tensor(out):
            return torch.ones_like(out)
        cos, sin = out
        ones = torch.ones_like(cos)
        setattr(ones, _IDENTITY_MARK, True)
        return ones, torch.zeros_like(sin)

    def true_rotation(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the original gives, under the pin: (cos, sin), or one complex tensor."""
        if self.pin_position is None:
            return self.original(x, position_ids, *args, **kwargs)
        pin = torch.full_like(position_ids[:, :1], self.pin_position)
        out = self.original(x, torch.cat((position_ids, pin), dim=1), *args, **kwargs)
        return out[:, :-1] if torch.is_tensor(out) else tuple(part[:, :-1] for part in out)

    def __getattr__(self, name: str) -> Any:  # some models read inv_freq and the like from their rotary module
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


def skip_identity_rotations(model: nn.Module) -> None:
    """Lets the model's files return queries and keys as they are where an IdentityRotary's cos would turn them by
    nothing: a dozen small operations a layer. For everybody else's tables these functions do what they did."""
    for name in {type(module).__module__ for module in model.modules()}:
        file = sys.modules.get(name)
        rotate = getattr(file, "apply_rotary_pos_emb", None)
        if file is None or rotate is None or hasattr(rotate, _SKIPS_MARK):
            continue
        if list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]:
            setattr(file, "apply_rotary_pos_emb", _unless_identity(rotate))  # noqa: B010 - a module's global


def _unless_identity(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @wraps(rotate)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return (q, k) if hasattr(cos, _IDENTITY_MARK) else rotate(q, k, cos, sin, *args, **kwargs)

    setattr(apply, _SKIPS_MARK, True)
    return apply


def _is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rotary" in name and "vision" not in name


def wrap_rotary(model: nn.Module, pin_position: int) -> list[IdentityRotary]:
    """Puts an IdentityRotary around every rotary module that has none yet; all of them, in the model's order."""
    wrapped: dict[int, IdentityRotary] = {}
    for parent in list(model.modules()):
        if isinstance(parent, IdentityRotary):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, IdentityRotary):
                wrapped[id(child.original)] = child
            elif _is_rotary(child):
                pin = pin_position if _depends_on_length(child) else None
                wrapped.setdefault(id(child), IdentityRotary(child, pin))
                setattr(parent, name, wrapped[id(child)])
    return list(wrapped.values())


def _depends_on_length(rotary: nn.Module) -> bool:
    kind = getattr(rotary, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds)


@contextmanager
def rotary_identity(rotaries: list[IdentityRotary], identity: bool) -> Iterator[None]:
    """Inside the block the rotary modules behave as asked; afterwards as before."""
    before = [rotary.identity for rotary in rotaries]
    for rotary in rotaries:
        rotary.identity = identity
    try:
        yield
    finally:
        for rotary, old in zip(rotaries, before):
            rotary.identity = old
