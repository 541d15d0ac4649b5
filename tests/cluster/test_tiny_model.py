"""Tiny models load like any other, are the same again, and answer in a way that comparisons can rely on."""

import hashlib
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.tiny_model import ARCHITECTURES, EOS, SPECIAL_TOKENS, make_tiny_model, train_tokenizer

torch.set_num_threads(1)
torch.set_grad_enabled(False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / request.param, architecture=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("models"), seed=0)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def generate(model, num_prompts, num_tokens, seed=1):
    """Greedy answers to random prompts: (prompts and answers [batch, tokens], logits of each step)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(len(SPECIAL_TOKENS), model.config.vocab_size, (num_prompts, 32), generator=generator)
    ids, step, cache, logits = prompts, prompts, None, []
    for _ in range(num_tokens):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(result.logits[:, -1])
        step, cache = logits[-1].argmax(-1, keepdim=True), result.past_key_values
        ids = torch.cat([ids, step], dim=1)
    return ids, torch.stack(logits, dim=1)


def test_loads_offline_and_talks(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    text = "Hello there, 12 o'clock:\n\n  你好 🙂 <|user|>hi<|end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, logits = generate(model, 8, 48)
    assert logits.isfinite().all()
    answers = ids[:, 32:].tolist()
    assert not {i for answer in answers for i in answer} & set(range(len(SPECIAL_TOKENS)))
    assert min(len(set(answer)) for answer in answers) >= 5
    assert tokenizer.decode(answers[0]).isascii()


def test_history_decides(folder):
    """Other words early in the prompt change what is said later: a wrong piece of KV would be seen."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, _ = generate(model, 32, 32)
    changed = ids.clone()
    changed[:, 4:16] = changed[:, 4:16].flip(0)
    differ = model(input_ids=ids).logits[:, 32:].argmax(-1) != model(input_ids=changed).logits[:, 32:].argmax(-1)
    assert differ.float().mean() > 0.03
    assert differ.any(dim=1).float().mean() > 0.4


def test_positions_matter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, _ = generate(model, 32, 16)
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    apart = model(input_ids=ids, position_ids=positions + 3 * (positions >= 20)).logits
    assert (apart[:, 32:].argmax(-1) != model(input_ids=ids).logits[:, 32:].argmax(-1)).float().mean() > 0.02


def test_near_ties_are_rare(llama):
    """2,048 greedy steps. A Gaussian initialisation has its 0.1 % quantile about ten times lower."""
    _, logits = generate(llama[0], 32, 64)
    top = logits.topk(2, dim=-1).values
    gaps = ((top[..., 0] - top[..., 1]) / logits.abs().amax(-1)).flatten().sort().values
    assert len(gaps) == 2048
    assert gaps[0] > 1e-6
    assert gaps[2] > 1e-4
    assert (gaps < 0.02).float().mean() < 0.08


def test_rounding_does_not_change_tokens(llama, tmp_path):
    """float32 in one go, in uneven chunks and float64 choose the same tokens at every position."""
    model, _ = llama
    ids, _ = generate(model, 16, 64)
    whole = model(input_ids=ids).logits.argmax(-1)
    cache, parts = None, []
    for chunk in ids.split([7, 30, 1, 58], dim=1):
        result = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        parts.append(result.logits.argmax(-1))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    model.save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(exact(input_ids=ids).logits.argmax(-1), whole)


def test_answers_are_not_stuck(llama):
    answers = generate(llama[0], 32, 64)[0][:, 32:].tolist()
    runs = [max(len(list(run)) for _, run in itertools.groupby(answer)) for answer in answers]
    assert max(runs) < 32  # no answer is one token for half of its length
    assert sum(len(set(answer)) for answer in answers) / 32 > 15
    assert len({tuple(answer) for answer in answers}) == 32


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    torch.manual_seed(1)
    first = digests(make_tiny_model(tmp_path / "a", seed=5))
    torch.manual_seed(2)
    torch.rand(7)
    assert digests(make_tiny_model(tmp_path / "b", seed=5)) == first
    other = digests(make_tiny_model(tmp_path / "c", seed=6))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(tmp_path, dtype):
    folder = make_tiny_model(tmp_path, dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert generate(model, 2, 8)[1].isfinite().all()


def test_the_chat_template_knows_every_role(llama):
    _, tokenizer = llama
    messages = [{"role": role, "content": f" {role}! "} for role in ("system", "user", "assistant", "tool")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "".join(f"<|{m['role']}|>{m['content']}{EOS}\n" for m in messages)
    assert text == f"<|begin|>{turns}<|assistant|>"


def test_large_vocabularies_are_filled():
    assert len(train_tokenizer(16000, 8192)) == 16000


@pytest.mark.parametrize("wrong", [{"architecture": "gpt2"}, {"size": "7b"}, {"dtype": "int8"}])
def test_wrong_choices_are_refused_with_the_right_ones(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"unknown .*: choose one of .*, "):
        make_tiny_model(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()
