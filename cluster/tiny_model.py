"""Small model folders for demos and tests: real architectures, a real tokenizer, random weights, no download.

`make_tiny_model` writes what `AutoModelForCausalLM` and `AutoTokenizer` load offline. The tokenizer is a byte-level BPE
trained on the documentation that ships with Python. Its answers are words without sense; what they are good for is
comparing runs token by token. That asks for three things which the usual Gaussian initialisation does not give:

*Few near-ties.* Two runs that should give the same token differ by rounding, about 1e-6 of the largest logit. With
Gaussian weights the top two logits lie that close too often, because the largest of many Gaussian numbers is never far
from the second. So the weights are heavy-tailed (`_heavy`: the magnitudes u^(-1/alpha) of a Pareto law, each column
scaled to maximum 1): a sum is ruled by its largest term, and the largest by a margin. In gated models gate and up
projection are equal, which squares an activation; the last two layers do so with a gain that outweighs the residual.
*History matters.* Queries and keys are large, so attention picks single tokens, by content and by position; a wrong or
missing piece of KV changes tokens, as a test of a KV cache must be able to see.
*Answers go on.* Only rows of ASCII words and punctuation of the output matrix are not zero: no answer holds half
characters or ends by itself. Tokens that short cycles are made of have their row negated (`_break_loops`).

Measured on greedy answers to random prompts, seed 0; gap = (top - second) / largest magnitude among a step's logits:

    model            steps   smallest  0.1 % quantile  share below 0.02  so P(gap < 1e-5) is about
    llama, test     32,768    4.4e-06         4.3e-04             4.3 %  2e-5
    llama, 50m       6,144    6.1e-05         6.1e-04             4.7 %  2e-5
    gpt_neox, test   4,096    5.2e-05         8.9e-05            12.3 %  6e-5, as falcon: no gated MLP
    Gaussian, test   2,048    1.4e-06         1.1e-04            26.8 %  1e-4

In float32 logits were off by 7e-7 of the largest in the median and 1e-4 at worst; the token differed from float64's at
none of some 89,000 positions (six architectures). With other words at 16 early positions,
a fifth to a half of the later tokens change. Another seed may do somewhat better or worse.

The same arguments write the same bytes with the same versions of Python, torch, tokenizers and transformers.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{{ '\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions of a model; `vocab_size` is an upper bound where the corpus does not fill it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SIZES = {
    "test": Shape(
        hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, num_kv_heads=2, vocab_size=1536, context=4096
    ),
    "50m": Shape(
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=16000,
        context=8192,
    ),
    "125m": Shape(
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        vocab_size=32000,
        context=8192,
    ),
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox", "falcon")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_EMBEDDING = re.compile(r"\.(embed_tokens|embed_in|word_embeddings)\.weight$")
_OUTPUT = re.compile(r"^(lm_head|embed_out)\.weight$")
_QUERY_KEY = re.compile(r"\.(q_proj|k_proj)\.weight$")
_FUSED_QKV = re.compile(r"\.(qkv_proj|query_key_value)\.weight$")
_GATE_UP = re.compile(r"\.gate_up_proj\.weight$")
_UP = re.compile(r"\.up_proj\.weight$")
_MLP_OUT = re.compile(r"\.(down_proj|dense_4h_to_h)\.weight$")

EMBEDDING_TAIL, INNER_TAIL, OUTPUT_TAIL = 1.0, 0.5, 0.35
ATTENTION_STD = 2.5  # of queries and keys: their scores have about the square of it
LAST_LAYERS, LAST_GAIN = 2, 20.0
TOP_LOGIT = 25.0


def make_tiny_model(
    out_dir: str | Path,
    architecture: str = "llama",
    size: str = "test",
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Writes config, weights, generation config and tokenizer into `out_dir` and returns it; "50m" takes some seconds.

    Files of an earlier model in `out_dir` are overwritten. ValueError names what there is to choose from.
    """
    for name, value, known in (
        ("architecture", architecture, ARCHITECTURES),
        ("size", size, tuple(SIZES)),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    shape = SIZES[size]
    tokenizer = train_tokenizer(shape.vocab_size, shape.context)
    model = AutoModelForCausalLM.from_config(_config(architecture, shape, tokenizer), dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rounding depends on it, and `_break_loops` on rounding
    try:
        _initialise(model, shape, _speakable(tokenizer), torch.Generator().manual_seed(seed))
    finally:
        torch.set_num_threads(threads)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    model.to(DTYPES[dtype]).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _name_tokenizer_class(out / "tokenizer_config.json")
    return out


def _name_tokenizer_class(file: Path) -> None:
    """By the name that transformers 4, which many clients of a server have, knows as well."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(vocab_size: int, context: int) -> Any:
    """Byte-level BPE with the special tokens first, and a chat template with the roles of SPECIAL_TOKENS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(large=vocab_size > 4000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,  # never used; without one, Qwen2's tokenizer class adds a token the model does not have
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


@lru_cache(maxsize=2)
def corpus(large: bool) -> tuple[str, ...]:
    """Texts to train a tokenizer on: Python's help topics and, if `large`, the standard library's docstrings."""
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    if large:
        library = Path(ast.__file__).parent
        for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
            if "site-packages" not in path.parts and "test" not in path.parts[-2]:
                texts.extend(_docstrings(path))
    return tuple(texts)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _speakable(tokenizer: Any) -> Tensor:
    """[vocab] bool: ASCII words (with or without a leading space) and punctuation, what answers are made of."""
    pattern = re.compile("Ġ?[A-Za-z]+|[.,:;!?]")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([pattern.fullmatch(token) is not None for token in tokens])


# --- config -----------------------------------------------------------------------------------------------------------


def _config(architecture: str, shape: Shape, tokenizer: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "falcon":  # the layout of Falcon-40B: grouped heads, parallel attention and MLP
        own = {"new_decoder_architecture": True, "num_kv_heads": shape.num_kv_heads, "alibi": False, "bias": False}
        fields |= own | {"ffn_hidden_size": 3 * shape.intermediate_size // 2}
    elif architecture == "gpt_neox":
        fields |= {"intermediate_size": 3 * shape.intermediate_size // 2}
    else:
        fields |= {"intermediate_size": shape.intermediate_size, "num_key_value_heads": shape.num_kv_heads}
    if architecture in ("qwen3", "gemma2", "mistral"):
        fields |= {"head_dim": shape.head_dim}
    if architecture == "gemma2":
        fields |= {"query_pre_attn_scalar": shape.head_dim}
    if architecture in ("mistral", "phi3"):
        fields |= {"sliding_window": None}
    return AutoConfig.for_model(architecture, **fields)


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _initialise(model: Any, shape: Shape, speakable: Tensor, generator: torch.Generator) -> None:
    """Every matrix anew; norms and biases stay as transformers makes them, but for those named here."""
    gate: Tensor | None = None
    for name, weight in model.named_parameters():
        rows = weight.shape[0]
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # Qwen3: normed queries and keys
            weight.fill_(ATTENTION_STD)
        elif name.endswith("post_feedforward_layernorm.weight"):  # Gemma 2: the norm sets the gain, as 1 + weight
            weight.fill_(_gain(name, shape) - 1)
        elif weight.dim() < 2:
            continue
        elif _EMBEDDING.search(name):
            rows_of = _heavy(shape.hidden_size, rows, EMBEDDING_TAIL, generator).T
            scale = math.sqrt(shape.hidden_size) if model.config.model_type == "gemma2" else 1.0
            weight.copy_(rows_of / rows_of.pow(2).mean(1, keepdim=True).sqrt() / scale)
        elif _OUTPUT.search(name):
            output = torch.zeros(rows, shape.hidden_size)
            output[speakable] = _heavy(int(speakable.sum()), shape.hidden_size, OUTPUT_TAIL, generator)
            weight.copy_(output * TOP_LOGIT / math.sqrt(shape.hidden_size))
        elif _QUERY_KEY.search(name):
            weight.copy_(_gaussian(weight, generator))
        elif _FUSED_QKV.search(name):
            values = _value_rows(model.config, shape)[:, None]
            weight.copy_(torch.where(values, _unit_heavy(weight, generator), _gaussian(weight, generator)))
        elif _GATE_UP.search(name):
            weight.copy_(_unit_heavy(weight[: rows // 2], generator).repeat(2, 1))
        elif _UP.search(name) and gate is not None:
            weight.copy_(gate)
        else:
            made = _unit_heavy(weight, generator) * _gain(name, shape)
            gate = made if name.endswith("gate_proj.weight") else gate
            weight.copy_(made)
    _break_loops(model, speakable, generator)


def _gain(name: str, shape: Shape) -> float:
    """LAST_GAIN for what the MLPs of the last layers add to the residual stream, 1 for everything else."""
    layer = re.search(r"\.(\d+)\.", name)
    is_last = layer is not None and int(layer[1]) >= shape.num_layers - LAST_LAYERS
    is_out = _MLP_OUT.search(name) is not None or "post_feedforward" in name
    return LAST_GAIN if is_last and is_out else 1.0


def _heavy(rows: int, columns: int, tail: float, generator: torch.Generator) -> Tensor:
    """[rows, columns] of random sign, Pareto magnitudes with exponent `tail`, the largest of each column 1."""
    magnitudes = torch.rand(rows, columns, generator=generator).clamp_(min=1e-7).pow_(-1 / tail)
    signs = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8) * 2 - 1
    return magnitudes.div_(magnitudes.amax(0, keepdim=True)).mul_(signs)


def _unit_heavy(like: Tensor, generator: torch.Generator) -> Tensor:
    """Heavy-tailed, with rows of norm 1 in the mean: unit inputs give about unit outputs."""
    made = _heavy(like.shape[0], like.shape[1], INNER_TAIL, generator)
    return made / made.pow(2).sum(1).mean().sqrt()


def _gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator) * (ATTENTION_STD / math.sqrt(like.shape[1]))


def _value_rows(config: Any, shape: Shape) -> Tensor:
    """[rows] bool: which output rows of a fused query-key-value matrix are values."""
    if config.model_type == "phi3":  # all queries, all keys, all values
        parts = torch.tensor([0] * (shape.num_heads + shape.num_kv_heads) + [1] * shape.num_kv_heads)
    elif config.model_type == "gpt_neox":  # query, key, value of each head
        parts = torch.tensor([0, 0, 1]).repeat(shape.num_heads)
    else:  # Falcon: queries of a group, its key, its value
        parts = torch.tensor([0] * (shape.num_heads // shape.num_kv_heads + 1) + [1]).repeat(shape.num_kv_heads)
    return parts.bool().repeat_interleave(shape.head_dim)


def _break_loops(model: Any, speakable: Tensor, generator: torch.Generator, rounds: int = 12) -> None:
    """Talks a little; where an answer falls into a short cycle, negates the output row of its commonest token."""
    output = model.get_output_embeddings().weight
    words = speakable.nonzero()[:, 0]
    for _ in range(rounds):
        prompts = words[torch.randint(len(words), (32, 48), generator=generator)]
        ends = _talk(model, prompts, num_tokens=48)[:, -24:]
        loops = [end.mode().values for end in ends if len(end.unique()) < 8]
        if not loops:
            return
        output[torch.stack(loops).unique()] *= -1


def _talk(model: Any, prompts: Tensor, num_tokens: int) -> Tensor:
    """[batch, tokens] -> [batch, num_tokens], greedy."""
    said: list[Tensor] = []
    step, cache = prompts, None
    for _ in range(num_tokens):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step, cache = result.logits[:, -1].argmax(-1, keepdim=True), result.past_key_values
        said.append(step)
    return torch.cat(said, dim=1)
