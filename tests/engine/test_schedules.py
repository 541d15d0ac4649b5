"""Random interleavings of everything at once: answers stay right, nothing leaks, every turn ends exactly once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from actors.engine.overlap import LoadOrder
from actors.engine.params import SamplingParams
from actors.engine.turns import FinishReason, RestoreSource
from storage.format import ChunkReader, read_chunk
from tests.engine.harness import Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

MODELS = ("llama", "gemma3", "gpt-oss", "falcon-gqa")
_BASES = [random_prompt(70, 100 + i) for i in range(3)]  # turns share prefixes of these


def _unreliable(source: RestoreSource, rng: random.Random) -> RestoreSource:
    """One source in five is slow, lost or damaged."""
    mishap = rng.choice(["slow", "lost", "damaged", *[""] * 12])
    at = rng.random()

    def opener(stock: Callable[[], ChunkReader] = source.open) -> ChunkReader:
        if mishap == "lost":
            raise OSError("gone")
        if mishap == "slow":
            time.sleep(0.01)
        if mishap == "damaged":
            data = source_data(source)
            data[int(at * len(data))] ^= 1
            return read_chunk(data)
        return stock()

    def source_data(source: RestoreSource) -> bytearray:
        reader = source.open()
        return bytearray(reader._source.read(0, reader.num_bytes))

    return RestoreSource(key=source.key, start=source.start, num_tokens=source.num_tokens, open=opener)


def _prompt(rng: random.Random, owner: Owner) -> tuple[int, ...]:
    """A piece of a base, something new, or the continuation of an earlier turn."""
    done = [turn_id for turn_id, result in owner.results.items() if result.finish is FinishReason.LENGTH]
    if done and rng.random() < 0.4:
        turn_id = rng.choice(done)
        history = (*owner.requests[turn_id].token_ids, *owner.results[turn_id].token_ids)
        if len(history) < 80:
            return (*history, *random_prompt(rng.randint(1, 6), rng.randint(0, 3)))
    base = rng.choice(_BASES)[: rng.randint(1, 70)]
    return (*base, *random_prompt(rng.randint(0, 5), rng.randint(0, 3)))


@pytest.mark.parametrize("seed", range(16))
def test_random_schedules(seed: int) -> None:
    rng = random.Random(seed)
    name = MODELS[seed % len(MODELS)]
    engine = make_engine(
        loaded(name),
        shuffle=seed,
        kv_tokens=rng.choice([100, 140, 200]),
        max_step_tokens=rng.choice([6, 17, 64]),
        max_running_turns=rng.choice([2, 4, 6]),
        write_buffer_chunks=rng.choice([1, 3, 24]),
        max_ready_chunks=rng.choice([1, 64]),
        order=rng.choice([*LoadOrder, None]),
        keep_finished=rng.random() < 0.7,
        load_deadline_s=rng.choice([0.005, 10.0]),
        read_ahead_chunks=rng.choice([1, 3]),
    )
    owner = Owner(engine)
    aborted: set[str] = set()
    for i in range(25):
        for _ in range(rng.randint(0, 4)):
            owner.step()
        prompt = _prompt(rng, owner)
        cuts = tuple(rng.sample(range(1, 80), 3))
        restore = [_unreliable(source, rng) for source in owner.store.plan(prompt, cuts)] if rng.random() < 0.8 else []
        sampling = SamplingParams(max_new_tokens=rng.randint(1, 24), ignore_eos=True)
        owner.add(f"t{i}", prompt, sampling, cuts=cuts, restore=tuple(restore), save=rng.random() < 0.9)
        if rng.random() < 0.15:
            victim = f"t{rng.randint(0, i)}"
            aborted.add(victim)
            engine.abort(victim)
    results = owner.run()
    for turn_id, result in results.items():
        answer = stock_answer(name, owner.requests[turn_id].token_ids, len(result.tokens))
        assert result.token_ids == answer, turn_id
        if turn_id not in aborted:
            assert result.finish is FinishReason.LENGTH
            request = owner.requests[turn_id]
            room = engine.config.kv_tokens - len(request.token_ids)
            assert len(result.tokens) == min(request.sampling.max_new_tokens, room)
    stats = engine.stats()
    assert stats["blocks_free"] + stats["blocks_kept"] == stats["blocks"]
    engine.forget_kept()
    stats = engine.stats()
    assert stats["blocks_free"] == stats["blocks"]
    assert stats["slots_free"] == stats["slots"]
    engine.close()


def test_resubmission_after_preemption_with_random_sampling_gives_the_same_tokens() -> None:
    sampling = SamplingParams(max_new_tokens=14, temperature=1.5, ignore_eos=True, repetition_penalty=1.2)
    prompts = {f"turn-{i}": random_prompt(20 + i, 10 + i) for i in range(3)}
    answers = []
    for kv_tokens in (84, 512):
        owner = Owner(make_engine(loaded("llama"), kv_tokens=kv_tokens))
        for turn_id, prompt in prompts.items():
            owner.add(turn_id, prompt, sampling)
        results = owner.run()
        answers.append({turn_id: result.token_ids for turn_id, result in results.items()})
        assert any(result.num_preemptions for result in results.values()) == (kv_tokens == 84)
    assert answers[0] == answers[1]
