"""How turns begin, end and fail."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.engine.engine import Engine
from actors.engine.loading import LoadedModel
from actors.engine.params import SamplingParams
from actors.engine.turns import EngineConfig, FinishReason, Request
from tests.engine.harness import GREEDY, Owner, make_engine
from tests.engine.models import CONFIGS, build, loaded, make_tokenizer, random_prompt, stock_answer

PROMPT = random_prompt(20, 1)
ANSWER = stock_answer("llama", PROMPT, 40)


def _finish(
    sampling: SamplingParams, engine: Engine | None = None, **more: Any
) -> tuple[list[int], FinishReason | None]:
    owner = Owner(engine or make_engine(loaded("llama")))
    owner.add("t", more.pop("prompt", PROMPT), sampling, **more)
    result = owner.run()["t"]
    return result.token_ids, result.finish


def test_length_stop_tokens_and_end_tokens() -> None:
    assert _finish(SamplingParams(max_new_tokens=5, ignore_eos=True)) == (ANSWER[:5], FinishReason.LENGTH)
    stop = SamplingParams(max_new_tokens=9, ignore_eos=True, stop_token_ids=(ANSWER[3],))
    first = ANSWER.index(ANSWER[3])
    assert _finish(stop) == (ANSWER[: first + 1], FinishReason.STOP)
    ends = make_engine(replace(loaded("llama"), eos_token_ids=(ANSWER[3], 7)))
    assert _finish(SamplingParams(max_new_tokens=9), ends) == (ANSWER[: first + 1], FinishReason.STOP)
    assert _finish(SamplingParams(max_new_tokens=9, ignore_eos=True), ends) == (ANSWER[:9], FinishReason.LENGTH)


def test_a_turn_is_computed_in_the_step_that_admits_it() -> None:
    owner = Owner(make_engine(loaded("llama")))
    owner.add("t", PROMPT, GREEDY)
    owner.step()
    assert owner.results["t"].token_ids == ANSWER[:1]
    owner.add("next", (*PROMPT[:-1], 5), GREEDY)
    owner.step()
    assert len(owner.results["next"].tokens) == 1
    assert owner.results["t"].token_ids == ANSWER[:2]


def test_no_end_before_min_new_tokens() -> None:
    engine = make_engine(replace(loaded("llama"), eos_token_ids=(ANSWER[0],)))
    tokens, _ = _finish(SamplingParams(max_new_tokens=6, min_new_tokens=4), engine)
    assert ANSWER[0] not in tokens[:4]
    assert len(tokens) >= 4


def _plain_answer() -> tuple[tuple[int, ...], list[int]]:
    """A prompt whose answer begins with five different ASCII characters (ids 3 .. 96 of the test tokenizer)."""
    for seed in range(200):
        prompt = random_prompt(20, seed)
        answer = stock_answer("llama", prompt, 6)
        if all(3 <= token_id < 97 for token_id in answer) and len(set(answer)) == 6:
            return prompt, answer
    raise AssertionError("no such prompt")


def test_stop_strings() -> None:
    tokenizer = make_tokenizer()
    engine = make_engine(replace(loaded("llama"), tokenizer=tokenizer))
    prompt, answer = _plain_answer()
    text = tokenizer.decode(answer)
    assert len(text) == 6
    stop = SamplingParams(max_new_tokens=6, ignore_eos=True, stop=(text[2:4],))
    assert _finish(stop, engine, prompt=prompt) == (answer[:4], FinishReason.STOP)
    late = SamplingParams(max_new_tokens=6, min_new_tokens=5, ignore_eos=True, stop=(text[2:4],))
    assert _finish(late, engine, prompt=prompt) == (answer, FinishReason.LENGTH)
    # Resumed between the two characters of the stop string: it is still seen.
    assert _finish(stop, engine, prompt=(*prompt, *answer[:3]), num_prior=3) == ([answer[3]], FinishReason.STOP)


def test_a_resumed_turn_counts_what_it_had() -> None:
    sampling = SamplingParams(max_new_tokens=8, temperature=0.9, seed=3, ignore_eos=True)
    whole, _ = _finish(sampling)
    rest, reason = _finish(sampling, prompt=(*PROMPT, *whole[:5]), num_prior=5)
    assert (rest, reason) == (whole[5:], FinishReason.LENGTH)


def test_a_turn_ends_with_its_room() -> None:
    """The context window or the whole pool, whichever is smaller, prompt and answer together."""
    long = SamplingParams(max_new_tokens=500, ignore_eos=True)
    tokens, reason = _finish(long, make_engine(loaded("llama"), kv_tokens=40))
    assert (tokens, reason) == (ANSWER[:20], FinishReason.LENGTH)
    window = make_engine(replace(loaded("llama"), context_window=33))
    assert _finish(long, window) == (ANSWER[:13], FinishReason.LENGTH)


def test_requests_that_cannot_run_are_refused_at_the_door() -> None:
    engine = make_engine(loaded("llama"), kv_tokens=40)
    owner = Owner(engine)
    with pytest.raises(ValueError, match="shorten the prompt, or raise kv_tokens"):
        owner.add("t", random_prompt(40, 2))
    with pytest.raises(ValueError, match="token ids must be in"):
        owner.add("t", (5, 128))
    with pytest.raises(ValueError, match="at least one prompt token"):
        owner.add("t", ())
    with pytest.raises(ValueError, match="need a tokenizer"):
        owner.add("t", PROMPT, SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match="nothing is left to do"):
        owner.add("t", PROMPT, GREEDY, num_prior=8)
    owner.add("t", PROMPT)
    with pytest.raises(ValueError, match="running already"):
        owner.add("t", PROMPT)
    owner.run()
    owner.add("t", PROMPT)
    assert owner.run()["t"].token_ids == ANSWER[:8]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"kv_tokens": 0}, "kv_tokens must be at least 1"),
        ({"kv_tokens": 20}, "must hold two blocks"),
        ({"kv_tokens": 64, "max_step_tokens": 4}, "raise the one or lower the other"),
        ({"kv_tokens": 64, "write_buffer_chunks": -1}, "0 switches saving off"),
        ({"kv_tokens": 64, "num_threads": 0}, "at least 1, or None"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        EngineConfig(model="x", **settings)  # type: ignore[arg-type]


def test_aborts_in_every_state() -> None:
    owner = Owner(make_engine(loaded("llama"), max_running_turns=2, max_step_tokens=8))
    for turn_id in ("running", "waiting", "queued", "inbox"):
        owner.add(turn_id, PROMPT)
        if turn_id != "inbox":
            owner.step()
    for turn_id in ("running", "waiting", "queued", "inbox", "unknown"):
        owner.engine.abort(turn_id)
    results = owner.run()
    assert {result.finish for result in results.values()} == {FinishReason.ABORTED}
    owner.engine.abort("running")
    assert not owner.engine.has_work


def test_a_failing_forward_fails_its_turns_and_nothing_else() -> None:
    model = LoadedModel.from_model(build(CONFIGS["llama"]()))
    owner = Owner(make_engine(model))
    owner.add("t", PROMPT)
    owner.step()
    embed, model.model.model.embed_tokens = model.model.model.embed_tokens, None
    owner.step()
    assert owner.results["t"].finish is FinishReason.FAILED
    assert "TypeError" in (owner.results["t"].error or "")
    model.model.model.embed_tokens = embed
    owner.add("again", PROMPT)
    assert owner.run()["again"].token_ids == ANSWER[:8]


def test_unusable_logits_fail_one_turn_only(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(make_engine(loaded("llama")))
    forward = owner.engine._runner.forward

    def spoil_the_first(batch: Any) -> torch.Tensor:
        logits = forward(batch)
        if len(logits) == 2:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(owner.engine._runner, "forward", spoil_the_first)
    owner.add("a", PROMPT)
    owner.add("b", PROMPT)
    results = owner.run()
    assert results["a"].finish is FinishReason.FAILED
    assert results["b"].token_ids == ANSWER[:8]


def test_every_turn_is_told_of_its_start_once_and_of_its_first_token() -> None:
    owner = Owner(make_engine(loaded("llama"), max_running_turns=1))
    before = time.monotonic()
    for turn_id in ("a", "b"):
        owner.add(turn_id, PROMPT)
    results = owner.run()
    assert [len(result.started) for result in results.values()] == [1, 1]
    assert before < (results["a"].first_token_at or 0) < (results["b"].first_token_at or 0) < time.monotonic()
    assert results["b"].started[0].queued_s > results["a"].started[0].queued_s


def test_turns_may_be_added_from_other_threads_while_the_engine_waits() -> None:
    engine = make_engine(loaded("llama"))
    owner = Owner(engine)
    assert not engine.wait_for_work(0.01)
    threads = [threading.Thread(target=owner.add, args=(f"t{i}", random_prompt(9, i))) for i in range(8)]
    for thread in threads:
        thread.start()
    assert engine.wait_for_work(10)
    for thread in threads:
        thread.join()
    results = owner.run()
    assert len(results) == 8
    for i in range(8):
        assert results[f"t{i}"].token_ids == stock_answer("llama", random_prompt(9, i), 8)


def test_stats_count_tokens_and_room() -> None:
    owner = Owner(make_engine(loaded("llama"), kv_tokens=512))
    owner.add("t", PROMPT)
    owner.run()
    stats = owner.engine.stats()
    assert stats["prefill_tokens"] == 20
    assert stats["decode_tokens"] == 7
    assert stats["blocks_free"] == stats["blocks"] == 128
    assert stats["prefill_tokens_per_s"] > 0
    assert stats["decode_tokens_per_s"] > 0
    assert all(isinstance(value, int | float) for value in stats.values())


def test_close_ends_the_helper_threads() -> None:
    engine = make_engine(loaded("llama"))
    Owner(engine).add("t", PROMPT)
    while engine.has_work:
        engine.step()
    [ready, *_] = engine.ready_chunks()
    threads = list(engine._saver._executor._threads)
    assert threads
    engine.close()
    assert not any(thread.is_alive() for thread in threads)
    assert engine.take_chunk(ready.header.key).nbytes == ready.num_bytes


def test_the_number_of_threads_is_set() -> None:
    try:
        Engine(EngineConfig(model="in memory", kv_tokens=64, num_threads=2), loaded("llama"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_requests_know_their_prompt() -> None:
    assert Request(turn_id="t", token_ids=(1, 2, 3), sampling=GREEDY, num_prior=1, root="").num_prompt == 2
