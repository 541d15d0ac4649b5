"""What a trace's requests look like to the scheduler: turns with marks, and the chunks their computation leaves behind.

As in the live system (`cluster/chat.py`) a prompt has marks at every multiple of `chunk_tokens` and, in between, at the
end of each earlier prompt and of each earlier answer less its last token, whose KV was never computed:

    tokens   [ prompt 0   | answer 0 | new | answer 1 ]
    marks    m      m     p0   m    a0     p1   m     a1        m: a multiple of chunk_tokens

Keys come from the trace's block ids (equal prefix, equal key); blocks are coarsened, so chunk_tokens must be a multiple
of block_tokens, and what two sessions share beyond a multiple of chunk_tokens is not shared here. The trace has no ids
for answers. A follow-up that is long enough to contain its parent's prompt and answer (and has its blocks) is taken to
do so, token for token, and its ids name the answer's chunks; one that is shorter shares the parent's prompt at most.
Without block ids, text is private to its chain of follow-ups.

*Context windows.* A follow-up that is shorter than its history and shares no block with its parent was truncated: the
oldest part was dropped, and the trace's ids, being hashes of whole prefixes, all differ. By default it is new text
(tokens that are kept are accounted as `truncated`). With `reuse_after_truncation` KV is kept as CachedAttention does,
where it does not depend on positions: the replica, which still has all of it when the parent ends, offers the kept part
once more under the truncated context's keys. (The paper slices what is stored instead, and moves no bytes. What was
typed after the cut is not in the trace: the mean of the other follow-ups is taken.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from policies.messages import ChunkInfo, Mark, Turn
from policies.simulator.hardware import SetupError
from policies.simulator.trace import Request, Trace, TraceError


@dataclass(frozen=True, slots=True)
class Text:
    """A turn's prompt and answer as marks. The answer's last token is not part of it."""

    marks: tuple[Mark, ...]
    prompt_end: int
    end: int
    stream: str
    """Names what has no block id, along a chain of follow-ups."""


@dataclass(frozen=True, slots=True)
class Kinship:
    """What a follow-up has of its parent."""

    num_shared: int
    """Leading tokens of the parent's text."""
    num_kept: int = 0
    """Tokens kept by a truncation."""


ALONE = Kinship(0)


def num_computed(request: Request) -> int:
    """Tokens whose KV exists when the turn ends."""
    return request.input_tokens + max(0, request.output_tokens - 1)


