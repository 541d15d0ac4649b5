"""What is learned of returns: hazards, probabilities and the index against processes whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heapreplace
from math import exp, isfinite
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.eviction import EvictionPolicy, Lru, Returns, returns
from policies.eviction.returns import NUM_FEATURES, Experience, Standing, features_of
from policies.messages import Mark
from policies.returns import ENDS, NUM_INTERVALS, STARTS, Features, ReturnModel, Silence
from policies.simulator.replay import Level, replay
from policies.simulator.trace import Request, Trace
from tests.policies.contracts import DRAM, OUTLOOK, EvictionContract, Facts
from tests.policies.driver import Driver
from tests.policies.texts import text


def learn(means_s: list[float], num_returns: int, seed: int = 1) -> ReturnModel:
    """From 100 prefixes of each class that come back after an exponential time with the mean of their class."""
    random, model = Random(seed), ReturnModel(num_features=1)
    events = []
    for level, mean_s in enumerate(means_s):
        for number in range(100):
            silence = model.begin(0.0, (level,))
            events.append((random.expovariate(1 / mean_s), level, number, silence))
    heapify(events)
    for _ in range(num_returns):
        now, level, number, silence = events[0]
        model.end(silence, now)
        model.advance(now)
        again = model.begin(now, (level,))
        heapreplace(events, (now + random.expovariate(1 / means_s[level]), level, number, again))
    return model


def test_hazards_of_a_renewal_process() -> None:
    model = learn([20.0], 8000)
    for interval in range(7):  # up to 32 s, where one in five is left
        truth = 1.0 - exp(-(ENDS[interval] - STARTS[interval]) / 20.0)
        assert model.hazards[interval] * model.factor((0,)) == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize(("age", "within_s"), [(0.0, 4.0), (0.0, 16.0), (8.0, 8.0), (3.0, 5.0)])
def test_probability_against_the_truth(age: float, within_s: float) -> None:
    model = learn([20.0, 60.0], 8000)
    for level, mean_s in enumerate((20.0, 60.0)):
        truth = 1.0 - exp(-within_s / mean_s)
        assert model.probability((level,), age, within_s) == pytest.approx(truth, abs=0.08)


def test_the_index_of_the_class_that_returns_is_higher() -> None:
    model = learn([10.0, 100.0], 6000)
    assert model.factor((0,)) > 2 * model.factor((1,))
    soon, late = 2, -2
    assert all(model.index(soon, age) >= model.index(late, age) for age in (0.0, 1.0, 5.0, 20.0))
    assert model.index(soon, 1.0) > model.index(late, 1.0)


def test_the_index_goes_in_straight_lines_between_intervals() -> None:
    model = learn([10.0, 100.0], 6000)
    table = model.table(0)
    for interval in (2, 5, NUM_INTERVALS - 1):
        start, end = STARTS[interval], ENDS[interval]
        later = table[interval + 1] if interval + 1 < NUM_INTERVALS else 0.0
        assert model.index(0, start) == table[interval]
        assert model.index(0, (start + end) / 2) == pytest.approx((table[interval] + later) / 2)
        assert model.index(0, end) == pytest.approx(later)
    assert model.index(0, -5.0) == table[0]  # a clock that another thread has read later


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.floats(0.0, 1e6), st.floats(0.0, 1.5)), max_size=200
    ),
    age=st.floats(0.0, 1e7),
    within_s=st.floats(0.0, 1e7),
)
def test_answers_stay_within_reason(steps: list[tuple[int, int, float, float]], age: float, within_s: float) -> None:
    """Whatever is told, also in odd orders."""
    model, silences, now = ReturnModel(num_features=1, refit_every=4), list[Silence](), 0.0
    for verb, level, wait_s, share in steps:
        now += wait_s
        if verb < 3 or not silences:
            silences.append(model.begin(now, (level,), min(1.0, share)))
        else:
            model.end(silences[verb % len(silences)], now, share)
        model.advance(now)
    assert all(0.0 <= hazard < 1.0 for hazard in model.hazards)
    for step in (-10, 0, 10):
        assert isfinite(model.index(step, age))
        assert model.index(step, age) >= 0.0
        assert len(model.table(step)) == NUM_INTERVALS
    for level in range(5):
        assert 0.0 <= model.probability((level,), age, within_s) <= 1.0


def prompt_of(*keys: str, size: int = 1) -> list[Mark]:
    """Marks with so many tokens between them."""
    return [Mark(number * size, key) for number, key in enumerate(keys, 1)]


class Notes(ReturnModel):
    """A model that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(num_features=NUM_FEATURES)
        self.begun: list[Silence] = []
        self.back: list[float] = []

    def begin(self, now: float, features: Features, weight: float = 1.0) -> Silence:
        self.begun.append(super().begin(now, features, weight))
        return self.begun[-1]

    def end(self, silence: Silence, now: float, share: float = 1.0) -> None:
        before = silence.returned
        super().end(silence, now, share)
        self.back.append(silence.returned - before)


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30),
    size=st.sampled_from([1, 300, 1000]),
)
def test_a_prompt_counts_once_however_it_is_shared(prompts: list[list[int]], size: int) -> None:
    """Its parts weigh one together, and never more than that comes back."""
    model = Notes()
    experience = Experience(model)
    for number, path in enumerate(prompts):
        prompt = prompt_of(*("".join(map(str, path[:end])) for end in range(1, len(path) + 1)), size=size)
        num_before = len(model.begun)
        experience.note_prompt(prompt, float(number))
        experience.note_answer(prompt, 1, 10, float(number))
        assert sum(part.weight for part in model.begun[num_before:]) == pytest.approx(1.0)
    assert all(-1e-9 <= silence.returned <= silence.weight + 1e-9 for silence in model.begun)
    assert all(share >= 0.0 for share in model.back)


