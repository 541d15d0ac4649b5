"""Untimed replay: one request after the other against one cache of a given size, under a real eviction policy.

Answers how much of a trace's prompts a cache would have held, and nothing about time: no queue, no bandwidth. Blocks
are kept in runs, since most blocks live and die with their neighbours:

    run     [b0 b1 b2 b3]──[b4 b5]      consecutive blocks, no branch inside; only a run without children
                        └──[b6]         is a candidate, and it gives up blocks from its end

What the cache holds is closed under prefixes, so the longest held beginning of a prompt is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from policies.eviction.contract import EvictionPolicy, learner_of
from policies.messages import Mark, Tier
from policies.outlook import Outlook
from policies.places import Place
from policies.plugins import Guard
from policies.queue import Order
from policies.simulator.trace import Request, Trace, TraceError

PLACE = Place("cache", Tier.DRAM)
MAX_GONE = 1  # blocks evicted from a run before the policy is asked again
TICK_S = 1e-6  # between requests that came at the same time


class Level(StrEnum):
    """What a cache keeps: blocks of a prefix tree, or all of a session's KV or nothing."""

    BLOCK = "block"
    SESSION = "session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a cache held of a trace's prompts, in tokens."""

    capacity_tokens: float
    footprint_tokens: int
    input_tokens: int
    hit_tokens: int

    @property
    def hit_rate(self) -> float:
        """Token hit rate, between 0 and 1."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


class Cache(Protocol):
    def use(self, request: Request, turn: int, now: float) -> int:
        """The tokens of the prompt that are here; then the prompt is, as far as it fits."""


def replay(
    trace: Trace,
    policy: EvictionPolicy,
    share: float,
    *,
    level: Level = Level.BLOCK,
    max_run: int = 1 << 30,
    warm_up: float = 0.0,
    progress: Callable[[int], None] | None = None,
    guard: Guard | None = None,
) -> Replay:
    """Run a trace from a cold start; the cache holds `share` (0 to 1) of its footprint.

    TraceError for a trace without block ids at block level: give it private blocks first (`shaping`). `max_run`: the
    longest run of blocks that a policy is told of as one. `warm_up`: the share of the requests, from the first on, that
    fill the cache and teach the policy and are not counted. `progress` hears the number of requests done, now and then.
    `guard` notes what the policy does wrong; the least recently listed goes in place of a wrong answer.
    """
    footprint = footprint_tokens(trace, level)
    if level is Level.SESSION:
        capacity = footprint * share
        cache: Cache = SessionCache(policy, capacity, guard)
    else:
        if not trace.block_tokens:
            raise TraceError(f"{trace.name} has no block ids: replay it at session level, or give it private blocks")
        capacity = int(footprint / trace.block_tokens * share) * trace.block_tokens
        cache = BlockCache(policy, capacity, trace.block_tokens, max_run, guard)
    turns: Counter[int] = Counter()
    first_counted = int(warm_up * len(trace))
    input_tokens, hit_tokens, now = 0, 0, float("-inf")
    for number, request in enumerate(trace):
        turns[request.session_id] += 1
        now = max(now + TICK_S, request.arrival_s)
        num_held = cache.use(request, turns[request.session_id], now)
        if number >= first_counted:
            input_tokens += request.input_tokens
            hit_tokens += num_held
        if progress is not None and not number % 1000:
            progress(number)
    return Replay(
        capacity_tokens=capacity, footprint_tokens=footprint, input_tokens=input_tokens, hit_tokens=hit_tokens
    )


def footprint_tokens(trace: Trace, level: Level) -> int:
    """What a cache that never evicts ends with: distinct blocks, or every session's longest turn, answer included."""
    if level is Level.BLOCK:
        return trace.footprint_tokens
    sizes: dict[int, int] = {}
    for request in trace:
        size = request.input_tokens + request.output_tokens
        sizes[request.session_id] = max(size, sizes.get(request.session_id, 0))
    return sum(sizes.values())


@dataclass(slots=True, eq=False, kw_only=True)
class Run:
    """Consecutive blocks without a branch: the facts an eviction policy may ask for. A byte is a token here."""

    key: str
    blocks: list[int] = field(default_factory=list)
    parent: Run | None = None
    start: int = 0
    num_bytes: int
    stored_at: float
    last_used: float
    num_uses: int = 1
    turn: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    children: set[Run] = field(default_factory=set)
    next_use: Order | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_bytes


