"""Policies as plug-ins: finding one by its import path, and living with one that misbehaves."""

from __future__ import annotations

import inspect
import reprlib
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from policies.import_path import make

T = TypeVar("T")

MAX_OVERRUNS = 3  # of a verb: then the safe default decides in its place
FORGIVEN_AFTER = 1000  # answers in time in a row, after which earlier overruns count no more
MAX_TEXTS = 32
MAX_PROBLEM = 500  # characters

DEFAULT_TAKEN = "the safe default decided"


class PolicyError(RuntimeError):
    """A policy misbehaved, and that was to stop the run."""


def load_policy(kind: str, path: str) -> object:
    """The policy at "module:Class" or "file.py:Class", made with the options behind it: "module:Class(name=value)".

    ValueError says what is wrong and what to do.
    """
    try:
        return make(path)
    except ValueError as error:
        raise ValueError(f"{kind} policy {path!r}: {error}") from error


def require_verbs(kind: str, policy: object, verbs: tuple[str, ...]) -> None:
    """ValueError when the policy lacks a verb of its contract."""
    missing = [verb for verb in verbs if not callable(getattr(policy, verb, None))]
    if missing:
        raise ValueError(
            f"{kind} policy {type(policy).__qualname__} has no {', '.join(missing)}: "
            f"see the contract in policies/{'eviction/contract' if kind == 'eviction' else kind}.py"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFault:
    """A decision a policy did not make properly."""

    policy: str
    verb: str
    where: str  # file:line that raised, or where the verb is defined
    problem: str
    outcome: str

    def __str__(self) -> str:
        return f"{self.policy}.{self.verb} ({self.where}) {self.problem}; {self.outcome}"


@dataclass(slots=True)
class _Lateness:
    """Overruns of one verb that still count."""

    num_overruns: int = 0
    num_in_time: int = 0  # answers since


@dataclass(slots=True)
class Guard:
    """Consults policies. One that raises or answers nonsense is recorded, and the safe default decides instead.

    With a stopwatch (seconds; this file reads no clock) an answer that took longer than `limit_s` is recorded too, but
    used: it is there. A verb with MAX_OVERRUNS of them is benched, as `settle` says, when the event is over: from then
    on the safe default decides at once. A policy too slow in being told of its candidates is benched altogether, for
    it does not know them any more. A call that never returns cannot be stopped from here.

    When strict, the first fault raises PolicyError instead.
    """

    limit_s: float = 0.1
    is_strict: bool = False
    stopwatch: Callable[[], float] | None = None
    num_faults: Counter[str] = field(default_factory=Counter)  # by "Policy.verb"
    last_faults: deque[PolicyFault] = field(default_factory=lambda: deque(maxlen=MAX_TEXTS))
    benched: dict[str, None] = field(default_factory=dict)  # "module:Policy.verb", or "module:Policy" for all of it
    last_benched: tuple[str, ...] = ()  # by the latest event
    _late: dict[str, _Lateness] = field(init=False, default_factory=dict)  # by "module:Policy.verb"
    _to_bench: dict[str, None] = field(init=False, default_factory=dict)
    _firsts: dict[tuple[str, str, str], PolicyFault] = field(init=False, default_factory=dict)  # of each kind
    _counts: Counter[tuple[str, str, str]] = field(init=False, default_factory=Counter)

    def consult(
        self,
        policy: object,
        verb: str,
        ask: Callable[[], T],
        problem: Callable[[T], str | None],
        default: Callable[[], T],
    ) -> T:
        """The answer of `ask()` if `problem(answer)` is None, else `default()`. Foreign code: it may raise anything."""
        if self.benched and self._is_benched(policy, verb):
            return default()
        watch = self.stopwatch
        began = watch() if watch is not None else 0.0
        failure: BaseException | None = None
        try:
            answer = ask()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - must not stop a turn
            failure = error
        if watch is not None and ((took_s := watch() - began) > self.limit_s or self._late):
            self._check_time(policy, verb, took_s, is_told=default is _nothing)
        if failure is not None:
            self.note_raised(policy, verb, failure)
            return default()
        try:
            trouble = problem(answer)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the answer is foreign, too
            trouble, failure = f"answered {reprlib.repr(answer)}, which cannot be used ({_words(error)})", error
        if trouble is None:
            return answer
        self._note(policy, verb, trouble, failure)
        return default()

    def tell(self, policy: object, verb: str, tell: Callable[[], None]) -> None:
        """Tell a policy something; its raising is recorded."""
        self.consult(policy, verb, tell, _no_problem, _nothing)

    def note_raised(self, policy: object, verb: str, error: BaseException) -> None:
        """A fault: the policy raised. PolicyError when strict."""
        self._note(policy, verb, f"raised {_words(error)}", error)

    def texts(self) -> list[str]:
        """For people: the first fault of each kind, in the order in which they came, and how often there were such."""
        return [f"{fault} [{self._counts[kind]} times]" for kind, fault in self._firsts.items()]

    # --- too slow -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The event is over: what was too slow too often is benched, and `last_benched` says so.

        Not sooner, so that who replays the event needs to know only that it happened (see eventlog.py), not when.
        """
        if self._to_bench or self.last_benched:
            self.last_benched = tuple(self._to_bench)
            self.bench(self.last_benched)
            self._to_bench.clear()

    def bench(self, names: Iterable[str]) -> None:
        """From now on the safe default decides in place of these (named as in `benched`)."""
        self.benched.update(dict.fromkeys(names))

    def _is_benched(self, policy: object, verb: str) -> bool:
        name = _full_name(policy)
        return name in self.benched or f"{name}.{verb}" in self.benched

    def _check_time(self, policy: object, verb: str, took_s: float, *, is_told: bool) -> None:
        name = _full_name(policy)
        if took_s <= self.limit_s:
            self._forgive(f"{name}.{verb}")
            return
        late = self._late.setdefault(f"{name}.{verb}", _Lateness())
        late.num_overruns, late.num_in_time = late.num_overruns + 1, 0
        outcome = "let pass so far"
        if late.num_overruns >= MAX_OVERRUNS:
            self._to_bench[name if is_told else f"{name}.{verb}"] = None
            outcome = f"after {MAX_OVERRUNS} such answers the safe default decides from now on"
        problem = f"took {took_s:.3g} s, more than policy_limit_s = {self.limit_s:g} s"
        self._note(policy, verb, problem, outcome=outcome)

    def _forgive(self, name: str) -> None:
        late = self._late.get(name)
        if late is not None:
            late.num_in_time += 1
            if late.num_in_time >= FORGIVEN_AFTER:
                del self._late[name]

    # --- faults -------------------------------------------------------------------------------------------------------

    def _note(
        self, policy: object, verb: str, problem: str, error: BaseException | None = None, outcome: str = DEFAULT_TAKEN
    ) -> None:
        name, where = type(policy).__qualname__, _where(policy, verb, error)
        if self.is_strict:
            raise PolicyError(f"{name}.{verb} ({where}) {problem}") from error
        fault = PolicyFault(policy=name, verb=verb, where=where, problem=problem[:MAX_PROBLEM], outcome=outcome)
        self.num_faults[f"{name}.{verb}"] += 1
        self.last_faults.append(fault)
        kind = (f"{name}.{verb}", where, outcome)
        if kind in self._firsts or len(self._firsts) < MAX_TEXTS:
            self._firsts.setdefault(kind, fault)
            self._counts[kind] += 1


def _full_name(policy: object) -> str:
    return f"{type(policy).__module__}:{type(policy).__qualname__}"


def _no_problem(_answer: object) -> str | None:
    return None


def _nothing() -> None:
    return None


def _words(error: BaseException) -> str:
    """The exception's type and message, also of one that cannot print itself."""
    return traceback.format_exception_only(error)[-1].strip()


def _where(policy: object, verb: str, error: BaseException | None) -> str:
    """The innermost line of the policy's own modules that raised; for a wrong answer, where the verb is defined."""
    modules = {cls.__module__ for cls in type(policy).__mro__ if cls is not object}
    trace, place = error.__traceback__ if error is not None else None, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") in modules:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if place:
        return place
    code = getattr(inspect.unwrap(getattr(policy, verb)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(policy).__module__
