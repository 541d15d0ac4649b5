"""The guard: faults have a file and a line, slow policies are replaced, and a strict run ends at the first fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from policies import messages as m
from policies.eviction import Lru
from policies.messages import SchedulerConfig
from policies.plugins import FORGIVEN_AFTER, MAX_OVERRUNS, MAX_TEXTS, Guard, PolicyError
from policies.scheduler import Scheduler
from tests.policies.driver import Driver, the
from tests.policies.texts import chunks_of, text


class Chooser:
    """A policy of one verb, which takes `took_s` by the watch below."""

    watch_s = 0.0
    took_s = 0.0

    def choose(self, number: int) -> int:
        Chooser.watch_s += self.took_s
        return self._divide(number)

    def _divide(self, number: int) -> int:
        return 100 // number  # the line that raises

    def tell(self) -> None:
        Chooser.watch_s += self.took_s


def line_of(verb: Callable[..., Any], more: int = 0) -> str:
    code = verb.__code__  # type: ignore[attr-defined]
    return f"{__file__}:{code.co_firstlineno + more}"


def ask(guard: Guard, policy: Chooser, number: int = 5) -> int:
    def problem(answer: int) -> str | None:
        return None if answer < 100 else f"answered {answer}, which is too much"

    return guard.consult(policy, "choose", lambda: policy.choose(number), problem, lambda: -1)


# --- which file, which line -------------------------------------------------------------------------------------------


def test_what_raised_is_named_by_its_line() -> None:
    guard = Guard()
    assert ask(guard, Chooser(), 0) == -1
    (line,) = guard.texts()
    assert line == (
        f"Chooser.choose ({line_of(Chooser._divide, 1)}) raised ZeroDivisionError: integer division or modulo by zero; "
        "the safe default decided [1 times]"
    )


def test_a_wrong_answer_is_named_by_the_definition_of_its_verb() -> None:
    guard = Guard()
    assert ask(guard, Chooser(), 1) == -1
    where = line_of(Chooser.choose)
    (line,) = guard.texts()
    assert line == f"Chooser.choose ({where}) answered 100, which is too much; the safe default decided [1 times]"


def test_an_inherited_verb_is_named_where_it_is() -> None:
    class Heir(Lru):
        def _rank(self, *_: Any) -> Any:
            return 1 // 0

    driver = Driver(eviction=Heir())
    driver.join(dram=200)
    driver.replica()
    driver.store(text(1, 4))
    fault = driver.scheduler.board.guard.last_faults[0]
    assert (fault.verb, fault.where) == ("add", line_of(Heir._rank, 1))


def test_a_verb_that_cannot_be_called_is_named_by_its_definition() -> None:
    class Narrow:
        def choose(self) -> str:
            return "r1"

    driver = Driver(placement=Narrow())  # type: ignore[arg-type]
    driver.replica()
    the(driver.submit("a/1", text(1, 4)), m.Dispatch)
    fault = driver.scheduler.board.guard.last_faults[0]
    assert fault.where == line_of(Narrow.choose)
    assert "raised TypeError" in fault.problem


def test_an_answer_that_raises_when_it_is_looked_at() -> None:
    class Lazy(Lru):
        def victims(self, *_: Any) -> Any:
            return self._generate()

        def _generate(self) -> Iterator[str]:
            yield str(1 // 0)

    guard = Guard()
    lazy = Lazy()
    answer = guard.consult(lazy, "victims", lazy.victims, lambda keys: str(list(keys)), lambda: ["default"])
    assert answer == ["default"]
    assert guard.last_faults[0].where == line_of(Lazy._generate, 1)
    assert "which cannot be used (ZeroDivisionError" in guard.last_faults[0].problem


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Secretive:
    def __repr__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("answer", [Secretive(), UnspeakableError()])
def test_what_cannot_be_printed_stops_nothing(answer: Any) -> None:
    def choose() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    guard = Guard()
    assert guard.consult(Chooser(), "choose", choose, lambda got: f"answered {got!r}", lambda: 7) == 7
    assert guard.num_faults == {"Chooser.choose": 1}


def test_texts_name_each_kind_once() -> None:
    guard = Guard()
    for number in (0, 1, 0, 1, 1):
        ask(guard, Chooser(), number)
    assert [line.rpartition(" [")[2] for line in guard.texts()] == ["2 times]", "3 times]"]
    assert guard.num_faults == {"Chooser.choose": 5}


def test_texts_are_bounded() -> None:
    guard = Guard()
    for number in range(2 * MAX_TEXTS):
        policy = type(f"P{number}", (Chooser,), {})()
        guard.consult(policy, "choose", lambda: 0, lambda _: "wrong" * 1000, lambda: 1)
    assert len(guard.texts()) == len(guard.last_faults) == MAX_TEXTS
    assert all(len(line) < 1000 for line in guard.texts())
    assert guard.num_faults.total() == 2 * MAX_TEXTS


# --- too slow ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy() -> Chooser:
    return Chooser()


@pytest.fixture
def guard() -> Guard:
    return Guard(limit_s=0.5, stopwatch=lambda: Chooser.watch_s)


def test_a_slow_answer_is_a_fault_but_counts(guard: Guard, policy: Chooser) -> None:
    policy.took_s = 0.75
    assert ask(guard, policy) == 20
    assert guard.texts() == [
        f"Chooser.choose ({line_of(Chooser.choose)}) took 0.75 s, more than policy_limit_s = 0.5 s; "
        "let pass so far [1 times]"
    ]
    policy.took_s = 0.5
    assert ask(guard, policy) == 20
    assert guard.num_faults.total() == 1


def test_after_some_slow_answers_the_default_decides(guard: Guard, policy: Chooser) -> None:
    policy.took_s = 0.75
    for _ in range(MAX_OVERRUNS):
        assert ask(guard, policy) == 20
    assert ask(guard, policy) == 20, "until the event is over"
    guard.settle()
    assert guard.last_benched == (f"{__name__}:Chooser.choose",)
    before = Chooser.watch_s
    assert [ask(guard, policy) for _ in range(5)] == [-1] * 5
    assert Chooser.watch_s == before, "it is not even asked"
    assert "the safe default decides from now on" in guard.texts()[-1]
    guard.settle()
    assert guard.last_benched == ()
    guard.tell(policy, "tell", policy.tell)
    assert Chooser.watch_s > before, "its other verbs are"


def test_a_policy_that_is_slow_to_be_told_is_not_asked_either(guard: Guard, policy: Chooser) -> None:
    policy.took_s = 0.75
    for _ in range(MAX_OVERRUNS):
        guard.tell(policy, "tell", policy.tell)
    guard.settle()
    assert guard.last_benched == (f"{__name__}:Chooser",)
    assert ask(guard, policy) == -1


def test_rare_pauses_are_forgiven(guard: Guard, policy: Chooser) -> None:
    for _ in range(2 * MAX_OVERRUNS):
        policy.took_s = 0.75
        ask(guard, policy)
        policy.took_s = 0.0
        for _ in range(FORGIVEN_AFTER):
            ask(guard, policy)
    guard.settle()
    assert not guard.benched
    for _ in range(MAX_OVERRUNS):
        policy.took_s = 0.75
        ask(guard, policy)
        policy.took_s = 0.0
        for _ in range(FORGIVEN_AFTER - 1):
            ask(guard, policy)
    guard.settle()
    assert guard.benched


def test_without_a_stopwatch_time_is_no_matter(policy: Chooser) -> None:
    guard, policy.took_s = Guard(limit_s=1e-9), 1e9
    assert [ask(guard, policy) for _ in range(5)] == [20] * 5
    assert not guard.num_faults


def test_a_slow_policy_that_raises_has_two_faults(guard: Guard, policy: Chooser) -> None:
    policy.took_s = 0.75
    assert ask(guard, policy, 0) == -1
    assert guard.num_faults.total() == 2


def test_a_slow_policy_in_a_scheduler() -> None:
    class Slow:
        now = 0.0

        def admit(self, offer: Any, outlook: Any) -> bool:
            Slow.now += 1.0
            return False

    driver = Driver()
    driver.scheduler = Scheduler(SchedulerConfig(policy_limit_s=0.9), admission=Slow(), stopwatch=lambda: Slow.now)
    driver.join()
    driver.replica()
    answers = [the(driver.offer(chunks_of(text(number, 4))), m.Decline | m.Save) for number in range(5)]  # type: ignore[arg-type]
    assert [type(answer) for answer in answers] == [m.Decline] * MAX_OVERRUNS + [m.Save] * (5 - MAX_OVERRUNS)
    assert driver.figures["policy_faults"] == {f"{Slow.__qualname__}.admit": MAX_OVERRUNS}


# --- strict -----------------------------------------------------------------------------------------------------------


def test_strict_ends_the_run_at_the_first_fault() -> None:
    class Odd:
        def admit(self, offer: Any, outlook: Any) -> bool:
            return None  # type: ignore[return-value]

    driver = Driver(SchedulerConfig(strict_policies=True), admission=Odd())
    driver.join()
    driver.replica()
    with pytest.raises(PolicyError, match=r"Odd\.admit \(.*test_guard\.py:\d+\) answered None, not True or False"):
        driver.offer(chunks_of(text(1, 4)))


def test_strict_names_its_cause() -> None:
    with pytest.raises(PolicyError, match=r"_guard\.py:\d+\) raised ZeroDivisionError") as caught:
        ask(Guard(is_strict=True), Chooser(), 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_strict_about_time(policy: Chooser) -> None:
    policy.took_s = 0.75
    with pytest.raises(PolicyError, match=r"took 0\.75 s, more than policy_limit_s"):
        ask(Guard(limit_s=0.5, is_strict=True, stopwatch=lambda: Chooser.watch_s), policy)
