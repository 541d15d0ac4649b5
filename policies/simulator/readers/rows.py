"""Rows of a trace on their way to requests: every number checked, every fault named by file and row.

The rule for order: requests are put in the order of their arrival; rows that arrive at the same time stay in the order
of the file. After that, a request whose parent comes later is refused.

Knows no format.
"""

from __future__ import annotations

import math
from typing import Any

from policies.simulator.trace import Request, Trace, TraceError

MAX_ID = 2**63


class Rows:
    """Collects the requests of one file. Row numbers are 1-based."""

    def __init__(self, url: str, block_tokens: int) -> None:
        self.block_tokens = block_tokens  # 0: only lengths are known
        self._url = url
        self._rows: list[tuple[int, Request]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def fault(self, row: int, what: str, advice: str) -> TraceError:
        """To be raised."""
        return TraceError(f"{self._url}:{row}: {what}: {advice}")

    def count(self, row: int, name: str, value: object, minimum: int = 0) -> int:
        """A whole number of `minimum` or more; TraceError otherwise."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(row, f"{name} is {_shown(value)}", "it must be a whole number; mend or remove the row")
        if not minimum <= value < MAX_ID:
            raise self.fault(row, f"{name} is {value}", f"it must be {minimum} or more; mend or remove the row")
        return value

    def seconds(self, row: int, name: str, value: object) -> float:
        """A time of 0 or more (in the unit of the file); TraceError otherwise."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self.fault(row, f"{name} is {_shown(value)}", "it must be a number, 0 or more; mend the row")
        return float(value)

    def add(self, row: int, request: Request) -> None:
        """Its counts and times are checked already; its blocks are checked here against its length."""
        num_blocks, size = len(request.blocks), self.block_tokens
        fewest = request.input_tokens // size if size else 0
        most = -(-request.input_tokens // size) if size else 0
        if not fewest <= num_blocks <= most:
            what = f"{num_blocks} blocks of {size} tokens do not fit an input of {request.input_tokens} tokens"
            expected = f"{fewest}" if fewest == most else f"{fewest} (full ones) or {most}"
            raise self.fault(row, what, f"{expected} were expected; correct the block size or the row")
        self._rows.append((row, request))

    def trace(self, name: str) -> Trace:
        """All of it, in order. Raises TraceError: nothing there, an id twice, a parent missing or too late."""
        if not self._rows:
            raise TraceError(f"{self._url} has no requests: name a file with at least one")
        self._rows.sort(key=lambda pair: pair[1].arrival_s)
        row_of: dict[int, int] = {}
        for row, request in self._rows:
            if request.request_id in row_of:
                what = f"request_id {request.request_id} was already used in row {row_of[request.request_id]}"
                raise self.fault(row, what, "give every request its own")
            if request.parent is not None and request.parent not in row_of:
                raise self._orphan(row, request)
            row_of[request.request_id] = row
        requests = tuple(request for _, request in self._rows)
        return Trace(name=name, block_tokens=self.block_tokens, requests=requests)

    def _orphan(self, row: int, request: Request) -> TraceError:
        later = next((row for row, other in self._rows if other.request_id == request.parent), None)
        if later is None:
            advice = "name an earlier request, or -1 (null) for none; if rows were left out, leave out whole sessions"
            return self.fault(row, f"its parent, request {request.parent}, does not exist", advice)
        what = f"its parent, request {request.parent} in row {later}, arrives after it"
        return self.fault(row, what, "correct the arrivals, or put the parent first if they are equal")


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
