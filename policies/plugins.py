"""Policies as plug-ins: finding one by its import path, and living with one that misbehaves."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


def load_policy(kind: str, path: str) -> object:
    """An instance of the class at "module:Class", made without arguments; ValueError says what to do otherwise."""
    advice = f'{kind} policy {path!r}: write "module:Class", for example "policies.eviction:Lru"'
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        raise ValueError(advice)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{advice}; module {module_name!r} cannot be imported here ({error})") from error
    factory = getattr(module, class_name, None)
    if not isinstance(factory, type):
        known = ", ".join(sorted(name for name, value in vars(module).items() if isinstance(value, type)))
        raise ValueError(f"{advice}; {module_name!r} has no class {class_name!r}, it has: {known}")  # noqa: TRY004
    try:
        policy: object = factory()
    except TypeError as error:
        raise ValueError(f"{advice}; {class_name} must be made without arguments ({error})") from error
    return policy


def require_verbs(kind: str, policy: object, verbs: tuple[str, ...]) -> None:
    """ValueError when the policy lacks a verb of its contract."""
    missing = [verb for verb in verbs if not callable(getattr(policy, verb, None))]
    if missing:
        raise ValueError(
            f"{kind} policy {type(policy).__qualname__} has no {', '.join(missing)}: "
            f"see the contract in policies/{kind}.py"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFault:
    """A decision a policy did not make properly; the safe default was taken."""

    policy: str
    verb: str
    problem: str


@dataclass(slots=True)
class Guard:
    """Consults policies. One that raises or answers nonsense is recorded, and the safe default decides instead."""

    num_faults: Counter[str] = field(default_factory=Counter)  # by "Policy.verb"
    last_faults: deque[PolicyFault] = field(default_factory=lambda: deque(maxlen=32))

    def consult(
        self,
        policy: object,
        verb: str,
        ask: Callable[[], T],
        problem: Callable[[T], str | None],
        default: Callable[[], T],
    ) -> T:
        """The answer of `ask()` if `problem(answer)` is None, else `default()`."""
        try:
            answer = ask()
            trouble = problem(answer)
        except Exception as error:  # noqa: BLE001 - foreign code decides here; whatever it raises must not stop a turn
            trouble = f"raised {type(error).__name__}: {error}"
        if trouble is None:
            return answer
        name = type(policy).__qualname__
        self.num_faults[f"{name}.{verb}"] += 1
        self.last_faults.append(PolicyFault(policy=name, verb=verb, problem=trouble))
        return default()

    def tell(self, policy: object, verb: str, tell: Callable[[], None]) -> None:
        """Tell a policy something; its raising is recorded."""
        self.consult(policy, verb, tell, lambda _answer: None, lambda: None)
