"""Making a trace session by session: requests are added in any order, and come out in the order of their arrival.

Knows no law of what people ask: see `generators/` and `laws.py`.
"""

from __future__ import annotations

from dataclasses import replace

from policies.simulator.prompts import Prompt
from policies.simulator.trace import Request, Trace


class Drafts:
    """Requests of a trace in the making. `request_id`s are provisional until `trace()` numbers them anew."""

    def __init__(self, block_tokens: int, answer_tokens_per_s: float) -> None:
        """`answer_tokens_per_s`: how fast an answer is assumed to be written; a follow-up arrives after it."""
        if not answer_tokens_per_s > 0:
            raise ValueError(f"answer_tokens_per_s is {answer_tokens_per_s}: choose a rate above 0")
        self._block_tokens = block_tokens
        self._answer_tokens_per_s = answer_tokens_per_s
        self._requests: list[Request] = []
        self._num_sessions = 0

    def session(self, arrival_s: float) -> Session:
        """A new session, whose first turn arrives then."""
        self._num_sessions += 1
        return Session(self, self._num_sessions - 1, arrival_s)

    def begin(self, session_id: int, arrival_s: float, prompt: Prompt, output_tokens: int) -> Request:
        """The first turn of a session."""
        request = Request(
            request_id=len(self._requests),
            session_id=session_id,
            arrival_s=arrival_s,
            input_tokens=prompt.num_tokens,
            output_tokens=output_tokens,
            blocks=prompt.blocks,
        )
        return self._added(request)

    def follow(self, parent: Request, think_s: float, prompt: Prompt, output_tokens: int) -> Request:
        """The next turn after `parent`, `think_s` seconds after its answer."""
        request = Request(
            request_id=len(self._requests),
            session_id=parent.session_id,
            arrival_s=parent.arrival_s + parent.output_tokens / self._answer_tokens_per_s + think_s,
            input_tokens=prompt.num_tokens,
            output_tokens=output_tokens,
            turn=parent.turn + 1,
            parent=parent.request_id,
            think_s=think_s,
            blocks=prompt.blocks,
        )
        return self._added(request)

    def repeat(self, request: Request, delay_s: float) -> Request:
        """The same turn with the same prompt again, `delay_s` seconds later."""
        think_s = None if request.think_s is None else request.think_s + delay_s
        arrival_s = request.arrival_s + delay_s
        return self._added(replace(request, request_id=len(self._requests), arrival_s=arrival_s, think_s=think_s))

    def trace(self, name: str) -> Trace:
        """All requests in the order of their arrival, numbered from 0; where arrivals are equal, as they were added."""
        ordered = sorted(self._requests, key=lambda request: request.arrival_s)
        number = {request.request_id: index for index, request in enumerate(ordered)}
        requests = tuple(
            replace(request, request_id=index, parent=None if request.parent is None else number[request.parent])
            for index, request in enumerate(ordered)
        )
        return Trace(name=name, block_tokens=self._block_tokens, requests=requests)

    def _added(self, request: Request) -> Request:
        self._requests.append(request)
        return request


class Session:
    """A conversation in the making: each turn follows the one before."""

    def __init__(self, drafts: Drafts, session_id: int, arrival_s: float) -> None:
        self.latest: Request | None = None
        self._drafts, self._session_id, self._arrival_s = drafts, session_id, arrival_s

    def turn(self, prompt: Prompt, output_tokens: int, think_s: float) -> Request:
        """The next turn, `think_s` after the answer before; the first one comes when the session arrives."""
        if self.latest is None:
            self.latest = self._drafts.begin(self._session_id, self._arrival_s, prompt, output_tokens)
        else:
            self.latest = self._drafts.follow(self.latest, think_s, prompt, output_tokens)
        return self.latest

    def repeat(self, delay_s: float) -> Request:
        """The latest turn once more, `delay_s` after it came; what follows, follows this one."""
        assert self.latest is not None, "a turn comes before its repetition"
        self.latest = self._drafts.repeat(self.latest, delay_s)
        return self.latest