def test_half_of_a_prompt_comes_back() -> None:
    model = Notes()
    experience = Experience(model)
    experience.note_answer(prompt_of("a", "b", "c", "d"), 1, 10, 0.0)
    experience.note_prompt(prompt_of("a", "b", "x"), 5.0)
    assert sum(model.back) == pytest.approx(0.5)


def test_a_prompt_may_be_cut_where_an_earlier_one_was_not() -> None:
    """Marks stand at every chunk and where a conversation was cut: the middle of what is known can be new."""
    model = Notes()
    experience = Experience(model)
    experience.note_answer(prompt_of("a", "c", "d"), 1, 10, 0.0)
    experience.note_prompt(prompt_of("a", "b", "c", "x"), 5.0)
    assert sum(model.back) == pytest.approx(1.0), "known up to c"
    experience.note_answer(prompt_of("a", "b", "c", "x"), 2, 10, 6.0)
    experience.note_prompt(prompt_of("a", "b", "y"), 7.0)
    assert sum(model.back) > 1.0


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30))
def test_what_comes_back_is_the_last_silence_of_every_token(prompts: list[list[int]]) -> None:
    """Against a table by token, which knows nothing of stretches."""
    model = Notes()
    experience = Experience(model)
    share_of: dict[str, float] = {}  # by prefix: what its last token weighs
    for number, path in enumerate(prompts):
        keys = ["".join(map(str, path[:end])) for end in range(1, len(path) + 1)]
        prompt, num_known = prompt_of(*keys), sum(key in share_of for key in keys)
        model.back.clear()
        experience.note_prompt(prompt, float(number))
        assert sum(model.back) == pytest.approx(sum(share_of.get(key, 0.0) for key in keys))
        experience.note_answer(prompt, 1, 10, float(number))
        stretches = [stretch for stretch in (keys[:num_known], keys[num_known:]) if stretch]
        for stretch in stretches:
            share_of.update(dict.fromkeys(stretch, 1.0 / len(stretches) / len(stretch)))


def test_the_next_turn_is_told_from_another_question() -> None:
    """A prompt that is longer by the last answer goes on from it; one that is not shares its beginning with it."""
    experience = Experience(ReturnModel(num_features=NUM_FEATURES))
    experience.note_answer(prompt_of("a", "b"), 1, 2, 0.0)
    assert experience.features(Facts("b", end=2)) == features_of(1, 2, 0, Standing.TALK, 2)
    experience.note_answer(prompt_of("a", "b", "answer", "c"), 2, 1, 1.0)
    assert experience.features(Facts("b", end=2)) == features_of(2, 1, 2, Standing.TALK, 2)
    assert experience.features(Facts("c", end=4)) == features_of(2, 1, 0, Standing.TALK, 2)
    experience.note_answer(prompt_of("a", "b", "question"), 1, 1, 2.0)
    assert experience.features(Facts("b", end=2)) == features_of(3, 1, 1, Standing.SHARED, 1)
    assert experience.features(Facts("question", end=3)) == features_of(1, 1, 0, Standing.OWN, 1)
    assert experience.features(Facts("c", end=4)) == features_of(2, 1, 0, Standing.TALK, 2), "as before"


def test_a_chunk_that_no_prompt_named_is_known_by_its_facts() -> None:
    experience = Experience(ReturnModel(num_features=NUM_FEATURES))
    facts = Facts("answer", end=4, turn=3, prompt_tokens=2, answer_tokens=2)
    assert experience.features(facts) == features_of(3, 2, 0, Standing.TALK, 2)
    assert experience.features(replace(facts, turn=1)) == features_of(1, 2, 0, Standing.TALK, 2)


