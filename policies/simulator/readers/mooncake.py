"""Mooncake's traces (FAST '25; github.com/kvcache-ai/Mooncake, FAST25-release/traces): one JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ..., 2353, 2354]}

`timestamp` in milliseconds from the start; `hash_ids` name prefixes of 512 tokens each, the last one part-filled.

Sessions are not recorded, they are inferred: the parent of a request is the earlier one with the longest prompt whose
full blocks are a prefix of this one's blocks, of equal ones the latest. A single full block in common is a system
prompt and no conversation (most of the public chat trace begins with block 0), hence `min_shared_blocks`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from policies.simulator.laws import at_least
from policies.simulator.readers.files import json_lines
from policies.simulator.readers.rows import Rows
from policies.simulator.trace import Request, Trace

MS_PER_S = 1000


@dataclass(frozen=True, kw_only=True)
class Mooncake:
    """Reads the format above."""

    block_tokens: int = 512
    """Tokens a block, which the file does not tell."""
    min_shared_blocks: int = 2
    """Full blocks a parent has at least."""

    def __post_init__(self) -> None:
        at_least(1, block_tokens=self.block_tokens, min_shared_blocks=self.min_shared_blocks)

    @staticmethod
    def recognises(head: bytes) -> bool:
        return head.lstrip().startswith(b"{") and b'"hash_ids"' in head and b'"input_length"' in head

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` lines. Raises TraceError."""
        rows = Rows(url, self.block_tokens)
        found: list[tuple[int, float, dict[str, Any]]] = []
        for number, line in json_lines(url):
            found.append((number, rows.seconds(number, "timestamp", line.get("timestamp")) / MS_PER_S, line))
            if len(found) == limit:
                break
        sessions = _Sessions(self.block_tokens, self.min_shared_blocks)
        for number, arrival_s, line in sorted(found, key=lambda row: row[1]):
            blocks = _blocks(rows, number, line.get("hash_ids"))
            num_input = rows.count(number, "input_length", line.get("input_length"), 1)
            num_output = rows.count(number, "output_length", line.get("output_length"))
            rows.add(number, sessions.request(arrival_s, num_input, num_output, blocks))
        return rows.trace(name)


@dataclass(slots=True)
class _Sessions:
    """Finds parents. Ids name whole prefixes, so the last full block of a prompt names all its full blocks."""

    block_tokens: int
    min_shared_blocks: int
    _requests: list[Request] = field(default_factory=list)
    _latest: dict[int, Request] = field(default_factory=dict)  # by their last full block

    def request(self, arrival_s: float, input_tokens: int, output_tokens: int, blocks: array[int]) -> Request:
        """Of requests in the order of their arrival, the next one."""
        number = len(self._requests)
        parent = self._parent(blocks)
        request = Request(
            request_id=number,
            session_id=number if parent is None else parent.session_id,
            arrival_s=arrival_s,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            turn=0 if parent is None else parent.turn + 1,
            parent=None if parent is None else parent.request_id,
            blocks=blocks,
        )
        self._requests.append(request)
        num_full = input_tokens // self.block_tokens
        if self.min_shared_blocks <= num_full <= len(blocks):
            self._latest[blocks[num_full - 1]] = request
        return request

    def _parent(self, blocks: array[int]) -> Request | None:
        known = (self._latest.get(block) for block in reversed(blocks))
        return next((request for request in known if request is not None), None)


def _blocks(rows: Rows, row: int, ids: object) -> array[int]:
    try:
        return array("q", ids if isinstance(ids, list) else [None])
    except (TypeError, OverflowError):
        advice = "it must be a list of whole numbers below 2**63, one per block; mend or remove the row"
        raise rows.fault(row, "hash_ids is not a list of block ids", advice) from None