class _Room:
    """A policy over one place, guarded: it may raise and answer nonsense.

    `add` and `remove` are called for every run of every request, so they go without `Guard.tell` and its closure.
    """

    def __init__(self, policy: EvictionPolicy, guard: Guard | None) -> None:
        self._policy, self._guard = policy, guard or Guard()
        self._learner = learner_of(policy)
        self._listed: dict[str, None] = {}  # what the policy was told, the latest last: also the safe default order

    @property
    def listens(self) -> bool:
        """Whether the policy wants to hear of prompts."""
        return self._learner is not None

    def hear(self, prompt: Sequence[Mark], now: float) -> None:
        learner = self._learner
        if learner is not None:
            self._guard.tell(self._policy, "note_prompt", lambda: learner.note_prompt(prompt, now))

    def hear_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        learner = self._learner
        if learner is not None:
            self._guard.tell(self._policy, "note_answer", lambda: learner.note_answer(prompt, turn, answer_tokens, now))

    def add(self, run: Run) -> None:
        """A candidate, or one that changed."""
        self._listed.pop(run.key, None)
        self._listed[run.key] = None
        try:
            self._policy.add(PLACE, run)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code
            self._guard.note_raised(self._policy, "add", error)

    def remove(self, key: str, *, evicted: bool) -> None:
        """A candidate no more."""
        self._listed.pop(key, None)
        try:
            self._policy.remove(PLACE, key, evicted=evicted)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code
            self._guard.note_raised(self._policy, "remove", error)

    def victim(self, outlook: Outlook) -> str:
        (key,) = self._guard.consult(
            self._policy,
            "victims",
            ask=lambda: tuple(self._policy.victims(PLACE, 1, outlook)),
            problem=self._problem_with,
            default=lambda: (next(iter(self._listed)),),
        )
        return key

    def _problem_with(self, keys: Sequence[str]) -> str | None:
        if len(keys) != 1:
            return f"named {len(keys)} chunks, not 1"
        return None if keys[0] in self._listed else f"named a chunk that may not be evicted: {keys[0]!r}"


