"""The policy of the scheduler orders an engine's HBM, and a bad one stops nothing."""

from __future__ import annotations

import pytest

from actors.engine.params import SamplingParams
from actors.hbm_eviction import HbmEviction
from tests.engine.harness import Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


class Backwards:
    """The newest goes first."""

    def __init__(self) -> None:
        self.keys: dict[str, float] = {}

    def add(self, place: object, chunk: object) -> None:
        self.keys[chunk.key] = chunk.last_used  # type: ignore[attr-defined]

    def remove(self, place: object, key: str, *, evicted: bool) -> None:
        del self.keys[key]

    def victims(self, place: object, count: int, outlook: object) -> list[str]:
        return sorted(self.keys, key=lambda key: -self.keys[key])[:count]


class Broken(Backwards):
    def victims(self, place: object, count: int, outlook: object) -> list[str]:
        raise RuntimeError("no idea")


def _after_pressure(eviction: HbmEviction) -> dict[str, int]:
    """Two finished turns fill the pool, a third pushes one out: chunks left of each."""
    owner = Owner(make_engine(loaded("llama"), kv_tokens=128, keep_finished=True, eviction=eviction))
    prompts = {name: random_prompt(48, seed) for seed, name in enumerate(("old", "new"), 50)}
    for name, prompt in {**prompts, "third": random_prompt(60, 60)}.items():
        owner.add(name, prompt, ONE)
        owner.run()
    kept = owner.engine._kept
    assert kept is not None
    left = {name: sum(s.key in kept for s in owner.store.plan(prompt)) for name, prompt in prompts.items()}
    owner.add("again", prompts["old"], ONE)
    assert owner.run()["again"].token_ids == stock_answer("llama", prompts["old"], 1)
    return left


def test_the_policy_says_who_goes() -> None:
    lru = _after_pressure(HbmEviction("policies.eviction:Lru"))
    backwards = _after_pressure(HbmEviction(f"{__name__}:Backwards"))
    assert lru["new"] > lru["old"]
    assert backwards["old"] > backwards["new"]


def test_a_policy_that_raises_is_recorded_and_stops_nothing() -> None:
    eviction = HbmEviction(f"{__name__}:Broken")
    _after_pressure(eviction)
    assert eviction.num_faults > 0


def test_a_policy_without_the_verbs_is_refused() -> None:
    with pytest.raises(ValueError, match="has no add"):
        HbmEviction("policies.prefetch:Off")


class Speechless(Backwards):
    def victims(self, place: object, count: int, outlook: object) -> None:  # type: ignore[override]
        return None


def test_a_policy_that_answers_nonsense_is_recorded_and_stops_nothing() -> None:
    eviction = HbmEviction(f"{__name__}:Speechless")
    _after_pressure(eviction)
    assert eviction.num_faults > 0
