"""Names people type: policies and sizes.

Lru                       policies.eviction:Lru                  64GiB    bytes
my/policy.py:Mine(n=5)    as it stands, see docs/plug-ins.md     1Mtok    tokens of KV
                                                                 5%       of the trace's footprint
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from policies.messages import SchedulerConfig
from policies.scheduler import Scheduler
from policies.simulator.lab.errors import LabError
from policies.simulator.simulation import POLICY_KINDS

DEFAULT_EVICTION = SchedulerConfig().eviction
LRU = "policies.eviction:Lru"
ORACLE = "oracle"
"""Stands in the place of an eviction policy; no import path is the same."""


def policy_path(kind: str, text: str) -> str:
    """The import path that `text` stands for, tried out: LabError if there is none, or it lacks a verb."""
    path = text if ":" in text.partition("(")[0] else f"policies.{kind}:{text}"
    named: dict[str, Any] = {kind: path}
    try:
        Scheduler(replace(SchedulerConfig(), **named))
    except ValueError as error:
        raise LabError(str(error)) from None
    return path


def short_name(path: str) -> str:
    """For tables: without the home of our own policies, files without their folders."""
    for kind in POLICY_KINDS:
        path = path.removeprefix(f"policies.{kind}:")
    source, colon, name = path.partition(":")
    return f"{source.rpartition('/')[2]}{colon}{name}"


def checked_policies(given: Mapping[str, str | None]) -> dict[str, str]:
    """Import paths by kind, without those that are not given."""
    return {kind: policy_path(kind, text) for kind, text in given.items() if text}


@dataclass(frozen=True)
class Size:
    """An amount of KV."""

    amount: float
    unit: str
    """"bytes", "tokens" or "share" (of a trace's footprint, 1 for all of it)."""

    def in_bytes(self, bytes_per_token: float, footprint_tokens: int) -> float:
        if self.unit == "bytes":
            return self.amount
        return bytes_per_token * self.amount * (footprint_tokens if self.unit == "share" else 1)


_SIZE = re.compile(r"(?P<number>[\d.]+(?:e\d+)?)\s*(?P<scale>[kmgt]?i?)(?P<unit>%|b|tok|tokens?|)", re.IGNORECASE)
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


def parse_size(what: str, text: str) -> Size:
    """64GiB, 500MB, 1e9 (bytes), 1Mtok (tokens), 5% (of the footprint); LabError names `what`."""
    found = _SIZE.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        amount = float(found["number"]) * _SCALES[found["scale"].lower()]
        if not math.isfinite(amount):
            raise ValueError
    except (ValueError, KeyError):
        raise LabError(f"{what} is {text!r}: write bytes (64GiB), tokens (1Mtok) or a share (5%)") from None
    unit = found["unit"].lower()
    if unit == "%":
        return Size(amount / 100, "share")
    return Size(amount, "tokens" if unit.startswith("tok") else "bytes")


def parse_numbers(what: str, text: str, highest: float = math.inf) -> list[float]:
    """Numbers above 0 with commas in between, each once, ascending; LabError names `what`."""
    try:
        numbers = sorted({float(part.strip().removesuffix("%")) for part in text.split(",")})
    except ValueError:
        raise LabError(f"{what} is {text!r}: write numbers with commas in between, for example 1,2.5,10") from None
    for number in numbers:
        if not 0 < number <= highest or not math.isfinite(number):
            limit = f"up to {highest:g}" if math.isfinite(highest) else "and finite"
            raise LabError(f"{what} has {number:g}: choose numbers above 0 {limit}")
    return numbers
