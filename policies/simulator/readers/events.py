"""Our own event logs (`policies/eventlog.py`): what a running scheduler heard becomes a trace.

    TurnSubmitted   a request: when, and its prompt as marks; a turn id that comes again is a new attempt, not a request
    TurnFinished    when it ended: a later turn of the session follows it, after the time between as think time
    ChunksReady     how far its KV reached, which tells the length of the answer (its last token has no KV)

Blocks: the marks at multiples of `block_tokens`, and the prompt's end; an id is the key hashed to 63 bits. Answers
whose chunks are not in the log are taken to be as long as allowed, or as the follow-up leaves room for. Lives of the
scheduler (a log may hold several) come one after the other as the wall clock had them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from policies.eventlog import Entry, Header, read_lines
from policies.messages import ChunksReady, Event, Turn, TurnCancelled, TurnFinished, TurnSubmitted
from policies.simulator.laws import at_least
from policies.simulator.readers.files import opened
from policies.simulator.readers.rows import Rows
from policies.simulator.trace import Request, Trace, TraceError


@dataclass(frozen=True, kw_only=True)
class Events:
    """Reads the format above."""

    block_tokens: int = 0
    """The chunk size of the recorded system; 0: found out from the marks."""

    def __post_init__(self) -> None:
        at_least(0, block_tokens=self.block_tokens)

    @staticmethod
    def recognises(head: bytes) -> bool:
        return head.lstrip().startswith(b'{"event_log"')

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` turns; the whole log is read, for their ends. Raises TraceError."""
        heard = _Heard()
        for row, now, event in _events(url):
            heard.note(row, now, event)
        rows = Rows(url, self.block_tokens or _found_block_tokens(url, heard))
        for number, turn in enumerate(heard.turns[:limit]):
            turn.number = number
            rows.add(turn.row, _request(rows, turn, heard.turns[0].submitted_s))
        return rows.trace(name)


@dataclass(slots=True)
class _HeardTurn:
    row: int
    submitted_s: float
    turn: Turn
    session: int
    parent: _HeardTurn | None
    ended_s: float | None = None
    num_computed: int = 0  # tokens whose KV was offered
    max_output: int = 0
    number: int = 0
    depth: int = 0

    @property
    def output_tokens(self) -> int:
        num_output = self.num_computed - self.turn.num_prompt_tokens + 1
        return num_output if 0 < num_output <= self.max_output else self.max_output


@dataclass(slots=True)
class _Heard:
    """Turns in the order of their submission."""

    turns: list[_HeardTurn] = field(default_factory=list)
    max_chunk_tokens: int = 0
    _by_id: dict[str, _HeardTurn] = field(default_factory=dict)
    _sessions: dict[str, list[_HeardTurn]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def note(self, row: int, now: float, event: Event) -> None:
        match event:
            case TurnSubmitted(turn=turn):
                if turn.turn_id not in self._by_id:
                    self._submitted(row, now, turn)
            case TurnFinished(turn_id=turn_id) | TurnCancelled(turn_id=turn_id):
                if turn_id in self._by_id:
                    self._by_id[turn_id].ended_s = now
            case ChunksReady(session_id=session_id, chunks=chunks):
                self.max_chunk_tokens = max([self.max_chunk_tokens, *(chunk.end - chunk.start for chunk in chunks)])
                for latest in self._sessions.get(session_id, [])[-1:]:
                    latest.num_computed = max([latest.num_computed, *(chunk.end for chunk in chunks)])

    def _submitted(self, row: int, now: float, turn: Turn) -> None:
        earlier = self._sessions.setdefault(turn.session_id, [])
        parent = next((before for before in reversed(earlier) if before.ended_s is not None), None)
        heard = _HeardTurn(row, now, turn, self._numbers.setdefault(turn.session_id, len(self._numbers)), parent)
        heard.max_output = turn.max_new_tokens
        if parent is not None:
            heard.depth = parent.depth + 1
            num_more = turn.num_prompt_tokens - parent.turn.num_prompt_tokens
            if num_more > 0:
                parent.max_output = min(parent.max_output, num_more)
        earlier.append(heard)
        self._by_id[turn.turn_id] = heard
        self.turns.append(heard)


def _events(url: str) -> Iterator[tuple[int, float, Event]]:
    """(line number, seconds on one clock for all lives, event)"""
    began_s = last_s = 0.0
    first_now: float | None = None
    with opened(url) as stream:
        records = read_lines(stream, url)
        while True:
            try:
                row, record = next(records)
            except StopIteration:
                return
            except ValueError as error:
                raise TraceError(" ".join(str(error).split())) from None
            if isinstance(record, Header):
                began_s, first_now = max(record.began_unix_s, last_s), None
            elif isinstance(record, Entry):
                first_now = record.now if first_now is None else first_now
                last_s = began_s + record.now - first_now
                yield row, last_s, record.event


def _found_block_tokens(url: str, heard: _Heard) -> int:
    """The smallest distance at whose multiples every prompt has a mark; no chunk is longer than it."""
    if not heard.turns:
        return 0
    ends = [({mark.end for mark in turn.turn.prompt}, turn.turn.num_prompt_tokens) for turn in heard.turns]
    longest, num_tokens = max(ends, key=lambda pair: pair[1])
    for size in sorted(longest):
        if heard.max_chunk_tokens <= size <= num_tokens // 2 and all(
            at in marks for marks, end in ends for at in range(size, end + 1, size)
        ):
            return size
    what = f"{url}: the prompts are too short to tell the size of chunks from their marks"
    raise TraceError(f"{what}: name it, for example as the format events:block_tokens=256")


def _request(rows: Rows, heard: _HeardTurn, begin_s: float) -> Request:
    parent, turn = heard.parent, heard.turn
    return Request(
        request_id=heard.number,
        session_id=heard.session,
        arrival_s=heard.submitted_s - begin_s,
        input_tokens=rows.count(heard.row, "num_prompt_tokens", turn.num_prompt_tokens, 1),
        output_tokens=heard.output_tokens,
        turn=heard.depth,
        parent=None if parent is None else parent.number,
        think_s=None if parent is None or parent.ended_s is None else max(0.0, heard.submitted_s - parent.ended_s),
        blocks=_blocks(rows, heard.row, turn),
        priority=turn.priority,
    )


def _blocks(rows: Rows, row: int, turn: Turn) -> Sequence[int]:
    size = rows.block_tokens
    keys = {mark.end: mark.key for mark in turn.prompt}
    ends = [*range(size, turn.num_prompt_tokens, size), turn.num_prompt_tokens]
    missing = next((end for end in ends if end not in keys), None)
    if missing is not None:
        raise rows.fault(row, f"its prompt has no mark at token {missing}", f"choose another block_tokens than {size}")
    return array("q", [int.from_bytes(blake2b(keys[end].encode(), digest_size=8).digest()) >> 1 for end in ends])
