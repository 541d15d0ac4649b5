"""Which models may run: those refused by name of what they are, and the comparison that every other one has to pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import SdpaAttention
from actors.engine.blocks import BlockTable, KVPool
from actors.engine.hooks import IdentityRotary, rotary_identity
from actors.engine.probe import LayerFacts
from actors.engine.runner import BatchPart, ModelRunner, build_batch
from actors.engine.tokenizer import ModelError
from storage.format import LayerShape

_RECURRENT = re.compile(
    r"Mamba|Rwkv|RWKV|Recurrent|SSM|DeltaNet|Linear\w*Attention|Lightning|ShortConv|Retention|[xm]LSTM"
)
_LEARNED = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_embed)$")
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}

# Relative error of a token's logits (norm of the difference over norm of the stock's), over all tokens: the worst in
# float32. In 16 bits the median: rounding alone can send single tokens to other experts, a wrong rotation hits all.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_BLOCK_TOKENS = 4
_LENGTHS = (24, 7)
# Tokens per turn and step: prefill in chunks, together with a second turn, then decodes.
_SCHEDULE = ((10, 4), (9, 0), (1, 2), (1, 1), (1, 0), (1, 0), (1, 0))


class UnsupportedModel(ModelError):  # noqa: N818 - a verdict, not a mishap
    """The engine cannot run this model and give the stock model's answers; the message says why."""

    def __init__(self, model: Any, reason: str) -> None:
        super().__init__(f"{type(model).__name__} is not supported: {reason}")
        self.reason = reason


def refuse_known(model: Any) -> None:
    """Raises UnsupportedModel for what is known not to work, before anything is tried."""
    config = model.config.get_text_config()
    class_names = {type(module).__name__ for module in model.modules()}
    names = [name for name, _ in model.named_modules()]
    layer_types = set(getattr(config, "layer_types", None) or ())
    has_rotary = any("rotary" in name.lower() for name in class_names)
    chunked = "chunked_attention" in layer_types and getattr(config, "attention_chunk_size", None)
    alibi = getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
    reasons = {
        "it is an encoder-decoder model": model.config.is_encoder_decoder,
        "it uses ALiBi, which biases scores by distance instead of rotating keys": alibi,
        "its layers keep a recurrent state, which cannot be cut into chunks": any(map(_RECURRENT.search, class_names)),
        "it uses multi-head latent attention (MLA), whose cache is not keys and values": hasattr(
            config, "kv_lora_rank"
        ),
        "it uses chunked attention, which depends on absolute positions": chunked,
        "it adds learned position embeddings to its inputs instead of rotating keys": (
            not has_rotary and any(map(_LEARNED.search, names))
        ),
        f"it has layers of an unknown type ({', '.join(sorted(layer_types - _KNOWN_LAYER_TYPES))})": (
            layer_types - _KNOWN_LAYER_TYPES
        ),
        "no rotary module was found in it": not has_rotary,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModel(model, reason)


def check_windows(model: Any, facts: Sequence[LayerFacts]) -> None:
    """The window each layer asked its attention for must be what the configuration says: short tests do not show it."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        layer_types = ["sliding_attention" if windowed else "full_attention"] * len(facts)
    for layer, (kind, fact) in enumerate(zip(layer_types, facts)):
        if (kind == "sliding_attention") != (fact.args.sliding_window is not None):
            raise UnsupportedModel(
                model,
                f"layer {layer} is of type {kind} but asks for a window of {fact.args.sliding_window}",
            )


def _test_tokens(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20240710)
    vocab = model.config.get_text_config().vocab_size
    return [torch.randint(vocab, (n,), generator=generator).to(model.device) for n in _LENGTHS]


def stock_logits(model: Any, rotaries: list[IdentityRotary]) -> list[Tensor]:
    """Logits [tokens, vocab] of the test turns by the model as it came, one turn at a time."""
    model.set_attn_implementation("eager")
    with torch.inference_mode(), rotary_identity(rotaries, False):
        return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in _test_tokens(model)]


def check_against_stock(model: Any, facts: Sequence[LayerFacts], expected: Sequence[Tensor]) -> None:
    """Raises UnsupportedModel unless the engine's runner gives the stock model's logits."""
    check_windows(model, facts)
    got = _engine_logits(model, facts)
    for ours, stock in zip(got, expected):
        errors = (ours - stock).norm(dim=-1) / stock.norm(dim=-1).clamp_min(1e-30)
        error = float(errors.max() if model.dtype == torch.float32 else errors.median())
        if not error <= _TOLERANCE.get(model.dtype, 1e-3):
            raise UnsupportedModel(
                model,
                f"its logits on the engine differ from the stock model's by {error:.1%}: something in its attention is"
                " not what the engine takes it for",
            )


def _engine_logits(model: Any, facts: Sequence[LayerFacts]) -> list[Tensor]:
    """The test turns through pages in disorder, in ragged chunks."""
    shapes = [LayerShape(num_kv_heads=f.num_kv_heads, k_dim=f.k_dim, v_dim=f.v_dim) for f in facts]
    tables = [BlockTable(_BLOCK_TOKENS), BlockTable(_BLOCK_TOKENS)]
    tables[0].append([5, 0, 7, 3, 1, 8])
    tables[1].append([6, 2])
    pool = KVPool(shapes, 9, _BLOCK_TOKENS, model.dtype, model.device)
    runner = ModelRunner(model, [fact.rotation for fact in facts], pool, None, SdpaAttention())
    tokens = _test_tokens(model)
    done = [0, 0]
    collected: list[list[Tensor]] = [[], []]
    for counts in _SCHEDULE:
        turns = [turn for turn, count in enumerate(counts) if count]
        parts = [_part(tokens[turn], done[turn], counts[turn], tables[turn]) for turn in turns]
        batch = build_batch(parts, 0, model.device)
        every_row = torch.arange(len(batch.token_ids), device=model.device)
        logits = runner.forward(replace(batch, logit_rows=every_row)).float()
        for turn, span in zip(turns, batch.spans):
            collected[turn].append(logits[span.start : span.end])
            done[turn] += span.num_new
    return [torch.cat(rows) for rows in collected]


def _part(tokens: Tensor, start: int, count: int, table: BlockTable) -> BatchPart:
    ids = tokens[start : start + count].tolist()
    return BatchPart(token_ids=ids, start=start, table=table, save_rows=None, wants_logits=False)
