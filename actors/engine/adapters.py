"""Models that do not go through transformers' AttentionInterface, made to.

An adapter changes one model object (never a class), keeps its stock behaviour under every other attention name, and is
found by `config.model_type`. Keep this list short: everything else works without per-model code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.engine.hooks import ATTENTION_NAME


def adapt(model: Any) -> None:
    """Applies the adapter of this model's type, if there is one. Safe to call twice."""
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is not None and not getattr(model, "reprise_adapted", False):
        adapter(model)
        model.reprise_adapted = True


def _adapt_falcon(model: Any) -> None:
    """Falcon computes attention inline and broadcasts its few KV heads to all heads before the cache sees them."""
    from transformers.models.falcon import modeling_falcon

    def set_attn_implementation(self: Any, name: str) -> None:
        self.config._attn_implementation = name  # the stock method refuses: Falcon declares no AttentionInterface

    model.set_attn_implementation = MethodType(set_attn_implementation, model)
    for module in model.modules():
        if isinstance(module, modeling_falcon.FalconAttention):
            _adapt_falcon_attention(module, modeling_falcon.apply_rotary_pos_emb)


def _adapt_falcon_attention(attention: Any, apply_rotary: Callable[..., tuple[Tensor, Tensor]]) -> None:
    stock_forward = attention.forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if self.config._attn_implementation != ATTENTION_NAME:
            return stock_forward(
                hidden_states,
                alibi=alibi,
                attention_mask=attention_mask,
                layer_past=layer_past,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        query, key, value = _split_falcon_heads(self, self.query_key_value(hidden_states))
        cos, sin = position_embeddings or (None, None)
        query, key = apply_rotary(query, key, cos, sin)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.dense(out.reshape(*out.shape[:2], -1)), None

    attention.forward = MethodType(forward, attention)


def _split_falcon_heads(attention: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection [batch, tokens, width] as query, key, value [batch, heads, tokens, head_dim].

    Three layouts: grouped (queries of a group, then its key and value), multi-query (all queries, one key, one value)
    and plain (query, key, value of every head).
    """
    lead, dim = fused.shape[:2], attention.head_dim
    if attention.new_decoder_architecture:
        grouped = fused.view(*lead, -1, attention.num_heads // attention.num_kv_heads + 2, dim)
        parts = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    elif attention.multi_query:
        heads = fused.view(*lead, attention.num_heads + 2, dim)
        parts = heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    else:
        heads = fused.view(*lead, attention.num_heads, 3, dim)
        parts = heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]
    query, key, value = parts
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


ADAPTERS: dict[str, Callable[[Any], None]] = {"falcon": _adapt_falcon}