def test_a_conversation_teaches_what_its_chunks_are_judged_by() -> None:
    """Its beginning, also where it was known before, counts for what is far from a prompt's end."""
    model = Notes()
    experience = Experience(model)
    first = prompt_of(*"abcdef", size=500)
    experience.note_answer(first, 1, 500, 0.0)
    experience.note_answer([*first, Mark(3500, "answer"), Mark(4000, "g")], 2, 10, 1.0)
    taught = {silence.features for silence in model.begun[-3:]}
    assert taught == {experience.features(Facts(key, end=end)) for key, end in [("c", 1500), ("f", 3000), ("g", 4000)]}


def test_a_document_teaches_as_a_whole() -> None:
    model = Notes()
    experience = Experience(model)
    experience.note_answer(prompt_of(*"abcdef", "question", size=500), 1, 10, 0.0)
    num_before = len(model.begun)
    experience.note_answer(prompt_of(*"abcdef", "another", size=500), 1, 10, 1.0)
    document, question = model.begun[num_before:]
    assert document.features == features_of(2, 10, 500, Standing.SHARED, 500)
    assert question.features == features_of(1, 10, 0, Standing.OWN, 500)


def test_the_question_behind_a_document_is_told_apart() -> None:
    """Every document comes back once, with another question."""
    model = ReturnModel(num_features=NUM_FEATURES)
    experience = Experience(model)
    for number in range(600):
        document = [f"document {number // 2} {part}" for part in range(8)]
        prompt = prompt_of(*document, f"question {number}", size=500)
        experience.note_prompt(prompt, 10.0 * number)
        experience.note_answer(prompt, 1, 10, 10.0 * number + 1.0)
    document_factor = model.factor(features_of(1, 10, 3000, Standing.TALK, 4500))
    assert document_factor > 3 * model.factor(features_of(1, 10, 0, Standing.OWN, 500))


class TestReturns(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Returns()

    def test_the_queue_is_protected_from_its_tail(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("head", next_use=(0, 1)))
        policy.add(DRAM, Facts("tail", next_use=(0, 9)))
        policy.add(DRAM, Facts("recent", last_used=8.0))
        policy.add(DRAM, Facts("old", last_used=2.0))
        assert list(policy.victims(DRAM, 4, OUTLOOK)) == ["old", "recent", "tail", "head"]

    def test_only_what_nobody_waits_for_may_be_dropped(self, policy: EvictionPolicy) -> None:
        assert [policy.may_drop(Facts("a"), position, OUTLOOK) for position in (None, 0, 10**6)] == [True, False, False]


def half_never_return(num_seconds: int = 3000) -> Trace:
    """Every second a session that asks once and gets a long answer, and one of 60 that come round with short ones."""
    requests: list[Request] = []
    for second in range(num_seconds):
        for session_id, output_tokens, at in ((second % 60, 10, 0.0), (1000 + second, 600, 0.5)):
            requests.append(
                Request(
                    request_id=len(requests),
                    session_id=session_id,
                    arrival_s=second + at,
                    input_tokens=1000,
                    output_tokens=output_tokens,
                )
            )
    return Trace(name="half never return", block_tokens=0, requests=tuple(requests))


def test_what_was_learned_beats_lru_where_half_of_the_sessions_never_return() -> None:
    trace = half_never_return()
    share = 80 * 1000 / (60 * 1010 + 3000 * 1600)  # 80 sessions: all that return, but not the 60 others in between
    lru, learned = (replay(trace, policy, share, level=Level.SESSION).hit_rate for policy in (Lru(), Returns()))
    assert lru < 0.05
    assert learned > 0.4, "of at most one half"


def test_what_is_forgotten_first_is_what_extends_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "MAX_PREFIXES", 10)
    model = Notes()
    experience = Experience(model)
    experience.note_answer(prompt_of(*(f"a{number}" for number in range(6))), 1, 10, 0.0)
    experience.note_answer(prompt_of(*(f"b{number}" for number in range(6))), 1, 10, 1.0)
    experience.note_prompt(prompt_of(*(f"a{number}" for number in range(6))), 2.0)
    assert sum(model.back) == pytest.approx(4 / 6), "the first four marks are still known"


def test_what_everybody_begins_with_stays_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "MAX_PREFIXES", 10)
    model = Notes()
    experience = Experience(model)
    for number in range(50):
        prompt = prompt_of(*(f"system {part}" for part in range(6)), f"message {number}")
        experience.note_prompt(prompt, float(number))
        experience.note_answer(prompt, 1, 10, number + 0.5)
    assert sum(model.back) == pytest.approx(6 / 7 + 48 / 2), "once part of what was new, then all that was known"


def test_another_attempt_at_a_turn_is_no_return() -> None:
    class Ear(Returns):
        num_prompts = 0

        def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
            self.num_prompts += 1

    policy = Ear()
    driver = Driver(eviction=policy)
    driver.join()
    driver.replica()
    for turn_id in ("s/1", "s/1", "s/2"):
        driver.submit(turn_id, text(1, 8))
    assert policy.num_prompts == 2