class BlockCache:
    """Blocks in runs, up to `capacity_tokens`. Blocks of a request are touched tail first."""

    def __init__(
        self,
        policy: EvictionPolicy,
        capacity_tokens: float,
        block_tokens: int,
        max_run: int = 1 << 30,
        guard: Guard | None = None,
    ) -> None:
        self.used_tokens = 0
        self._room = _Room(policy, guard)
        self._capacity, self._block_tokens, self._max_run = capacity_tokens, block_tokens, max_run
        self._max_gone = MAX_GONE
        self._run_of: dict[int, Run] = {}
        self._runs: dict[str, Run] = {}

    def use(self, request: Request, turn: int, now: float) -> int:
        blocks = request.blocks
        size, num_tokens = self._block_tokens, request.input_tokens
        prompt: list[Mark] = []
        if self._room.listens:
            prompt = [Mark(min(number * size, num_tokens), str(block)) for number, block in enumerate(blocks, 1)]
        self._room.hear(prompt, now)
        num_held = bisect_left(blocks, True, key=lambda block: block not in self._run_of)
        last = self._end_of(blocks[num_held - 1]) if num_held else None
        if last is not None:
            last.num_uses += 1
            last.last_used, last.turn = now, turn
            last.prompt_tokens, last.answer_tokens = request.input_tokens, request.output_tokens
            if not last.children:
                self._room.add(last)
        self._room.hear_answer(prompt, turn, request.output_tokens, now)
        self._extend(last, request, num_held, turn, now)
        self._make_room(now)
        return min(num_held * self._block_tokens, request.input_tokens)

    def _end_of(self, block: int) -> Run:
        """The run that ends with this block, split off if need be."""
        run = self._run_of[block]
        if run.blocks[-1] != block:
            self._split(run, run.blocks.index(block) + 1)
        return run

    def _split(self, run: Run, at: int) -> None:
        """The blocks of a run from `at` on become a run of their own below it."""
        rest = Run(
            key=str(run.blocks[at]),
            blocks=run.blocks[at:],
            parent=run,
            start=run.start + at * self._block_tokens,
            num_bytes=(len(run.blocks) - at) * self._block_tokens,
            stored_at=run.stored_at,
            last_used=run.last_used,
            num_uses=run.num_uses,
            turn=run.turn,
            prompt_tokens=run.prompt_tokens,
            answer_tokens=run.answer_tokens,
            children=run.children,
        )
        for child in run.children:
            child.parent = rest
        if not run.children:
            self._room.remove(run.key, evicted=False)
            self._room.add(rest)
        del run.blocks[at:]
        run.num_bytes = at * self._block_tokens
        run.children, run.num_uses = {rest}, 0  # what went through comes back when its children go
        self._runs[rest.key] = rest
        for block in rest.blocks:
            self._run_of[block] = rest

    def _extend(self, last: Run | None, request: Request, first: int, turn: int, now: float) -> None:
        while first < len(request.blocks):
            new = list(request.blocks[first : first + self._max_run])
            run = Run(
                key=str(new[0]),
                blocks=new,
                parent=last,
                start=first * self._block_tokens,
                num_bytes=len(new) * self._block_tokens,
                stored_at=now,
                last_used=now,
                turn=turn,
                prompt_tokens=request.input_tokens,
                answer_tokens=request.output_tokens,
            )
            if last is not None:
                if not last.children:
                    self._room.remove(last.key, evicted=False)
                last.children.add(run)
            self._runs[run.key] = run
            for block in new:
                self._run_of[block] = run
            self.used_tokens += run.num_bytes
            first += len(new)
            last = run
            self._room.add(run)

    def _make_room(self, now: float) -> None:
        outlook = Outlook.without_queue(now)
        while self.used_tokens > self._capacity:
            run = self._runs[self._room.victim(outlook)]
            surplus = -int(-(self.used_tokens - self._capacity) // self._block_tokens)
            num_gone = min(surplus, len(run.blocks), self._max_gone)
            for block in run.blocks[-num_gone:]:
                del self._run_of[block]
            del run.blocks[-num_gone:]
            run.num_bytes -= num_gone * self._block_tokens
            self.used_tokens -= num_gone * self._block_tokens
            if not run.blocks:
                self._drop(run)
            else:
                self._room.add(run)  # it ends sooner now

    def _drop(self, run: Run) -> None:
        del self._runs[run.key]
        self._room.remove(run.key, evicted=True)
        parent = run.parent
        if parent is None:
            return
        parent.num_uses += run.num_uses
        if run.last_used >= parent.last_used:
            parent.last_used, parent.turn = run.last_used, run.turn
            parent.prompt_tokens, parent.answer_tokens = run.prompt_tokens, run.answer_tokens
        parent.children.discard(run)
        if not parent.children:
            self._room.add(parent)


class SessionCache:
    """All of a session's KV, answers included, or nothing, as a system that stores whole conversations."""

    def __init__(self, policy: EvictionPolicy, capacity_tokens: float, guard: Guard | None = None) -> None:
        self.used_tokens = 0
        self._room, self._capacity = _Room(policy, guard), capacity_tokens
        self._sessions: dict[str, Run] = {}

    def use(self, request: Request, turn: int, now: float) -> int:
        key = str(request.session_id)
        prompt = [Mark(1, key)]  # a session is one thing here, whatever its length
        self._room.hear(prompt, now)
        old = self._sessions.get(key)
        held_tokens = old.num_bytes if old is not None else 0
        self._room.hear_answer(prompt, turn, request.output_tokens, now)
        run = self._sessions[key] = Run(
            key=key,
            num_bytes=request.input_tokens + request.output_tokens,
            stored_at=old.stored_at if old is not None else now,
            last_used=now,
            num_uses=old.num_uses + 1 if old is not None else 1,
            turn=turn,
            prompt_tokens=request.input_tokens,
            answer_tokens=request.output_tokens,
        )
        self.used_tokens += run.num_bytes - held_tokens
        self._room.add(run)
        outlook = Outlook.without_queue(now)
        while self.used_tokens > self._capacity:
            victim = self._room.victim(outlook)
            self.used_tokens -= self._sessions.pop(victim).num_bytes
            self._room.remove(victim, evicted=True)
        return min(held_tokens, request.input_tokens)
