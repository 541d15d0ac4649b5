"""Results of our own batch jobs: `turns.jsonl`, one finished turn a line, as the batch command writes it.

Taken from it: the real token counts of prompts and answers, the session (`conversation_id`), when a turn was submitted
and how long it took. Turns that failed have no counts: they are left out, and the turn after one follows the one
before. Prompts are not recorded as blocks: only lengths are known (see `shaping.with_private_blocks`).

Where submission times were not recorded (0), conversations all begin at 0 and nobody thinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.simulator.readers.files import json_lines
from policies.simulator.readers.rows import Rows
from policies.simulator.trace import Request, Trace, TraceError

FILE = "turns.jsonl"


@dataclass(frozen=True, kw_only=True)
class BatchResults:
    """Reads the format above."""

    @staticmethod
    def recognises(head: bytes) -> bool:
        return head.lstrip().startswith(b"{") and b'"conversation_id"' in head and b'"prompt_tokens"' in head

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` turns that did not fail. Raises TraceError."""
        rows = Rows(url, block_tokens=0)
        turns: list[_Turn] = []
        num_failed = 0
        for row, line in json_lines(url):
            if line.get("error"):
                num_failed += 1
                continue
            turns.append(_turn(rows, row, line))
            if len(turns) == limit:
                break
        if num_failed and not turns:
            raise TraceError(f"{url} has only failed turns: name the results of a job that answered some")
        sessions = _Sessions(rows, min((turn.submitted_at for turn in turns if turn.submitted_at), default=0.0))
        for turn in sorted(turns, key=lambda turn: (turn.submitted_at, turn.turn)):
            rows.add(turn.row, sessions.request(turn))
        return rows.trace(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    row: int
    session: str
    turn: int
    prompt_tokens: int
    answer_tokens: int
    submitted_at: float  # unix time; 0: not recorded
    took_s: float

    @property
    def end_s(self) -> float:
        return self.submitted_at + self.took_s


def _turn(rows: Rows, row: int, line: dict[str, Any]) -> _Turn:
    session = line.get("conversation_id")
    if not isinstance(session, str | int):
        raise rows.fault(row, "no conversation_id", "every turn needs one; mend or remove the row")
    answer_ids = line.get("answer_token_ids")
    num_answer = line.get("answer_tokens", len(answer_ids) if isinstance(answer_ids, list) else None)
    return _Turn(
        row=row,
        session=str(session),
        turn=rows.count(row, "turn", line.get("turn")),
        prompt_tokens=rows.count(row, "prompt_tokens", line.get("prompt_tokens"), 1),
        answer_tokens=rows.count(row, "answer_tokens", num_answer),
        submitted_at=rows.seconds(row, "submitted_at", line.get("submitted_at", 0.0)),
        took_s=rows.seconds(row, "end_to_end_s", line.get("end_to_end_s", 0.0)),
    )


class _Sessions:
    """Makes requests of turns that come in the order of their submission, and of their number within a session."""

    def __init__(self, rows: Rows, begin: float) -> None:
        """`begin`: unix time of the first submission, from which arrivals count; 0: none was recorded."""
        self._rows, self._begin = rows, begin
        self._numbers: dict[str, int] = {}
        self._latest: dict[str, tuple[_Turn, Request]] = {}
        self._num_requests = 0

    def request(self, turn: _Turn) -> Request:
        parent_turn, parent = self._latest.get(turn.session, (None, None))
        if self._begin and not turn.submitted_at:
            advice = "record it for every turn or for none; mend or remove the row"
            raise self._rows.fault(turn.row, "submitted_at is missing, other turns have it", advice)
        if parent_turn is not None and parent_turn.turn >= turn.turn:
            what = f"turn {turn.turn} of {turn.session!r} comes after turn {parent_turn.turn} in row {parent_turn.row}"
            raise self._rows.fault(turn.row, what, "number turns as they were submitted, each once")
        arrival_s, think_s = turn.submitted_at - self._begin, None
        if parent_turn is not None and parent is not None:
            think_s = max(0.0, turn.submitted_at - parent_turn.end_s) if self._begin else 0.0
            arrival_s = arrival_s if self._begin else parent.arrival_s + parent_turn.took_s
        request = Request(
            request_id=self._num_requests,
            session_id=self._numbers.setdefault(turn.session, len(self._numbers)),
            arrival_s=arrival_s,
            input_tokens=turn.prompt_tokens,
            output_tokens=turn.answer_tokens,
            turn=turn.turn,
            parent=None if parent is None else parent.request_id,
            think_s=think_s,
        )
        self._num_requests += 1
        self._latest[turn.session] = (turn, request)
        return request
