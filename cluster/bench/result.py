"""What a benchmark says: its set-up, a table, raw figures, targets that hold or not, and what limits it.

Knows no benchmark and prints nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A measure that should reach a bound. `value` None: it could not be measured here, `note` says why."""

    measure: str
    comparison: str
    """'>=' or '<='."""
    bound: float
    value: float | None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """None where there is no value."""
        return None if self.value is None else _COMPARISONS[self.comparison](self.value, self.bound)

    def as_json(self) -> dict[str, Any]:
        entry = {
            "measure": self.measure,
            "target": f"{self.comparison} {self.bound:g}",
            "value": self.value,
            "holds": self.holds,
        }
        return {**entry, "note": self.note} if self.note else entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of texts and numbers under a title; for people."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one benchmark."""

    name: str
    setup: Mapping[str, Any]
    """Model, dtype, threads, sizes, repeats, versions: what one must know to repeat it."""
    tables: Sequence[Table]
    figures: Mapping[str, Any]
    """Raw samples and derived numbers, JSON-ready; times in seconds, sizes in bytes."""
    targets: Sequence[Target] = ()
    limits: Sequence[str] = field(default_factory=tuple)
    """What bounds each figure on this machine, in sentences."""

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "setup": dict(self.setup),
            "figures": dict(self.figures),
            "targets": [target.as_json() for target in self.targets],
            "limits": list(self.limits),
        }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of pairs measured side by side: drift of a shared machine hits both of a pair."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))