class Marker:
    """Makes turns, parents before their children, and the chunks of turns made. Forgets what nobody can ask for."""

    def __init__(
        self, trace: Trace, chunk_tokens: int, bytes_per_token: float, *, reuse: bool, reuse_after_truncation: bool
    ) -> None:
        """SetupError for chunks that blocks do not fit into, TraceError for what cannot be run."""
        if chunk_tokens < 1 or (trace.block_tokens and chunk_tokens % trace.block_tokens):
            raise SetupError(
                f"chunk_tokens is {chunk_tokens}, but the blocks of {trace.name} have {trace.block_tokens} tokens: "
                "choose a multiple of that"
            )
        self.children: dict[int, list[Request]] = {}
        self._block_tokens, self._chunk_tokens, self._bytes_per_token = (
            trace.block_tokens,
            chunk_tokens,
            bytes_per_token,
        )
        self._reuse, self._reuse_after_truncation = reuse, reuse_after_truncation
        self._requests = {request.request_id: request for request in trace}
        self._texts: dict[int, Text] = {}
        self._kinships: dict[int, Kinship] = {}
        self._heirs: dict[int, int] = {}  # the first follow-up that contains the parent's answer
        self._num_unmade: dict[int, int] = {}  # children whose turns are still to be made
        self._check(trace)
        self._relate(trace)
        self._num_typed = self._mean_typed(trace)

    def _check(self, trace: Trace) -> None:
        if len(self._requests) < len(trace):
            raise TraceError(f"{trace.name}: request ids come twice; give each request one of its own")
        seen: set[int] = set()
        for request in trace:
            if request.input_tokens < 1:
                raise TraceError(f"{trace.name}: request {request.request_id} has no input; leave it out")
            if request.parent in self._requests and request.parent not in seen:
                raise TraceError(f"{trace.name}: request {request.request_id} comes before its parent; sort by arrival")
            seen.add(request.request_id)

    def _relate(self, trace: Trace) -> None:
        for request in trace:
            parent = self.parent_of(request)
            if parent is None:
                continue
            self.children.setdefault(parent.request_id, []).append(request)
            if parent.request_id not in self._heirs and self._contains_answer(request, parent):
                self._heirs[parent.request_id] = request.request_id
        self._num_unmade = {request_id: len(children) for request_id, children in self.children.items()}

    def _mean_typed(self, trace: Trace) -> int:
        """Tokens that follow the parent's answer, on average over the follow-ups that contain it."""
        counts = [
            request.input_tokens - parent.input_tokens - parent.output_tokens
            for request in trace
            if (parent := self.parent_of(request)) is not None and self._contains_answer(request, parent)
        ]
        return round(sum(counts) / len(counts)) if counts else 0

    # --- who is whose -------------------------------------------------------------------------------------------------

    def parent_of(self, request: Request) -> Request | None:
        """None also for a parent that the trace does not have."""
        return None if request.parent is None else self._requests.get(request.parent)

    def num_truncated(self, request: Request) -> int:
        """Prompt tokens that were known before a truncation made them new text."""
        return 0 if self._reuse_after_truncation else self._kinship(request).num_kept

    def _contains_answer(self, request: Request, parent: Request) -> bool:
        is_long = request.input_tokens >= parent.input_tokens + parent.output_tokens
        return is_long and self._num_common(request, parent) == self._num_full(parent)

    def _num_full(self, request: Request) -> int:
        """Blocks that are full and have an id."""
        return min(request.input_tokens // self._block_tokens, len(request.blocks)) if self._block_tokens else 0

    def _num_common(self, request: Request, other: Request) -> int:
        limit = min(self._num_full(request), self._num_full(other))
        if request.blocks[:limit] == other.blocks[:limit]:
            return limit
        pairs = zip(request.blocks, other.blocks)
        return next((i for i, (one, two) in enumerate(pairs) if one != two or i == limit), limit)

    def _kinship(self, request: Request) -> Kinship:
        known = self._kinships.get(request.request_id)
        if known is None:
            parent = self.parent_of(request)
            known = ALONE if parent is None else self._compare(request, parent)
            self._kinships[request.request_id] = known
        return known

    def _compare(self, request: Request, parent: Request) -> Kinship:
        num_common, num_full = self._num_common(request, parent), self._num_full(parent)
        is_short = request.input_tokens < parent.input_tokens + parent.output_tokens
        if is_short and not num_common and (num_full or not self._block_tokens):
            return Kinship(0, num_kept=max(0, request.input_tokens - self._num_typed))
        if num_common < num_full or request.input_tokens < parent.input_tokens:
            return Kinship(num_common * self._block_tokens)
        if self._contains_answer(request, parent) and self._has_answer_of_heir(request, parent):
            return Kinship(num_computed(parent))
        return Kinship(parent.input_tokens)

    def _has_answer_of_heir(self, request: Request, parent: Request) -> bool:
        """Of two follow-ups that differ inside the answer only one has the answer that was given."""
        heir = self._requests[self._heirs[parent.request_id]]
        num_blocks = num_computed(parent) // self._block_tokens if self._block_tokens else 0
        return self._num_common(request, heir) >= min(num_blocks, self._num_full(request), self._num_full(heir))

    # --- turns --------------------------------------------------------------------------------------------------------

    def turn(self, request: Request) -> Turn:
        """The turn; its parent's was made before."""
        text = self._texts[request.request_id] = self._text(request)
        num_marks = bisect_right(text.marks, text.prompt_end, key=_end)
        return Turn(
            turn_id=f"t{request.request_id}",
            session_id=f"s{request.session_id}",
            prompt=text.marks[:num_marks],
            num_prompt_tokens=request.input_tokens,
            max_new_tokens=max(1, request.output_tokens),
            priority=request.priority,
            reuse=self._reuse,
        )

    def outlook(self, request: Request) -> Turn:
        """What is known of a follow-up before it comes: its parent's prompt and answer."""
        parent = self.parent_of(request)
        text = self._texts[parent.request_id] if parent is not None else Text((), 0, 0, "")
        return Turn(
            turn_id=f"t{request.request_id}",
            session_id=f"s{request.session_id}",
            prompt=text.marks,
            num_prompt_tokens=text.marks[-1].end if text.marks else 0,
            max_new_tokens=1,
            reuse=self._reuse,
        )

    def _text(self, request: Request) -> Text:
        parent = self.parent_of(request)
        kinship = self._kinship(request)
        marks: list[Mark] = []
        stream = f"{_salt(request)}s{request.request_id}"
        if parent is not None:
            before = self._texts[parent.request_id]
            marks += before.marks[: bisect_right(before.marks, kinship.num_shared, key=_end)]
            if self._heirs.get(parent.request_id) == request.request_id:
                stream = before.stream
            self._let_go_of(parent)
        if kinship.num_kept and self._reuse_after_truncation:
            marks += self._head(request, kinship.num_kept)
        end = num_computed(request)
        self._extend(marks, request.input_tokens, self._end_key(request, stream), request, stream)
        if end > request.input_tokens:
            heir = self._requests.get(self._heirs.get(request.request_id, -1), request)
            self._extend(marks, end, f"{_salt(request)}a{request.request_id}", heir, stream)
        return Text(tuple(marks), request.input_tokens, end, stream)

    def _extend(self, marks: list[Mark], end: int, end_key: str, source: Request, stream: str) -> None:
        """Marks up to `end`: at multiples named by the blocks of `source`, and there."""
        size = self._chunk_tokens
        last = marks[-1].end if marks else 0
        marks += [Mark(at, self._key(source, at, stream)) for at in range(last - last % size + size, end + 1, size)]
        if not marks or marks[-1].end < end:
            marks.append(Mark(end, end_key))

    def _key(self, request: Request, end: int, stream: str) -> str:
        """The key of a multiple of chunk_tokens in this request's prompt."""
        if self._block_tokens and end // self._block_tokens <= self._num_full(request):
            return f"{_salt(request)}b{request.blocks[end // self._block_tokens - 1]}"
        return f"{stream}:{end}"

    def _end_key(self, request: Request, stream: str) -> str:
        """The key of the whole prompt: equal prompts have equal last blocks, also part-filled ones."""
        size = self._block_tokens
        if size and len(request.blocks) == -(-request.input_tokens // size):
            return f"{_salt(request)}b{request.blocks[-1]}:{request.input_tokens}"
        return f"{stream}p{request.request_id}"

    def _head(self, request: Request, num_kept: int) -> list[Mark]:
        """Marks of what a truncation kept, as part of the truncated prompt."""
        marks: list[Mark] = []
        stream = f"{_salt(request)}s{request.request_id}"
        self._extend(marks, num_kept, f"{stream}k", request, stream)
        return marks

    # --- chunks -------------------------------------------------------------------------------------------------------

    def full_chunks(self, request: Request, start: int) -> tuple[ChunkInfo, ...]:
        """The chunks of the prompt that are full, without those that end before token `start` or there."""
        size = self._chunk_tokens
        return self._chunks(self._texts[request.request_id].marks, start, request.input_tokens // size * size)

    def chunks(self, request: Request, start: int) -> tuple[ChunkInfo, ...]:
        """All chunks of prompt and answer, without those that end before token `start` or there."""
        text = self._texts[request.request_id]
        return self._chunks(text.marks, start, text.end)

    def kept_chunks(self, request: Request) -> tuple[ChunkInfo, ...]:
        """What follow-ups keep of this turn's text across a truncation, under their keys."""
        kept: list[ChunkInfo] = []
        for child in self.children.get(request.request_id, ()) if self._reuse_after_truncation else ():
            num_kept = self._kinship(child).num_kept
            if num_kept:
                kept += self._chunks(self._head(child, num_kept), 0, num_kept)
        return tuple(kept)

    def _chunks(self, marks: Sequence[Mark], start: int, end: int) -> tuple[ChunkInfo, ...]:
        chunks = []
        first = start - start % self._chunk_tokens
        low = bisect_right(marks, first, key=_end)
        for begin in range(first, end, self._chunk_tokens):
            stop = min(begin + self._chunk_tokens, end)
            high = bisect_right(marks, stop, lo=low, key=_end)
            chunks.append(
                ChunkInfo(
                    key=marks[high - 1].key,
                    parent=marks[low - 1].key if begin else None,
                    start=begin,
                    end=stop,
                    num_bytes=round((stop - begin) * self._bytes_per_token),
                    marks=tuple(marks[low:high]),
                )
            )
            low = high
        return tuple(chunks)

    def _let_go_of(self, parent: Request) -> None:
        self._num_unmade[parent.request_id] -= 1
        if not self._num_unmade[parent.request_id]:
            del self._texts[parent.request_id]

    def ended(self, request: Request) -> None:
        """Nobody asks for this turn's chunks any more."""
        if request.request_id not in self.children:
            self._texts.pop(request.request_id, None)


def _end(mark: Mark) -> int:
    return mark.end


def _salt(request: Request) -> str:
    """Keeps tenants apart."""
    return f"{request.tenant}/" if request.tenant else ""
