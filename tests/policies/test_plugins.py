"""Policies as plug-ins: found by path, checked at the door, and replaced by the default where they misbehave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from policies import messages as m
from policies.eviction import Lru
from policies.messages import SchedulerConfig
from policies.plugins import load_policy
from policies.scheduler import Scheduler
from tests.policies.driver import Driver, only, the
from tests.policies.texts import chunks_of, key_of, text

A, B, D, E = text(1, 4), text(2, 4), text(3, 4), text(4, 4)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("Lru", 'write "module:Class"'),
        ("policies.eviction:", 'write "module:Class"'),
        (":Lru", 'write "module:Class"'),
        ("policies.nowhere:Lru", "cannot be imported"),
        ("policies.eviction:Mru", "has no class 'Mru'"),
        ("policies.eviction:contract", "has no class"),
        ("policies.queue:SortedKeys", "has no add|has no remove|has no victims"),
        (
            "policies.places:Account",
            r"missing a required argument: 'budget_bytes'.*it accepts: budget_bytes, bytes_per_s",
        ),
    ],
)
def test_a_bad_path_says_what_to_do(path: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Scheduler(SchedulerConfig(eviction=path))


def test_the_advice_names_the_classes_there_are() -> None:
    with pytest.raises(ValueError, match=r"Fifo.*LookAhead.*Lru"):
        load_policy("eviction", "policies.eviction:Mru")


def test_an_object_without_the_verbs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no choose: see the contract in policies/placement.py"):
        Scheduler(placement=object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"low_watermark": 0.995},
        {"low_watermark": 0.0},
        {"high_watermark": 1.5},
        {"answer_reserve": -0.1},
        {"answer_reserve": 1.1},
        {"lease_s": 0.0},
        {"retry_s": float("nan")},
        {"ghosts": 0},
        {"max_fetches_in_flight": 0},
        {"max_pending_offers": 0},
        {"network_bytes_per_s": 0.0},
        {"policy_limit_s": 0.0},
    ],
    ids=str,
)
def test_a_wrong_setting_says_what_to_choose(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choose"):
        SchedulerConfig(**wrong)


def faults(driver: Driver) -> dict[str, int]:
    """Faults by "Policy.verb", also of policies defined inside a test."""
    counts: dict[str, int] = driver.figures["policy_faults"]
    return {name.rpartition("<locals>.")[2]: count for name, count in counts.items()}


def first_line(policy: type[Lru]) -> int:
    return policy.victims.__code__.co_firstlineno


# --- eviction ---------------------------------------------------------------------------------------------------------


class Raises(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        raise RuntimeError("a bug")


class NamesStrangers(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        return ["nobody"] * count


class NamesLeased(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        return [key_of(A), *super().victims(place, count, outlook)[1:]]


class NamesTooFew(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        return []


class NamesOneTwice(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        return [*super().victims(place, 1, outlook)] * count


class AnswersNone(Lru):
    def victims(self, place: Any, count: int, outlook: Any) -> Sequence[str]:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("policy", [Raises, NamesStrangers, NamesLeased, NamesTooFew, NamesOneTwice, AnswersNone])
def test_a_misbehaving_eviction_policy_is_named_and_the_oldest_candidate_goes(policy: type[Lru]) -> None:
    driver = Driver(SchedulerConfig(write_through=False, low_watermark=0.6), eviction=policy())
    driver.join(dram=200)
    driver.replica()
    for tokens in (A, B, D, E):
        driver.store(tokens)
    driver.submit("a/1", A)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert [drop.chunk for drop in only(heard, m.Drop)] == [key_of(B), key_of(D)]
    assert faults(driver)[f"{policy.__name__}.victims"] >= 1
    fault = driver.scheduler.board.guard.last_faults[-1]
    assert fault.problem
    assert fault.where == f"{__file__}:{first_line(policy) + (policy is Raises)}", (
        "what raised, or the verb's definition"
    )
    assert [str(fault) in line for line in driver.figures["policy_fault_texts"]][-1]


def test_a_policy_that_raises_when_told_is_named() -> None:
    class Deaf(Lru):
        def add(self, place: Any, chunk: Any) -> None:
            raise KeyError("add")

        def remove(self, place: Any, key: str, *, evicted: bool) -> None:
            raise KeyError("remove")

    driver = Driver(SchedulerConfig(write_through=False, low_watermark=0.6), eviction=Deaf())
    driver.join(dram=200)
    driver.replica()
    for tokens in (A, B, D, E, text(5, 4)):
        driver.store(tokens)
    assert driver.figures["tiers"]["n1/dram"]["used_bytes"] <= 180
    assert set(faults(driver)) == {"Deaf.add", "Deaf.remove", "Deaf.victims"}


@pytest.mark.parametrize("answer", [None, 1, "yes"])
def test_a_policy_that_cannot_say_whether_to_drop_drops_what_nobody_needs(answer: object) -> None:
    class Vague(Lru):
        def may_drop(self, chunk: Any, position: int | None, outlook: Any) -> bool:
            return answer  # type: ignore[return-value]

    driver = Driver(SchedulerConfig(write_through=False, low_watermark=0.6), eviction=Vague())
    driver.join(dram=200)
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    for tokens in (A, B, D, E):
        driver.store(tokens)
    driver.submit("a/1", A)
    heard = driver.obey(driver.offer(chunks_of(text(5, 4))))
    assert [drop.chunk for drop in only(heard, m.Drop)] == [key_of(B), key_of(D)]


# --- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["r9", None, ValueError("a bug")])
def test_a_misbehaving_placement_policy(answer: object) -> None:
    class Odd:
        def choose(self, turn: Any, options: Any) -> str:
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[return-value]

    driver = Driver(placement=Odd())
    driver.replica("r1")
    driver.replica("r2")
    chosen = {the(driver.submit(f"{number}/1", A), m.Dispatch).replica_id for number in range(2)}
    assert chosen == {"r1", "r2"}, "the least loaded one"
    assert faults(driver)["Odd.choose"] == 2


@pytest.mark.parametrize("answer", [None, "no", ValueError("a bug")])
def test_a_misbehaving_admission_policy_saves(answer: object) -> None:
    class Odd:
        def admit(self, offer: Any, outlook: Any) -> bool:
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[return-value]

    driver = Driver(admission=Odd())
    driver.join()
    driver.replica()
    assert len(the(driver.offer(chunks_of(A)), m.Save).chunks) == 1
    assert faults(driver)["Odd.admit"] == 1


@pytest.mark.parametrize("window", [None, "all", ValueError("a bug")])
def test_a_misbehaving_prefetch_window_means_none(window: object) -> None:
    class Odd:
        def window(self, outlook: Any) -> int:
            if isinstance(window, Exception):
                raise window
            return window  # type: ignore[return-value]

        def choose(self, needs: Any) -> Any:
            return needs

    assert _prefetched(Odd()) == []


@pytest.mark.parametrize("needs", [("strangers",), None, ValueError("a bug")])
def test_a_misbehaving_prefetch_choice_means_all(needs: object) -> None:
    class Odd:
        def window(self, outlook: Any) -> int:
            return 5

        def choose(self, offered: Any) -> Any:
            if isinstance(needs, Exception):
                raise needs
            return needs

    assert _prefetched(Odd()) == [key_of(A)]


def _prefetched(policy: Any) -> list[str]:
    driver = Driver(prefetch=policy)
    driver.join(ssd=1000, inventory=[(info, m.Tier.SSD) for info in chunks_of(A)])
    driver.replica(slots=1)
    driver.submit("x/1", text(9, 4), reuse=False)
    fetches = only(driver.submit("a/1", A), m.Fetch)
    assert faults(driver)
    return [fetch.chunk for fetch in fetches]
