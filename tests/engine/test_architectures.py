"""The engine against stock transformers, greedy and float32, for every architecture: tokens and log-probabilities.

Everything at once per model: ragged batches, pages in disorder, prefill in chunks, restore in the middle of a chunk,
preemption and resume.
"""

from __future__ import annotations

import pytest
import torch

from actors.engine.params import SamplingParams
from tests.engine.harness import GREEDY, Owner, make_engine
from tests.engine.models import CONFIGS, loaded, random_prompt, stock_answer, stock_logits

WITH_LOGPROBS = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=4)


def assert_stock(name: str, prompt: tuple[int, ...], result: object) -> None:
    tokens = [token.token_id for token in result.tokens]  # type: ignore[attr-defined]
    assert tokens == stock_answer(name, prompt, len(tokens))
    logits = stock_logits(name, (*prompt, *tokens[:-1]))[len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    scale = 1e-4 * float(logits.abs().max())
    for row, token in zip(expected, result.tokens):  # type: ignore[attr-defined]
        for token_id, logprob in ((token.token_id, token.logprob), *token.top_logprobs):
            assert logprob is None or logprob == pytest.approx(float(row[token_id]), abs=scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_batches_and_restore(name: str) -> None:
    owner = Owner(make_engine(loaded(name), shuffle=1))
    prompts = {"long": random_prompt(43, 1), "middle": random_prompt(21, 2), "short": random_prompt(1, 3)}
    owner.add("long", prompts["long"], WITH_LOGPROBS, cuts=(37,))
    owner.step()
    owner.add("middle", prompts["middle"], WITH_LOGPROBS)
    owner.add("short", prompts["short"], WITH_LOGPROBS)
    results = owner.run()
    for turn_id, prompt in prompts.items():
        assert len(results[turn_id].tokens) == 8
        assert_stock(name, prompt, results[turn_id])

    # A turn that goes on from the answer, and one that shares the prompt up to the middle of a chunk.
    longer = (*prompts["long"], *results["long"].token_ids[:-1], *random_prompt(9, 4))
    branch = (*prompts["long"][:37], *random_prompt(6, 5))
    plans = {"longer": owner.store.plan(longer, cuts=(50,)), "branch": owner.store.plan(branch, cuts=(37,))}
    owner.add("longer", longer, WITH_LOGPROBS, restore=tuple(plans["longer"]), cuts=(50,))
    owner.add("branch", branch, WITH_LOGPROBS, restore=tuple(plans["branch"]))
    results = owner.run()
    assert [info.num_reused for info in results["longer"].started] == [50]
    assert [info.num_reused for info in results["branch"].started] == [37]
    assert_stock(name, longer, results["longer"])
    assert_stock(name, branch, results["branch"])


@pytest.mark.parametrize("name", CONFIGS)
def test_preempted_turns_go_on_where_they_were(name: str) -> None:
    sampling = SamplingParams(max_new_tokens=14, ignore_eos=True)
    owner = Owner(make_engine(loaded(name), shuffle=2, kv_tokens=84))
    prompts = {f"turn-{i}": random_prompt(20 + i, 10 + i) for i in range(3)}
    for turn_id, prompt in prompts.items():
        owner.add(turn_id, prompt, sampling)
    results = owner.run()
    assert sum(result.num_preemptions for result in results.values()) >= 1
    resumed = [r for r in results.values() if r.num_preemptions]
    assert any(info.num_reused > 0 for r in resumed for info in r.started[1:])
    for turn_id, prompt in prompts.items():
        assert results[turn_id].token_ids == stock_answer(name, prompt, 14)


def test_answers_do_not_depend_on_the_step_budget() -> None:
    prompt = random_prompt(61, 7)
    for max_step_tokens in (6, 16, 61, 200):
        owner = Owner(make_engine(loaded("llama"), max_step_tokens=max_step_tokens))
        owner.add("t", prompt, GREEDY)
        assert owner.run()["t"].token_ids == stock_answer("llama", prompt, 8)


def test_two_engines_and_two_models_in_one_process() -> None:
    owners = {name: Owner(make_engine(loaded(name))) for name in ("llama", "cohere")}
    owners["llama again"] = Owner(make_engine(loaded("llama"), shuffle=3))
    prompt = random_prompt(30, 8)
    for owner in owners.values():
        owner.add("t", prompt)
    while any(owner.engine.has_work for owner in owners.values()):
        for owner in owners.values():
            owner.step()
    for name, owner in owners.items():
        assert owner.results["t"].token_ids == stock_answer(name.split()[0], prompt, 8)


def test_sixteen_bits_stay_close_to_stock() -> None:
    prompt = random_prompt(40, 9)
    owner = Owner(make_engine(loaded("llama", torch.bfloat16)))
    owner.add("t", prompt, SamplingParams(max_new_tokens=1, logprobs=0))
    token = owner.run()["t"].tokens[0]
    assert token.token_id == stock_answer("llama", prompt, 1)[0]
