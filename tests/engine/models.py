"""Small random models of many architectures, and what stock transformers says about them.

Weights are scaled up so that logits are far apart: greedy choices then do not hang on rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from actors.engine.loading import LoadedModel

torch.set_num_threads(1)
tf.utils.logging.set_verbosity_error()

VOCAB = 128
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS: dict[str, Any] = dict(_COMMON, head_dim=16)
_FALCON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "bias": False,
    "parallel_attn": True,
    "alibi": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_THETA = {"rope_theta": 10000.0}
_LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)], "factor": 4.0}


def _llama(**rope: Any) -> Any:
    return tf.LlamaConfig(**_COMMON, rope_parameters={**_THETA, **rope})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_COMMON),
    "llama-yarn": lambda: _llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "llama-linear": lambda: _llama(rope_type="linear", factor=2.0),
    "llama-llama3": lambda: _llama(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama-dynamic": lambda: _llama(rope_type="dynamic", factor=2.0),
    "qwen2": lambda: tf.Qwen2Config(**_COMMON),
    "qwen3": lambda: tf.Qwen3Config(**_HEADS),
    "mistral": lambda: tf.MistralConfig(**_COMMON, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**_COMMON, num_local_experts=4),
    "gemma2": lambda: tf.Gemma2Config(**_HEADS, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=16
    ),
    "gpt-oss": lambda: tf.GptOssConfig(**_HEADS, num_local_experts=4, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**_COMMON),
    "gpt-neox": lambda: tf.GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "cohere": lambda: tf.CohereConfig(**_COMMON),
    "olmo2": lambda: tf.Olmo2Config(**_COMMON),
    "glm4": lambda: tf.Glm4Config(**_HEADS),
    "smollm3": lambda: tf.SmolLM3Config(**_COMMON, no_rope_layer_interval=2),
    "falcon-mqa": lambda: tf.FalconConfig(**_FALCON, multi_query=True),
    "falcon-gqa": lambda: tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-mha": lambda: tf.FalconConfig(**_FALCON, multi_query=False, new_decoder_architecture=False),
}

LONGROPE = lambda: tf.Phi3Config(  # noqa: E731 - not in CONFIGS: stock answers differently at different lengths
    **_COMMON, rope_parameters={**_THETA, **_LONG, "rope_type": "longrope", "original_max_position_embeddings": 64}
)


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A fresh model with peaky logits."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return model.to(dtype)


@cache
def stock(name: str) -> Any:
    """The float32 model as transformers runs it; never given to the engine."""
    return build(CONFIGS[name]())


@cache
def loaded(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The same weights, for the engine."""
    return LoadedModel.from_model(build(CONFIGS[name](), dtype))


@torch.inference_mode()
def stock_logits(name: str, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocab]"""
    return stock(name)(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


@cache
def _stock_answer(name: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(stock_logits(name, token_ids)[-1].argmax()))
    return tuple(token_ids[len(prompt) :])


def stock_answer(name: str, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation, recomputed from the whole prompt for every token."""
    return list(_stock_answer(name, tuple(prompt), count))


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def make_tokenizer() -> Any:
    """One printable character per token id; 0, 1 and 2 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 161 + VOCAB)]
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(characters[: VOCAB - 3])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
