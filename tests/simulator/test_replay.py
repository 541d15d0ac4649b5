"""The oracle is the ceiling: no choice of evictions, tried one and all, gets more hits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from random import Random

import pytest

from policies.eviction import EvictionPolicy, Gdsf, Lfu, Lru, Returns, S3Fifo, Sieve
from policies.simulator.oracle import block_oracle, session_oracle
from policies.simulator.replay import Level, footprint_tokens, replay
from policies.simulator.trace import Request, Trace


def small_trace(seed: int, num_requests: int = 9) -> Trace:
    """Paths of up to three blocks in a binary tree; a session is the first block."""
    random = Random(seed)
    requests = []
    for number in range(num_requests):
        path = [random.randrange(3), *(random.randrange(2) for _ in range(random.randrange(3)))]
        blocks = tuple(int("1" + "".join(map(str, path[:end]))) for end in range(1, len(path) + 1))
        requests.append(
            Request(
                request_id=number,
                session_id=blocks[0],
                arrival_s=float(number),
                input_tokens=len(blocks),
                output_tokens=0,
                blocks=blocks,
            )
        )
    return Trace(name="small", block_tokens=1, requests=tuple(requests))


def best_block_hits(trace: Trace, capacity: int) -> int:
    """After each request, any part of what is there that holds every block's parents and fits may stay."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        blocks = trace.requests[at].blocks
        hits = [block in held for block in blocks]
        there = held | set(blocks)
        parents = {child: parent for request in trace for parent, child in zip(request.blocks, request.blocks[1:])}
        size = min(capacity, len(there))
        kept = [
            frozenset(choice)
            for choice in combinations(sorted(there), size)
            if all(parents.get(block, block) in choice for block in choice)
        ]
        return (*hits, False).index(False) + max(best(at + 1, choice) for choice in kept)

    return best(0, frozenset())


def best_session_hits(trace: Trace, capacity: int) -> int:
    """The same for whole sessions of one size."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        session = trace.requests[at].session_id
        there = held | {session}
        kept = [frozenset(choice) for choice in combinations(sorted(there), min(capacity, len(there)))]
        return (session in held) + max(best(at + 1, choice) for choice in kept)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_no_choice_of_blocks_beats_the_oracle(seed: int, capacity: int) -> None:
    trace = small_trace(seed)
    share = (capacity + 0.5) / trace.footprint_tokens
    assert replay(trace, block_oracle(trace), share, max_run=1).hit_tokens == best_block_hits(trace, capacity)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("capacity", [1, 2])
def test_no_choice_of_sessions_beats_the_oracle(seed: int, capacity: int) -> None:
    random = Random(seed)
    sessions = [random.randrange(4) for _ in range(12)]
    trace = Trace(name="small", block_tokens=0, requests=tuple(one_token(*item) for item in enumerate(sessions)))
    share = (capacity + 0.5) / len(set(sessions))
    hits = replay(trace, session_oracle(trace), share, level=Level.SESSION).hit_tokens
    assert hits == best_session_hits(trace, capacity)


def one_token(number: int, session_id: int) -> Request:
    return Request(request_id=number, session_id=session_id, arrival_s=float(number), input_tokens=1, output_tokens=0)


@pytest.mark.parametrize("make", [Gdsf, Lfu, Lru, Returns, S3Fifo, Sieve])
@pytest.mark.parametrize("level", list(Level))
def test_nobody_beats_the_oracle_and_capacity_is_kept(make: type[EvictionPolicy], level: Level) -> None:
    for seed in range(10):
        trace = small_trace(seed, num_requests=60)
        if level is Level.SESSION:
            trace = Trace(name="equal", block_tokens=0, requests=[one_token(r.request_id, r.session_id) for r in trace])
        oracle = block_oracle(trace) if level is Level.BLOCK else session_oracle(trace)
        ceiling = replay(trace, oracle, 0.4, level=level, max_run=1).hit_tokens
        assert 0 <= replay(trace, make(), 0.4, level=level).hit_tokens <= ceiling


@pytest.mark.parametrize("level", list(Level))
def test_what_warms_up_fills_the_cache_and_is_not_counted(level: Level) -> None:
    trace = small_trace(1, num_requests=40)
    whole, held_out = (replay(trace, Lru(), 0.4, level=level, warm_up=share) for share in (0.0, 0.5))
    half = replace(trace, requests=trace.requests[:20])
    first = replay(half, Lru(), (whole.capacity_tokens + 1e-6) / footprint_tokens(half, level), level=level)
    assert held_out.input_tokens == whole.input_tokens - first.input_tokens
    assert held_out.hit_tokens == whole.hit_tokens - first.hit_tokens > 0


def test_everything_fits_everything_hits() -> None:
    trace = small_trace(1)
    num_uses = sum(len(request.blocks) for request in trace)
    assert replay(trace, Lru(), 1.0).hit_tokens == num_uses - trace.footprint_tokens
