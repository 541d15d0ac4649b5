"""Models the engine refuses, each with its reason, and the comparison that catches what nobody thought of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from actors.engine.loading import LoadedModel, UnsupportedModel
from tests.engine.models import CONFIGS, LONGROPE, build

_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: tf.GPT2Config(**_GPT), "learned position embeddings"),
    "opt": (lambda: tf.OPTConfig(**_SMALL, ffn_dim=96, word_embed_proj_dim=64), "learned position embeddings"),
    "bloom": (lambda: tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128), "ALiBi"),
    "falcon with alibi": (lambda: tf.FalconConfig(**_SMALL, alibi=True), "ALiBi"),
    "mamba": (lambda: tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128), "recurrent state"),
    "recurrent gemma": (
        lambda: tf.RecurrentGemmaConfig(
            **dict(_SMALL, num_hidden_layers=3), intermediate_size=96, lru_width=64, attention_window_size=16
        ),
        "recurrent state",
    ),
    "deepseek": (
        lambda: tf.DeepseekV3Config(
            **_SMALL, intermediate_size=96, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
        ),
        "MLA",
    ),
    "llama4": (
        lambda: tf.Llama4TextConfig(
            **_SMALL, intermediate_size=96, intermediate_size_mlp=96, num_local_experts=2, head_dim=16
        ),
        "chunked attention",
    ),
    "gpt-j": (lambda: tf.GPTJConfig(**_GPT, rotary_dim=8), "no rotary module"),
    "gpt-neox japanese": (lambda: tf.GPTNeoXJapaneseConfig(**_SMALL), "AttentionInterface"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    make_config, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        LoadedModel.from_model(build(make_config()))
    assert "is not supported: " in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", [*CONFIGS, "longrope"])
def test_sixteen_bit_models_pass_too(name: str) -> None:
    config = LONGROPE() if name == "longrope" else CONFIGS[name]()
    model = LoadedModel.from_model(build(config, torch.bfloat16))
    assert model.dtype == "bfloat16"
    whole = LoadedModel.from_model(build(config))
    layouts = [[r and r.layout for r in m.rotations] for m in (model, whole)]
    assert layouts[0] == layouts[1]


def _scale_queries_by_position(model: Any) -> None:
    """Something no probe of rotations knows: scores that grow with the position."""
    rotary = model.model.rotary_emb
    attention = model.model.layers[2].self_attn
    stock = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        scale = 1 + 0.2 * torch.arange(hidden.shape[1])[None, :, None]
        return stock(hidden_states=hidden * scale, **kwargs)

    attention.forward = forward
    assert rotary is not None


def test_a_model_that_does_something_else_is_refused_by_comparison() -> None:
    model = build(CONFIGS["llama"]())
    _scale_queries_by_position(model)
    with pytest.raises(UnsupportedModel, match="differ from the stock model's by"):
        LoadedModel.from_model(model)


def test_an_unknown_rotation_is_refused_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def backwards(q: Any, k: Any, cos: Any, sin: Any, **kwargs: Any) -> Any:
        q, k = rotate(q, k, cos, sin, **kwargs)
        return q, (k.flip(-1) if bool((sin != 0).any()) else k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", backwards)
    with pytest.raises(UnsupportedModel, match="rotates its keys in a way that is not known"):
        LoadedModel.from_model(build(CONFIGS["llama"]()))


def test_a_window_that_attention_is_not_told_of_is_refused() -> None:
    """A test with 24 tokens would not notice a window of thousands."""
    model = build(CONFIGS["gemma2"]())
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UnsupportedModel, match="sliding_attention but asks for a window of None"):
        LoadedModel.from_model(model)
