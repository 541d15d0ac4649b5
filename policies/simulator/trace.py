"""What the laboratory runs: requests of sessions, with the identity of their prompts block by block.

A block is a run of `block_tokens` prompt tokens, named by the hash of the whole prefix that ends with it: equal ids
mean equal prefixes. Knows no file format (see `readers/`) and no way of making traces (see `generators/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class TraceError(ValueError):
    """A trace cannot be used; the message names the file, the row, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One turn of a session. `parent` is the request_id of the turn before, or None."""

    request_id: int
    session_id: int
    arrival_s: float  # of the recording; a follow-up never starts before its parent ends
    input_tokens: int  # the whole prompt, history included
    output_tokens: int
    turn: int = 0
    parent: int | None = None
    think_s: float | None = None  # between the parent's end and this request; None: only the arrival is known
    blocks: Sequence[int] = ()  # of the input; a part-filled last one may be left out; empty: only lengths are known
    tenant: str = ""
    priority: int = 0  # lower is more urgent


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    block_tokens: int  # 0: only lengths are known
    requests: Sequence[Request]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def input_tokens(self) -> int:
        return sum(request.input_tokens for request in self.requests)

    @property
    def footprint_tokens(self) -> int:
        """Distinct tokens of all inputs: what a store that never evicts would hold of them."""
        if not self.block_tokens:
            return self.input_tokens
        return len({block for request in self.requests for block in request.blocks}) * self.block_tokens
