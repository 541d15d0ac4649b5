"""The next token: equal to transformers' processors, distributed as it should be, independent of the batch."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.engine import sampling
from actors.engine.params import SamplingParams, seed_of
from actors.engine.sampling import LogitsError, SamplingRow, sample, uniform

torch.set_num_threads(1)
VOCAB = 97


def row(params=None, *, num_generated=0, token_ids=(), eos=(), fallback_seed=1, **fields):
    return SamplingRow(
        params=params or SamplingParams(**fields),
        token_ids=token_ids,
        num_prompt=len(token_ids),
        num_generated=num_generated,
        eos_token_ids=eos,
        fallback_seed=fallback_seed,
    )


def random_logits(num_rows, seed=0, vocab=VOCAB):
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def ids(tokens):
    return [token.token_id for token in tokens]


def draws(logits, count, params):
    """`count` draws from one row of logits, as a batch of turns that differ in their counter only."""
    rows = [row(params, num_generated=i) for i in range(count)]
    return Counter(ids(sample(logits.expand(count, -1), rows)))


def assert_distributed(counts, probs, count):
    """Every token within five standard deviations, and none of probability 0."""
    for token_id, p in enumerate(probs.tolist()):
        sigma = math.sqrt(count * p * (1 - p))
        assert abs(counts[token_id] - count * p) <= 5 * sigma + 1e-9, (token_id, counts[token_id], count * p)


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id():
    logits = random_logits(5)
    logits[1] = 0.0
    logits[2, 40] = logits[2, 7] = logits[2, 90] = 50.0
    assert ids(sample(logits, [row()] * 5)) == [*logits[:1].argmax(-1).tolist(), 0, 7, *logits[3:].argmax(-1).tolist()]


def test_plain_greedy_batch_never_takes_the_full_way(monkeypatch):
    monkeypatch.setattr(sampling, "_choose", lambda *_: pytest.fail("a plain greedy batch costs one argmax"))
    sample(random_logits(3), [row(), row(logprobs=2), row(min_new_tokens=1, num_generated=1, eos=(3,))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_left_as_they_were(dtype):
    logits = random_logits(2).to(dtype)
    before = logits.clone()
    sample(logits, [row(temperature=0.7, top_k=5, repetition_penalty=1.5, token_ids=(1, 2)), row(logprobs=3)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.3, "top_k": 11},
        {"temperature": 1.0, "top_k": 10_000},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_filters_are_those_of_transformers(fields):
    params = SamplingParams(**fields)
    logits = random_logits(6, seed=3)
    expected = TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    shifted = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    ours = sampling._filter(shifted, [row(params)] * 6)
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_each_row_has_its_own_filters():
    all_params = [
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.3, top_k=50),
        SamplingParams(temperature=1.0, top_k=7, top_p=0.8),
    ]
    scores = random_logits(5)
    scores = scores - scores.amax(-1, keepdim=True)
    together = sampling._filter(scores, [row(params) for params in all_params])
    for i, params in enumerate(all_params):
        assert torch.equal(together[i], sampling._filter(scores[i : i + 1], [row(params)])[0])


def test_repetition_penalty_is_that_of_transformers_and_counts_prompt_and_answer():
    logits = random_logits(3, seed=5)
    history = [[1, 2, 2, 3, 96], [5], [7, 8, 9, 500, -1]]  # ids beyond the vocabulary are passed over
    rows = [row(repetition_penalty=1.8, token_ids=tokens) for tokens in history]
    ours = logits.clone()
    sampling._penalise_repetition(ours, rows)
    for i, tokens in enumerate(history):
        known = torch.tensor([[t for t in tokens if 0 <= t < VOCAB]])
        assert torch.equal(ours[i : i + 1], RepetitionPenaltyLogitsProcessor(1.8)(known, logits[i : i + 1]))
    best = int(logits[0].argmax())
    assert ids(sample(logits[:1], [row(repetition_penalty=50.0, token_ids=[best])])) != [best]


def test_penalties_count_the_answer_and_biases_are_added():
    logits = random_logits(2, seed=6)
    history = (3, 4, 7, 7, 9)  # the first two are the prompt
    penalised = SamplingRow(
        params=SamplingParams(
            presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 2.0), (9, -1.0), (999, 5.0))
        ),
        token_ids=history,
        num_prompt=2,
        num_generated=3,
        fallback_seed=1,
    )
    ours = logits.clone()
    sampling._adjust(ours, [penalised, row()])
    expected = logits.clone()
    expected[0, 3] += 2.0
    expected[0, 7] -= 0.5 + 2 * 0.25
    expected[0, 9] -= 1.0 + 0.5 + 0.25
    assert torch.allclose(ours, expected)
    best = int(logits[0].argmax())
    assert ids(sample(logits[:1], [row(logit_bias=((best, -100.0),))])) != [best]
    assert ids(sample(logits[:1], [row(logit_bias=((5, 100.0),))])) == [5]


def test_draws_follow_the_softmax():
    logits = random_logits(1, seed=1, vocab=20)
    params = SamplingParams(temperature=1.7, seed=11)
    assert_distributed(draws(logits, 20_000, params), (logits[0] / 1.7).softmax(-1), 20_000)


def test_draws_follow_the_filtered_softmax():
    logits = random_logits(1, seed=2, vocab=20)
    params = SamplingParams(temperature=2.0, top_k=12, top_p=0.9, min_p=0.03, seed=5)
    order = (logits[0] / 2).softmax(-1).sort(descending=True)
    kept, total = {}, order.values[:12].sum().item()
    for token_id, p in list(zip(order.indices.tolist(), order.values.tolist()))[:12]:
        if sum(kept.values()) / total < 0.9:
            kept[token_id] = p
    kept = {t: p for t, p in kept.items() if p >= 0.03 * order.values[0].item()}
    assert 3 < len(kept) < 12
    probs = torch.zeros(20)
    for token_id, p in kept.items():
        probs[token_id] = p / sum(kept.values())
    assert_distributed(draws(logits, 20_000, params), probs, 20_000)


def test_a_draw_depends_on_seed_and_counter_only():
    logits = random_logits(4, seed=9)
    rows = [row(temperature=1.0, seed=s, num_generated=n) for s, n in [(1, 0), (1, 1), (2, 0), (2, 17)]]
    alone = [sample(logits[i : i + 1], [rows[i]])[0].token_id for i in range(4)]
    assert ids(sample(logits, rows)) == alone
    mixed = torch.cat([logits.flip(0), random_logits(2)])
    assert ids(sample(mixed, [*rows[::-1], row(), row(temperature=0.3, top_p=0.5)]))[:4] == alone[::-1]


def test_a_preempted_turn_goes_on_with_the_same_tokens():
    logits = random_logits(30, seed=4)
    whole = [sample(logits[n : n + 1], [row(temperature=1.2, num_generated=n)])[0].token_id for n in range(30)]
    resumed = [sample(logits[n : n + 1], [row(temperature=1.2, num_generated=n)])[0].token_id for n in range(17, 30)]
    assert whole[17:] == resumed
    assert len(set(whole)) > 5


def test_without_a_seed_the_fallback_decides():
    logits = random_logits(1).expand(200, -1)
    by_turn = ids(sample(logits, [row(temperature=3.0, fallback_seed=seed_of(f"turn-{i}")) for i in range(200)]))
    assert len(set(by_turn)) > 20
    seeded = ids(sample(logits, [row(temperature=3.0, seed=7, fallback_seed=i) for i in range(200)]))
    assert len(set(seeded)) == 1
    assert seed_of("turn-1") == seed_of("turn-1") != seed_of("turn-2")


def test_uniform_is_uniform_and_fixed_for_ever():
    numbers = [uniform(seed, n) for seed in range(-50, 50) for n in range(100)]
    assert all(0 <= u < 1 for u in numbers)
    tenths = Counter(int(u * 10) for u in numbers)
    assert all(abs(tenths[i] - 1000) < 5 * math.sqrt(900) for i in range(10))
    assert uniform(0, 0) == 0.3323347518995903  # a resumed job on another machine must draw the same


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 0.999999999])
def test_extreme_numbers_never_draw_a_removed_token(monkeypatch, number):
    monkeypatch.setattr(sampling, "uniform", lambda *_: number)
    logits = torch.full((1, 50), -math.inf)
    logits[0, 10:13] = torch.tensor([1.0, 2.0, 3.0])
    assert ids(sample(logits, [row(temperature=1.0)])) == [10 if number == 0 else 12]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4])
def test_tiny_temperatures_are_greedy_not_nan(temperature):
    logits = random_logits(3) * 1e4
    assert ids(sample(logits, [row(temperature=temperature, top_p=0.9)] * 3)) == logits.argmax(-1).tolist()


def test_end_tokens_are_banned_until_min_new_tokens():
    logits = random_logits(1)
    eos, stop, third = logits[0].sort(descending=True).indices[:3].tolist()
    fields = {"min_new_tokens": 2, "stop_token_ids": (stop,), "eos": (eos,)}
    assert ids(sample(logits, [row(num_generated=1, **fields)])) == [third]
    assert ids(sample(logits, [row(num_generated=2, **fields)])) == [eos]
    assert ids(sample(logits, [row(num_generated=1, ignore_eos=True, **fields)])) == [eos]
    drawn = ids(sample(logits.expand(300, -1), [row(temperature=1.0, fallback_seed=i, **fields) for i in range(300)]))
    assert third in drawn
    assert not {eos, stop} & set(drawn)


def test_logprobs_are_the_models_own():
    logits = random_logits(3, seed=8)
    raw = logits.log_softmax(-1)
    params = SamplingParams(temperature=0.4, top_k=2, repetition_penalty=3.0, logprobs=4)
    none, chosen_only, top = sample(
        logits, [row(), row(logprobs=0, temperature=1.0), row(params, token_ids=[int(logits[2].argmax())])]
    )
    assert none.logprob is None
    assert none.top_logprobs == ()
    assert chosen_only.logprob == pytest.approx(raw[1, chosen_only.token_id].item())
    assert chosen_only.top_logprobs == ()
    assert top.logprob == pytest.approx(raw[2, top.token_id].item())
    assert [i for i, _ in top.top_logprobs] == raw[2].topk(4).indices.tolist()
    assert [p for _, p in top.top_logprobs] == pytest.approx(raw[2].topk(4).values.tolist())


def test_more_logprobs_than_tokens_gives_all_tokens():
    assert len(sample(random_logits(1, vocab=5), [row(logprobs=20)])[0].top_logprobs) == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_named_by_row(bad):
    logits = random_logits(4)
    logits[1, 5] = logits[3, 0] = bad
    with pytest.raises(LogitsError, match=r"row\(s\) \[1, 3\]") as raised:
        sample(logits, [row(), row(temperature=1.0), row(), row()])
    assert raised.value.rows == (1, 3)


def test_a_masked_token_is_fine_but_not_a_masked_row():
    logits = random_logits(2)
    logits[0, logits[0].argmax()] = -math.inf
    sample(logits, [row(), row(temperature=1.0)])
    logits[1] = -math.inf
    with pytest.raises(LogitsError):
        sample(logits, [row(), row(temperature=1.0)])


def test_banning_every_token_is_named():
    with pytest.raises(LogitsError, match=r"\[1\].*banned"):
        sample(random_logits(2, vocab=2), [row(), row(min_new_tokens=1, stop_token_ids=(0, 1))])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="expected"):
        sample(random_logits(2), [row()])
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"temperature": -1.0}, "0 is greedy"),
        ({"temperature": math.nan}, "finite"),
        ({"temperature": "hot"}, "number"),
        ({"top_p": 0.0}, "1 switches"),
        ({"top_p": 1.5}, "between"),
        ({"top_k": -1}, "0 switches it off"),
        ({"top_k": 1.5}, "whole number"),
        ({"min_p": 2.0}, "between"),
        ({"repetition_penalty": 0.0}, "1 switches"),
        ({"presence_penalty": 2.5}, "between"),
        ({"frequency_penalty": -3.0}, "between"),
        ({"logit_bias": ((-1, 1.0),)}, "at least 0"),
        ({"logit_bias": ((1, 101.0),)}, "between"),
        ({"seed": 1.5}, "whole number or None"),
        ({"stop": "end"}, "tuple"),
        ({"stop": ("",)}, "non-empty"),
        ({"stop_token_ids": 3}, "tuple"),
        ({"stop_token_ids": (-3,)}, "token ids"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "raise the other"),
        ({"logprobs": -1}, "None switches it off"),
        ({"logprobs": True}, "whole number"),
    ],
)
def test_wrong_parameters_are_refused_with_advice(fields, advice):
    with pytest.raises(ValueError, match=advice):
        SamplingParams(**fields)
